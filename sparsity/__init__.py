"""Contextual sparsity: a predictor names the heads and neurons that this input needs, and only those are read."""
