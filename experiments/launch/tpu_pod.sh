#!/usr/bin/env bash
# Starts one run on every host of a TPU pod slice, and prints what it runs.
#
#   experiments/launch/tpu_pod.sh NAME ZONE CONFIG [arguments of experiments.train]
#
#   experiments/launch/tpu_pod.sh v5p-128-a us-east5-a mimo_7b_dapo --regime occ_paper \
#       --folder gs://my-bucket/mimo-occ
#
# Each host needs this checkout in ~/occ-jax with a virtual environment .venv, installed by
#   pip install -e '.[experiments,buckets]' 'jax[tpu]'
# The run folder is in a bucket that the pod's service account may write (storage.objectUser), or on
# a file system that all hosts see at the same path; in a bucket, starting points and compiled
# programs lie beside the run's folder, here in gs://my-bucket. The processes find each other
# through the pod's own metadata. The same command goes on after a preemption.
set -euo pipefail

if [ $# -lt 3 ]; then
  sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//' >&2
  exit 2
fi
name=$1 zone=$2
shift 2
printf -v arguments ' %q' "$@"
command="cd ~/occ-jax && exec .venv/bin/python -m experiments.train$arguments --distributed"
set -x
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$command"
