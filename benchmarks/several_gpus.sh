# Sourced by two_gpus.sh, four_gpus.sh and eight_gpus.sh: their environment, and their program.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Multicast over NVLink needs a fabric manager that many machines do not have; it is not what is measured here.
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1 UB_SKIPMC=1
# flash-attn-4 compiles its kernels once, not once a run.
export FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8} PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# The job chooses by its flags (segments that grow, but not beside CUDA graphs).
unset PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF
benchmark() { exec python3 -m benchmarks.several_gpus "$@"; }
