"""Write a GGUF file as a Hugging Face folder in bf16: dequantise.py FILE FOLDER (needs gguf and accelerate)."""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

file, folder = Path(sys.argv[1]), sys.argv[2]
model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
# The weights are dequantised now, but transformers would still save them as those of a quantised model.
model.hf_quantizer, model.is_quantized = None, False
del model.config.quantization_config
model.to(torch.bfloat16).save_pretrained(folder)
AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
