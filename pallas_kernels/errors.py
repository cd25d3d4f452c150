"""What goes wrong here, by name."""


class KernelError(ValueError):
    """A kernel was asked for by name and cannot be had; the message says which, for what, and why."""
