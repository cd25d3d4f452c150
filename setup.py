"""Headway: language models that decode faster, in JAX, with numbers people can trust."""

import pathlib

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent

COMMANDS = ('train', 'rehearse', 'generate', 'evaluate', 'compare', 'convert', 'doctor')

setup(
    name='headway',
    version='0.1.0',
    description=__doc__,
    long_description=(HERE / 'README.md').read_text() if (HERE / 'README.md').exists() else __doc__,
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.11',
    packages=find_packages(include=['backbone*', 'harness*', 'stagformer*', 'm2r2*', 'tensorhead*', 'rad*',
                                    'sparsity*', 'pallas_kernels*', 'configs*']),
    package_data={'backbone': ['native/*.c', 'native/*.h'], 'harness': ['native/*', 'templates/*']},
    install_requires=[
        'jax>=0.10,<0.13', 'flax>=0.12', 'optax', 'scipy', 'orbax-checkpoint', 'grain', 'tensorflow-datasets',
        'absl-py', 'ml_collections', 'tokenizers', 'safetensors', 'gguf', 'tqdm', 'tensorboardX', 'matplotlib',
        'jinja2', 'importlib_resources',  # tensorflow-datasets imports it without asking for it
    ],
    extras_require={
        'eval': ['lm-eval'],
        'search': ['optuna'],
        'gpu': ['jax[cuda13]'],
        'tpu': ['jax[tpu]'],
        'oracle': ['transformers', 'torch==2.13.0', 'accelerate'],
        'dev': ['pytest', 'pytest-xdist', 'hypothesis', 'ruff', 'optuna'],
    },
    entry_points={'console_scripts': [f'headway-{c}=harness.launch.{c}:cli' for c in COMMANDS]},
)
