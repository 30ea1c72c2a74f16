#!/usr/bin/env bash
# On one GPU: the GPU tests, the default run, its evaluation, and a 1B Llama with each attention backend.
#
#   bash benchmarks/one_gpu.sh OUTPUT_FOLDER [tests|default|evaluate|llama_1b ...]    # no stage named: all
set -uo pipefail
cd "$(dirname "$0")/.." || exit
out=$(realpath -m "${1:?usage: one_gpu.sh OUTPUT_FOLDER [STAGE ...]}"); shift
[ $# -gt 0 ] || set -- tests default evaluate llama_1b
mkdir -p "$out"
launch() { python3 -m torch.distributed.run --nproc_per_node=1 pretrain_cream.py "$@"; }

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
python3 -c 'import torch; print("torch", torch.__version__)'
for stage in "$@"; do
  case $stage in
  tests)
    echo "== pytest -m gpu"
    python3 -m pytest -q -m gpu tests 2>&1 | tee "$out/pytest.log" | tail -n 60
    ;;
  default)
    echo "== default run"
    { time launch; } 2>&1 | tee "$out/default.log" | tail -n 42
    cp "$(ls -td runs/quickstart-* | head -n 1)/perplexity.png" "$out/"
    ;;
  evaluate)  # the model that the default run left, as it is and as a Hugging Face folder
    model=$(ls -td runs/quickstart-* | head -n 1)/cream
    python3 tools/convert_hf.py export --checkpoint "$model" --hf-path "$out/hf" --overwrite 2>&1 | tail -n 2
    cp "$(python3 -c 'import _pydecimal; print(_pydecimal.__file__)')" "$out/text.txt"
    for from in "$model" "$out/hf"; do
      echo "== evaluation of $from"
      results="$out/evaluation/$(basename "$from")"
      python3 tools/evaluate.py perplexity --model "$from" --dataset "$out/text.txt" --lengths 256 1024 2048 \
        --output "$results/perplexity" 2>&1 | tail -n 12
      python3 tools/evaluate.py needle --model "$from" --min-length 512 --max-length 2048 --length-steps 3 \
        --depth-steps 3 --output "$results/needle" 2>&1 | tail -n 12
    done
    ;;
  llama_1b)
    for backend in flash te sdpa; do
      echo "== 1B Llama, --attention-backend $backend"
      launch --config llama_1b --attention-backend $backend 2>&1 |
        tee "$out/llama_1b_$backend.log" | tail -n 12
    done
    ;;
  esac
done
