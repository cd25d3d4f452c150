"""Where compiled programs are kept between processes: a second start does not compile again."""

from __future__ import annotations

import os
import pathlib

import jax

from backbone.catalogue import cache_dir


def folder() -> pathlib.Path:
    """JAX_COMPILATION_CACHE_DIR, else `xla` in the Headway cache."""
    return pathlib.Path(os.environ.get('JAX_COMPILATION_CACHE_DIR') or cache_dir() / 'xla')


def use_cache() -> None:
    """Turns JAX's persistent compilation cache on. A folder that cannot be written only costs compiling again."""
    jax.config.update('jax_compilation_cache_dir', str(folder()))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
