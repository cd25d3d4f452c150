"""Makes the environment of `make peers`: python scripts/peers/setup.py .venv-peers

torch and transformers come as wheels; llama-cpp-python is built from source where a C++ compiler is, for this
processor, and left out with a note where that fails. Nothing of this is ever imported by Headway.
"""

import os
import pathlib
import subprocess
import sys
import venv

WHEELS = ['torch==2.13.0', 'transformers==5.23.0', 'safetensors', 'numpy']
LLAMA = 'llama-cpp-python==0.3.36'
CMAKE = '-DGGML_NATIVE=ON -DGGML_OPENMP=OFF -DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF'


def main(folder):
    python = pathlib.Path(folder) / 'bin' / 'python'
    if not python.exists():
        venv.create(folder, with_pip=True)
    pip = [str(python), '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check']
    subprocess.run([*pip, *WHEELS], check=True)
    if subprocess.run([str(python), '-c', 'import llama_cpp'], capture_output=True).returncode:
        print('building llama.cpp (some minutes) ...', flush=True)
        built = subprocess.run([*pip, '--no-binary', 'llama-cpp-python', LLAMA], capture_output=True, text=True,
                               env=os.environ | {'CMAKE_ARGS': CMAKE})
        if built.returncode:
            last = (built.stderr.strip().splitlines() or ['pip said nothing'])[-1]
            print(f'llama.cpp does not build here and is left out: {last}')


if __name__ == '__main__':
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
