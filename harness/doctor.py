"""Looks at everything a run needs and says, for what is wrong, how to mend it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import pathlib
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable

import jax

from backbone import catalogue, native
from backbone.mesh import make_mesh
from backbone.native.build import NoCompiler
from harness import bandwidth, compilation

# Lower bounds of what the code uses; the upper one is where an untested JAX begins.
NEEDED = {'jax': ('0.10', '0.13'), 'flax': ('0.12', None), 'ml_collections': ('1.0', None), 'numpy': ('2.0', None),
          'tokenizers': ('0.20', None), 'safetensors': ('0.5', None), 'gguf': ('0.17', None),
          'matplotlib': ('3.8', None), 'jinja2': ('3.1', None), 'absl-py': ('2.1', None), 'tqdm': ('4.60', None)}
MIN_FREE_GB = 3.0  # SmolLM2 with its dequantised copy, the questions and the compiled programs


@dataclasses.dataclass(frozen=True)
class Check:
    """state: 'ok', 'note' (works, but slower or not at all in part) or 'wrong'. mend: what to do about it."""

    name: str
    state: str
    found: str
    mend: str = ''


def examine(*, workdir: str | os.PathLike = 'out', models: tuple[str, ...] = ()) -> list[Check]:
    """Every check, in the order a run would meet them. models: catalogue keys whose files are rehashed if present."""
    checks: list[Callable[[], Check]] = [python, packages, devices, memory, mesh, compiler, cache_folder, disk,
                                         compiled_programs, lambda: output_folder(workdir)]
    checks += [lambda key=key: model(key) for key in models or DEFAULT_MODELS]
    return [_guarded(check) for check in checks]


DEFAULT_MODELS = ('smollm2-135m', 'mt_bench')


def _guarded(check: Callable[[], Check]) -> Check:
    """A check that fails to run is a finding, not a traceback."""
    try:
        return check()
    except Exception as error:  # whatever it is, the doctor says it and goes on
        name = getattr(check, '__name__', 'check').strip('<>').replace('_', ' ')
        return Check(name, 'wrong', f'{type(error).__name__}: {error}', 'this check itself failed: report it')


def python() -> Check:
    return Check('python', 'ok', f'{platform.python_version()} at {sys.executable}')  # an older one cannot import this


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split('.')[:3] if part.isdigit())


def packages() -> Check:
    wrong, found = [], []
    for name, (low, high) in NEEDED.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f'{name} is missing')
            continue
        found.append(f'{name} {version}')
        if _version(version) < _version(low) or (high and _version(version) >= _version(high)):
            wrong.append(f'{name} is {version}, needed is >={low}' + (f',<{high}' if high else ''))
    if wrong:
        return Check('packages', 'wrong', '; '.join(wrong), 'make setup (or pip install -e .)')
    return Check('packages', 'ok', ', '.join(found))


def devices() -> Check:
    try:
        found = jax.devices()
    except RuntimeError as error:
        return Check('devices', 'wrong', str(error), 'JAX_PLATFORMS=cpu runs on the processor; for an accelerator '
                     'install the extra that fits it: pip install headway[gpu] or headway[tpu]')
    text = f'{len(found)} {found[0].platform}: {found[0].device_kind}, {bandwidth.cpu_threads()} cores for this process'
    if found[0].platform == 'cpu' and shutil.which('nvidia-smi'):
        return Check('devices', 'note', text, 'an NVIDIA driver is here but JAX runs on the processor: '
                     'pip install headway[gpu], or unset JAX_PLATFORMS')
    return Check('devices', 'ok', text)


def memory() -> Check:
    stats = jax.local_devices()[0].memory_stats() or {}
    if 'bytes_limit' in stats:
        return Check('memory', 'ok', f'{stats["bytes_limit"] / 1e9:.1f} GB on the device')
    free = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_AVPHYS_PAGES') / 1e9
    total = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9
    text = f'{free:.1f} of {total:.1f} GB free'
    if total < 4:
        return Check('memory', 'note', text, 'the default comparison needs about 4 GB: '
                     'compare one type, --config.dtypes="(\'float32\',)"')
    return Check('memory', 'ok', text)


def mesh() -> Check:
    made = make_mesh(data=len(jax.devices()))
    return Check('mesh', 'ok', ' x '.join(f'{name} {size}' for name, size in made.shape.items()))


def compiler() -> Check:
    problem = native.problem()
    try:
        bandwidth.native_gemv()
    except NoCompiler as error:
        problem = problem or str(error)
    if problem:
        return Check('c compiler', 'note', problem, 'decoding falls back to slower products and the floor to numpy\'s: '
                     'install a C compiler (apt install gcc), or set CC')
    return Check('c compiler', 'ok', 'native products built')


def _writable(folder: pathlib.Path) -> str | None:
    """Why nothing can be written to `folder`; None where it can. Makes the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)


