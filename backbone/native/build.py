"""Compiles a C source of this project for this machine, once, into the cache folder."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile

from backbone.catalogue import cache_dir


class NoCompiler(Exception):
    """There is no working C compiler, or no place to put what it makes; the message says which."""


FLAGS = ('-O3', '-march=native', '-ffp-contract=fast', '-Wno-psabi', '-pthread', '-shared', '-fPIC')


@functools.cache
def load(source: pathlib.Path, include: pathlib.Path | None = None, version: str = '') -> ctypes.CDLL:
    """The shared library of `source`, built with -march=native. `version`: of what `include` belongs to.

    Errors: NoCompiler.
    """
    compiler = shutil.which(os.environ.get('CC', 'cc'))
    if compiler is None:
        raise NoCompiler(f'no C compiler ({os.environ.get("CC", "cc")}) on PATH')
    # A home directory may be shared by machines, so the name carries the processor.
    files = sorted(p for p in source.parent.iterdir() if p.suffix in ('.c', '.h'))
    seed = b''.join(p.read_bytes() for p in files) + _processor().encode() + version.encode()
    library = cache_dir() / 'native' / f'{source.stem}-{hashlib.sha256(seed).hexdigest()[:16]}.so'
    if not library.exists():
        includes = [f'-I{include}'] if include else []
        try:
            library.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
                built = pathlib.Path(scratch) / library.name
                subprocess.run([compiler, *FLAGS, *includes, '-o', str(built), str(source)],
                               check=True, capture_output=True, text=True, timeout=120)
                built.rename(library)
        except subprocess.CalledProcessError as error:
            raise NoCompiler(f'{compiler} failed: {(error.stderr or "").strip().splitlines()[-1:]}') from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NoCompiler(f'cannot build {library}: {error}') from error
    return ctypes.CDLL(str(library))


def _processor() -> str:
    try:
        lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(('flags', 'Features'))), platform.processor())
    return platform.machine() + flags
