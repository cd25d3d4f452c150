"""Multi-rate residuals: a fast stream beside the slow one exits early, and drafts what the whole model verifies."""
