"""What a model is measured on: one file a kind, each `run(scorer, name, limit) -> dict` of numbers."""
