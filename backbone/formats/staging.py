"""Files and directories appear whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from backbone.errors import FormatError


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def refuse_existing(dst: str | os.PathLike, overwrite: bool) -> None:
    """Errors: FormatError if `dst` exists and `overwrite` is False."""
    if os.path.lexists(dst) and not overwrite:
        raise FormatError(f'{dst}: exists already, not overwritten')


@contextlib.contextmanager
def staged(dst: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """Yields a path that does not exist yet, beside `dst`; what is made there becomes `dst` at the end.

    After any error nothing is left and an older `dst` is untouched.
    Errors: FormatError if `dst` exists and `overwrite` is False, or the disk refuses.
    """
    dst = Path(dst)
    refuse_existing(dst, overwrite)
    temporary = dst.with_name(f'.{dst.name}.{os.getpid()}.part')
    aside = dst.with_name(f'.{dst.name}.{os.getpid()}.old')
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        yield temporary
        # Only a file can be renamed over a file; otherwise what was there steps aside first.
        if dst.is_dir() or (dst.exists() and temporary.is_dir()):
            dst.rename(aside)
        temporary.rename(dst)
        if aside.exists():
            _remove(aside)
    except BaseException as error:
        with contextlib.suppress(OSError):
            _remove(temporary)
        if aside.exists() and not dst.exists():
            aside.rename(dst)
        if isinstance(error, OSError):
            raise FormatError(f'{dst}: cannot be written: {error.strerror or error}') from error
        raise
