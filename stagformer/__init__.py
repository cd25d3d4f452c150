"""StagFormer: stacks of layers that read one another a token late, so that all of them run at once."""
