"""TensorHead: a rank-r CP head over the next n tokens, drafting losslessly. Read config.py, head.py, cp.py, drafter.py."""
