"""What a result file says of where it comes from: command, config, versions, device, git revision."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

PACKAGES = ('jax', 'jaxlib', 'flax', 'numpy', 'tokenizers', 'gguf', 'safetensors', 'headway')
_ROOT = Path(__file__).resolve().parent.parent


def collect(config: Any) -> dict[str, Any]:
    """{command, config, versions, device, git} in JSON types. config: a mapping, or anything with `to_dict`.

    Never fails for what is absent: git's fields are then None.
    """
    return {'command': shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]), 'config': _plain(config),
            'versions': _versions(), 'device': _device(), 'git': _git()}


def _plain(value: Any) -> Any:
    if hasattr(value, 'to_dict'):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {'python': platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _device() -> dict[str, Any]:
    devices = jax.devices()
    return {'platform': devices[0].platform, 'kind': devices[0].device_kind, 'count': len(devices),
            'processes': jax.process_count(), 'processor': _processor(), 'cores': len(os.sched_getaffinity(0)),
            'memory_gb': round(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9, 1),
            'system': f'{platform.system()} {platform.machine()}'}


def _processor() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(':')[2].strip() for line in lines if line.startswith('model name')),
                platform.processor() or platform.machine())


def _git() -> dict[str, Any]:
    """Of the source tree, wherever the command was started; an installed copy has none."""
    try:
        if Path(_ask('rev-parse', '--show-toplevel')).resolve() == _ROOT:
            return {'revision': _ask('rev-parse', 'HEAD'), 'dirty': bool(_ask('status', '--porcelain'))}
    except (OSError, subprocess.SubprocessError):
        pass
    return {'revision': None, 'dirty': None}


def _ask(*args: str) -> str:
    return subprocess.run(['git', '-C', str(_ROOT), *args], capture_output=True, text=True, check=True,
                          timeout=10).stdout.strip()
