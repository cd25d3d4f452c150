"""TensorHead: a rank-r CP head over the next n tokens, drafting losslessly. Read config, head, cp, drafter."""
