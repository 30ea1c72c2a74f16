#!/usr/bin/env bash
# On one GPU, in one call: the GPU tests, the default run, and a 1B Llama with each attention backend.
#
#   bash benchmarks/one_gpu.sh [OUTPUT_FOLDER]
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-runs/one_gpu}"); mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
python3 -c 'import torch; print("torch", torch.__version__)'

echo "== pytest -m gpu"
python3 -m pytest -q -m gpu tests 2>&1 | tee "$out/pytest.log" | tail -n 30
echo "== default run"
torchrun --nproc_per_node=1 pretrain_cream.py 2>&1 | tee "$out/default.log" | tail -n 40
cp "$(ls -td runs/quickstart-* | head -n 1)/perplexity.png" "$out/"
for backend in auto sdpa flash; do
  echo "== 1B Llama, --attention-backend $backend"
  torchrun --nproc_per_node=1 pretrain_cream.py --config benchmarks/llama_1b.yaml --attention-backend $backend 2>&1 |
    tee "$out/llama_1b_$backend.log" | tail -n 14
done
