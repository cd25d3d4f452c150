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


class TrainingDiverged(HeadwayError):
    """Loss or gradient was not finite for too many steps in a row."""


class CheckpointError(HeadwayError):
    """A checkpoint of a training run cannot be written or read."""


class NoValidCheckpoint(CheckpointError):
    """There are checkpoints, or one was asked for, and none can be used; the message says why of each."""


class CheckpointMismatch(CheckpointError):
    """A sound checkpoint of another model; the message names the leaves that differ."""


class SaveError(CheckpointError):
    """A checkpoint or a metrics row could not be written; what was saved before is untouched."""


class FingerprintMismatch(ConfigError):
    """A working directory belongs to another config; the message names the fields that differ."""


class CompilerMissing(HeadwayError):
    """The compiler of hardware that is not here (libtpu, the CUDA plugin) is not installed."""


class DataError(HeadwayError):
    """Training data are missing, empty or damaged, or do not fit the vocabulary or the batch."""
