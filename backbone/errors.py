"""Named errors. Every error a user can cause is a `HeadwayError`: one line that names the thing."""


class HeadwayError(Exception):
    """Bad input, not a bug. Entry points print it as one line and exit with code 2."""


class ConfigError(HeadwayError):
    """An unknown key, or a value outside its range."""


class FormatError(HeadwayError):
    """A checkpoint file is damaged, or of a kind that is not read here."""


class TensorMismatch(FormatError):
    """Tensors are missing, left over, or of the wrong shape; the message lists them."""


class FetchError(HeadwayError):
    """A model or data file could not be brought here, or its hash is wrong."""


class TokenizerError(HeadwayError):
    """Text and vocabulary do not fit together."""


class RequestError(HeadwayError):
    """A request that cannot be decoded: empty prompt, beyond the context, unknown drafter."""
