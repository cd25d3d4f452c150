#!/bin/sh
# A TPU node pool on GKE with xpk:  CLUSTER=name IMAGE=image-with-headway xpk.sh
#
# The image has this repository installed with the extra [tpu]; /mnt/share is a Filestore volume of the cluster
# (`xpk storage attach`). xpk runs the command on every host; JAX finds the others by itself.
set -eu
: "${CLUSTER:?}" "${IMAGE:?}" "${WORKLOAD:=llama31-8b}" "${ACCELERATOR:=v5litepod-256}" "${FLAGS:=}"
: "${CONFIG:=configs/pod_llama31_8b.py}" "${WORKDIR:=/mnt/share/llama31_8b}"

# A host that goes takes the slice's job with it: the job set is started again, and continues.
xpk workload create --cluster="$CLUSTER" --workload="$WORKLOAD" --tpu-type="$ACCELERATOR" --docker-image="$IMAGE" \
    --max-restarts=100 --restart-on-user-code-failure --termination-grace-period-seconds=300 \
    --command="configs/launch/until_finished.sh $WORKDIR \
headway-train --distributed --config=$CONFIG --workdir=$WORKDIR $FLAGS"
