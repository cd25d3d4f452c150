#!/bin/sh
# A Cloud TPU slice with gcloud:  TPU=name ZONE=us-west4-a ACCELERATOR=v5litepod-256 tpu_vm.sh create|setup|train|delete
#
# WORKDIR must be the same directory on every host: a Filestore or other NFS share, mounted by `setup` from NFS.
set -eu
: "${TPU:=headway}" "${ZONE:=us-west4-a}" "${ACCELERATOR:=v5litepod-256}" "${RUNTIME:=v2-alpha-tpuv5-lite}"
: "${CONFIG:=configs/pod_llama31_8b.py}" "${NFS:=10.0.0.2:/share}" "${WORKDIR:=/mnt/share/llama31_8b}"
: "${REPOSITORY:=https://github.com/YOU/headway}" "${FLAGS:=}"

everywhere() {
    gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

case $1 in
    create) gcloud compute tpus tpu-vm create "$TPU" --zone="$ZONE" --accelerator-type="$ACCELERATOR" \
                --version="$RUNTIME" ;; # --spot for capacity that may be taken back
    # The runtime's own Python is older than 3.11. On a TPU host libtpu belongs among the packages.
    setup) everywhere "sudo apt-get install -y -q nfs-common && sudo mkdir -p /mnt/share &&
                sudo mount $NFS /mnt/share && git clone $REPOSITORY headway && cd headway &&
                pip install --user uv && ~/.local/bin/uv python install 3.12 &&
                make setup PYTHON=\$(~/.local/bin/uv python find 3.12) &&
                .venv/bin/pip install -r requirements/tpu_py312.txt requests" ;;
    train) everywhere "cd headway && configs/launch/until_finished.sh $WORKDIR \
                .venv/bin/headway-train --distributed --config=$CONFIG --workdir=$WORKDIR $FLAGS" ;;
    delete) gcloud compute tpus tpu-vm delete "$TPU" --zone="$ZONE" --quiet ;;
    *) echo "unknown step '$1', one of create, setup, train, delete" >&2; exit 2 ;;
esac