def cache_folder() -> Check:
    folder = catalogue.cache_dir()
    problem = _writable(folder)
    if problem:
        return Check('cache', 'wrong', f'{folder}: {problem}', 'set HEADWAY_CACHE to a folder you may write to')
    return Check('cache', 'ok', f'{folder} is writable')


def disk() -> Check:
    folder = catalogue.cache_dir()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 1e9
    if free < MIN_FREE_GB:
        return Check('disk', 'wrong', f'{free:.1f} GB free under {folder}',
                     f'free {MIN_FREE_GB:.0f} GB, or set HEADWAY_CACHE to a larger disk')
    return Check('disk', 'ok', f'{free:.1f} GB free under {folder}')


def compiled_programs() -> Check:
    folder = compilation.folder()
    problem = _writable(folder)
    if problem:
        return Check('compilation cache', 'note', f'{folder}: {problem}',
                     'every start compiles anew: set JAX_COMPILATION_CACHE_DIR to a folder you may write to')
    files = sum(1 for f in folder.iterdir() if f.is_file())
    return Check('compilation cache', 'ok', f'{folder}, {files} files')


def output_folder(workdir: str | os.PathLike) -> Check:
    folder = pathlib.Path(workdir)
    existed = folder.exists()
    problem = _writable(folder)
    if not existed and not problem:
        folder.rmdir()
    if problem:
        return Check('workdir', 'wrong', f'{folder.absolute()}: {problem}', 'give another one with --workdir')
    return Check('workdir', 'ok', f'{folder.absolute()} is writable')


def model(key: str) -> Check:
    """Rehashes the files of a catalogue entry that are in the cache; absent ones are no fault."""
    if key not in catalogue.ENTRIES:
        return Check(key, 'wrong', 'not in the catalogue', 'python -m backbone.catalogue list')
    problems = catalogue.verify(key)
    if not problems:
        return Check(key, 'ok', f'hashes are right: {catalogue.ENTRIES[key].path(catalogue.cache_dir() / key)}')
    fetch = f'python -m backbone.catalogue fetch {key}'
    if set(problems.values()) == {'missing'}:
        return Check(key, 'note', 'not fetched yet', f'{fetch}, or any run that uses it')
    found = '; '.join(f'{catalogue.cache_dir() / key / name} {problem}' for name, problem in problems.items())
    return Check(key, 'wrong', found, f'{fetch} fetches it anew')


def table(checks: list[Check]) -> str:
    """One line a check, and one under it that says what to do where something is."""
    width = max(len(c.name) for c in checks)
    lines = []
    for c in checks:
        lines.append(f'{c.state:5}  {c.name:{width}}  {c.found}')
        if c.mend:
            lines.append(f'{"":5}  {"":{width}}  -> {c.mend}')
    wrong = sum(c.state == 'wrong' for c in checks)
    lines.append('everything a run needs is here' if not wrong else f'{wrong} of {len(checks)} checks found a fault')
    return '\n'.join(lines)
