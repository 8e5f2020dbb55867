#!/bin/sh
# scripts/launch_tpu_vm.sh NAME ZONE ARGS: one training run on all workers of a TPU VM or pod slice.
#
#   scripts/launch_tpu_vm.sh my-v5p us-east5-a --config configs/tiny.py --workdir /mnt/shared/tiny
#
# Each worker has this repository in $MOEJAX_DIR (default: moejax in its home), and the workdir is a folder that all
# of them mount (Filestore, gcsfuse). JAX finds out by itself which worker it is on. Ctrl-C here does not end the run.
# Not yet run on such a cluster.
set -eu

[ $# -ge 3 ] || { sed -n '2,4s/^# \{0,1\}//p' "$0" >&2; exit 2; }
name=$1 zone=$2
shift 2

arguments=
for argument; do  # quoted once more, for the shell of the workers
  arguments="$arguments '$(printf %s "$argument" | sed "s/'/'\\\\''/g")'"
done
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="
  cd ${MOEJAX_DIR:-moejax} &&
  MOEJAX_EXTRAS=tpu,data scripts/python -m experiments.train $arguments --coordinator=auto"
