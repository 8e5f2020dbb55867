#!/bin/sh
# scripts/launch_gke.sh ARGS: what each pod of a GKE Job runs, for one training run in all of them.
#
#   command: ["scripts/launch_gke.sh", "--config", "configs/tiny.py", "--workdir", "/shared/tiny"]
#
# In TPU node pools GKE sets TPU_WORKER_HOSTNAMES and TPU_WORKER_ID, and JAX reads them. Elsewhere the Job is indexed,
# which sets JOB_COMPLETION_INDEX, and its manifest sets
#   COORDINATOR    HOST:PORT of the pod with index 0, such as train-0.train:1234 with the headless service `train`
#   NUM_PROCESSES  as many as `completions`
# The workdir is a volume that all pods mount.
# Not yet run on such a cluster.
set -eu

cd "$(dirname "$0")/.."
if [ -n "${TPU_WORKER_HOSTNAMES-}" ]; then
  export MOEJAX_EXTRAS="${MOEJAX_EXTRAS:-tpu,data}"
  set -- "$@" --coordinator=auto
else
  export MOEJAX_EXTRAS="${MOEJAX_EXTRAS:-cuda,data}"
  set -- "$@" \
    --coordinator="${COORDINATOR:?is the HOST:PORT of the first pod}" \
    --num_processes="${NUM_PROCESSES:?is the number of pods}" \
    --process_id="${JOB_COMPLETION_INDEX:?is set by GKE in pods of an indexed Job}"
fi
exec scripts/python -m experiments.train "$@"
