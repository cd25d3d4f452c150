"""Redundancy-aware distillation: attention that a model can skip gives way to Mamba-2, which is distilled."""
