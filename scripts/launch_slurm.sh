#!/bin/sh
# sbatch [OPTIONS] scripts/launch_slurm.sh ARGS: one training run on the nodes of a SLURM job, a process for each GPU.
#
#   sbatch --nodes=2 scripts/launch_slurm.sh --config configs/tiny.py --workdir /shared/tiny
#
# Submit it from the root of the repository, which all nodes see, as they see the workdir; run `MOEJAX_EXTRAS=cuda,data
# scripts/python -c ''` there once before. JAX reads SLURM's variables, and each process takes the GPU of its own
# local number. At the time limit SLURM sends SIGTERM two minutes early: the run saves and ends, and the same command
# goes on from there.
# Not yet run on such a cluster.
#SBATCH --job-name=moejax
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --signal=TERM@120
set -eu

cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch}"
export MOEJAX_EXTRAS="${MOEJAX_EXTRAS:-cuda,data}"
exec srun --kill-on-bad-exit=1 scripts/python -m experiments.train "$@" --coordinator=auto
