#!/usr/bin/env bash
# What one GPU cannot stand for, on two: the default run, losses of every layout, a full 7B, full length, kills.
#
#   bash benchmarks/two_gpus.sh OUTPUT_FOLDER [default|parity|faults|7b|full ...]    # no stage named: all
#
# A run whose figures are in OUTPUT_FOLDER already is not made again, so the same command goes on where it was
# stopped. Flags after -- go to every run of parity, 7b and full.
set -euo pipefail
cd "$(dirname "$0")/.."
# Multicast over NVLink needs a fabric manager that many machines do not have; it is not what is measured here.
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1 UB_SKIPMC=1
# flash-attn-4 compiles its kernels once, not once a run.
export FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
# The job chooses by its flags (segments that grow, but not beside CUDA graphs).
unset PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF
exec python3 benchmarks/two_gpus.py "$@"
