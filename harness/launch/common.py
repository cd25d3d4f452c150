"""What every entrypoint shares: flags, the one-line error, exit codes.

Exit codes: 0 done; 1 a bug (traceback); 2 bad input, so do not retry (`headway: error: ...`); 130 interrupted.
"""

from __future__ import annotations

import functools
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from backbone.errors import ConfigError, HeadwayError, RequestError

# Two entrypoints may use one flag name; a process that imports both (the tests) takes the latest.
string_flag = functools.partial(flags.DEFINE_string, allow_override=True)
integer_flag = functools.partial(flags.DEFINE_integer, allow_override=True)
float_flag = functools.partial(flags.DEFINE_float, allow_override=True)
bool_flag = functools.partial(flags.DEFINE_boolean, allow_override=True)
list_flag = functools.partial(flags.DEFINE_list, allow_override=True)
enum_flag = functools.partial(flags.DEFINE_enum, allow_override=True)


def read_config(flag: flags.FlagHolder) -> Any:
    """The config of a `config_flags.DEFINE_config_file` flag, locked. Errors: ConfigError where it cannot be read."""
    try:
        return flag.value.lock()
    except OSError as error:
        raise ConfigError(f'config: {str(error).strip().splitlines()[-1]}') from error


def fail(message: object) -> int:
    """Prints one `headway: error:` line on stderr; returns exit code 2."""
    print('headway: error:', ' '.join(str(message).split()), file=sys.stderr, flush=True)
    return 2


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        sys.exit(fail(error))
    except (AttributeError, KeyError, TypeError) as error:  # how config_flags takes a key that is not there
        while error.args and isinstance(error.args[0], Exception):
            error = error.args[0]
        sys.exit(fail(f'unknown config key: {error.args[0] if error.args else error}'))


def run(main: Callable[[list[str]], Any]) -> None:
    """Parses flags, calls `main(argv)` with what is left, exits the process by the codes above."""
    def guarded(argv: list[str]) -> Any:
        logging.set_verbosity(logging.WARNING)  # at INFO libraries tell of every file and missing backend
        try:
            return main(argv)
        except HeadwayError as error:
            return fail(error)
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:
            # The reader (`head`) left: nothing more to say, also not at interpreter exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0

    app.run(guarded, flags_parser=_parse)


def write_json(path: Path, data: Any) -> None:
    """Writes under a temporary name and renames. Errors: RequestError where that cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile('w', dir=path.parent, prefix='.', suffix='.json', delete=False) as sink:
            json.dump(_finite(data), sink, indent=2, allow_nan=False)
        os.chmod(sink.name, 0o644)
        os.replace(sink.name, path)
    except OSError as error:
        raise RequestError(f'cannot write {path}: {error.strerror}') from error


def _finite(value: Any) -> Any:
    """JSON has no NaN: what is not known (the error of one sample) becomes null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
