#!/bin/sh
# One host, all its GPUs in one process:  CONFIG=configs/base_135m.py WORKDIR=out/base_135m gpu_host.sh
set -eu
: "${CONFIG:=configs/base_135m.py}" "${WORKDIR:=out/base_135m}" "${FLAGS:=}"

# JAX takes 75 % of the memory of a GPU unless told otherwise.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
# data=-1: as many as there are GPUs.
exec "$(dirname "$0")/until_finished.sh" "$WORKDIR" .venv/bin/headway-train --config="$CONFIG" --workdir="$WORKDIR" \
    --config.mesh.data=-1 $FLAGS
