"""Hardware that is not here: devices of a named topology, made by the real compiler on a CPU host.

The TPU compiler is the library libtpu. Where it can be imported, JAX tries to start it in every process, slowly and
loudly where there is no TPU; so `make setup` keeps it in a folder of its own, and only this module looks there.
The GPU compiler is JAX's CUDA plugin with NVIDIA's assembler; no GPU and no driver is needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
import sys
from pathlib import Path

import jax
from jax.experimental import topologies

from backbone.errors import CompilerMissing, ConfigError
from harness.roofline import DEVICES, Device

EXAMPLES = 'v5e:2x2, v5e:4x4, v5e:16x16, v5p:2x2x1, v5p:4x4x4, v6e:4x4, h200:1'
SIDE_FOLDER = Path(sys.prefix) / 'tpu-compiler'  # filled by make setup; `unavailable.txt` in it says why it is not
GPU_FOLDER = Path(sys.prefix) / 'gpu-compiler'  # filled by make gpu-compiler
GPU_PACKAGES = (f'jax-cuda12-plugin=={jax.__version__}', f'jax-cuda12-pjrt=={jax.__version__}', *(
    f'nvidia-{name}-cu12' for name in ('cuda-nvcc', 'cuda-nvrtc', 'cuda-cupti', 'nvjitlink', 'cuda-runtime')))
_TPUS = {'v5e': 'tpu-v5e', 'v5p': 'tpu-v5p', 'v6e': 'tpu-v6e'}


def get(name: str) -> tuple[list[jax.Device], Device]:
    """The chips of a topology and the description of one. Nothing can run on them; programs compile for them.

    Errors: ConfigError for a name that is no topology; CompilerMissing says what to install.
    """
    found = re.fullmatch(r'(\w+):(\d+(?:x\d+)*)', name)
    if found is None or found[1] not in (*_TPUS, 'h100', 'h200'):
        raise ConfigError(f'topology: {name!r} is not one of a known kind; examples: {EXAMPLES}')
    kind, shape = found[1], tuple(map(int, found[2].split('x')))
    if kind in _TPUS:
        return _tpu(name, shape), DEVICES[_TPUS[kind]]
    chip = DEVICES[kind]
    if math.prod(shape) > _GPUS_PER_HOST:  # the slowest way between two of them is the network
        chip = dataclasses.replace(chip, link_bytes_per_s=_NETWORK_BYTES_PER_S)
    return _gpu(kind, shape), chip


def _tpu(name: str, shape: tuple[int, ...]) -> list[jax.Device]:
    options = {'chips_per_host_bounds': (*shape, 1, 1)[:3]} if math.prod(shape) < 4 else {}  # less than a host
    with _quiet():
        os.environ['TPU_LIBRARY_PATH'] = str(library())
        try:
            return list(topologies.get_topology_desc(platform='tpu', topology_name=name, **options).devices)
        except Exception as error:  # jaxlib's own error types differ between versions
            raise ConfigError(f'topology: {name!r}: {error} (examples: {EXAMPLES})') from error


def library() -> Path:
    """libtpu.so: of $TPU_LIBRARY_PATH, the installed package, or the side folder. Errors: CompilerMissing."""
    places = [Path(os.environ.get('TPU_LIBRARY_PATH', '/nowhere')), SIDE_FOLDER / 'libtpu' / 'libtpu.so']
    if spec := importlib.util.find_spec('libtpu'):
        places.insert(1, Path(spec.origin).parent / 'libtpu.so')
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        note = SIDE_FOLDER / 'unavailable.txt'
        reason = f' (make setup could not install it: {note.read_text().strip()})' if note.is_file() else ''
        raise CompilerMissing(f'the TPU compiler is not installed{reason}; `make setup` does it, or: '
                              f'{sys.executable} -m pip install --no-deps --target {SIDE_FOLDER} "{_wanted()}"')
    return found


def _wanted() -> str:
    """The libtpu this jax goes with, as its extra [tpu] says."""
    needs = importlib.metadata.requires('jax') or ()
    return next((need.partition(';')[0].strip() for need in needs if need.startswith('libtpu')), 'libtpu')


@contextlib.contextmanager
def _quiet():
    """libtpu looks for the TPU host it runs on, and complains about each thing it does not find."""
    settings = {'TPU_SKIP_MDS_QUERY': '1', 'TPU_ACCELERATOR_TYPE': 'v5litepod-4', 'TPU_WORKER_HOSTNAMES': 'localhost',
                'TPU_LOG_DIR': 'disabled', 'TPU_LIBRARY_PATH': '',
                'ALLOW_MULTIPLE_LIBTPU_LOAD': 'true'}  # no chip is opened: nothing to lock
    before = {key: os.environ.get(key) for key in settings}
    os.environ.update({key: value for key, value in settings.items() if not before[key]})
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


# What XLA asks of a GPU that is there: CUDA's cudaDeviceProp of a Hopper SXM module. The compiler tiles by it.
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  core_count: 132  fpus_per_core: 128  l2_cache_size: 52428800  clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth:.0f}  device_memory_size: {memory:.0f}
  cuda_compute_capability {{ major: 9 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{name}"
"""
_GPUS_PER_HOST = 8
_NETWORK_BYTES_PER_S = 50e9  # one 400 Gb/s port a GPU, NVIDIA DGX H100 and H200 data sheets; other clusters differ


def _gpu(kind: str, shape: tuple[int, ...]) -> list[jax.Device]:
    count, chip = math.prod(shape), DEVICES[kind]
    hosts, left = divmod(count, _GPUS_PER_HOST)
    if hosts and left:
        raise ConfigError(f'topology: {kind}:{count} is more than one host of {_GPUS_PER_HOST} and not whole hosts')
    if (GPU_FOLDER / 'jax_plugins').is_dir() and str(GPU_FOLDER) not in sys.path:
        sys.path.append(str(GPU_FOLDER))
    plugins = ('xla_cuda12', 'xla_cuda13') if importlib.util.find_spec('jax_plugins') else ()
    if not any(importlib.util.find_spec(f'jax_plugins.{name}') for name in plugins):
        raise CompilerMissing('the GPU compiler is not installed; `make gpu-compiler` does it, or: '
                              f'{sys.executable} -m pip install --no-deps --target {GPU_FOLDER} '
                              + ' '.join(GPU_PACKAGES))
    runtime = GPU_FOLDER / 'jax_cuda12_plugin' / 'libmosaic_gpu_runtime.so'
    if runtime.is_file():  # Pallas' kernels are linked against it; JAX looks for it once, before this folder is known
        os.environ.setdefault('MOSAIC_GPU_RUNTIME_LIB_PATH', str(runtime))
    config = _HOPPER.format(bandwidth=chip.memory_bytes_per_s, memory=chip.memory_bytes, name=f'NVIDIA {kind.upper()}')
    try:
        return list(topologies.get_topology_desc(
            kind, platform='cuda', topology=f'1x{hosts or 1}x{_GPUS_PER_HOST if hosts else count}',
            target_config=config).devices)
    except Exception as error:  # jaxlib's own error types differ between versions
        raise ConfigError(f'topology: {kind}:{count}: {error} (examples: {EXAMPLES})') from error
