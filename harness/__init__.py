"""What runs a model: decode loop, verifier, baselines, evaluation, comparison. Knows no method."""
