#!/usr/bin/env bash
# Starts one run on a SLURM cluster of GPUs, one process for each GPU, and prints what it runs.
#
#   sbatch --nodes=16 --gpus-per-node=8 --ntasks-per-node=8 --time=24:00:00 --signal=TERM@300 \
#       --requeue experiments/launch/slurm.sh CONFIG [arguments of experiments.train]
#
# Submit from this checkout, on a file system that all nodes share, with a virtual environment
# .venv in which 'jax[cuda13]' is installed. The run's folder is there too, or in a bucket (--folder
# gs://BUCKET/FOLDER, extra buckets, GOOGLE_APPLICATION_CREDENTIALS as for any client). The processes find each other through SLURM's
# environment. Five minutes before its time is over the run gets SIGTERM, saves and ends with
# status 0; the same command goes on from there, and --requeue does so after a node fails.
#SBATCH --job-name=occ-jax
#SBATCH --output=runs/slurm-%j.log
#SBATCH --open-mode=append
set -euo pipefail

if [ $# -lt 1 ] || [ -z "${SLURM_JOB_ID:-}" ]; then
  sed -n '2,/^#SBATCH/p' "$0" | sed '$d; s/^# \{0,1\}//' >&2
  exit 2
fi
set -x
exec srun --kill-on-bad-exit=1 .venv/bin/python -m experiments.train "$@" --distributed
