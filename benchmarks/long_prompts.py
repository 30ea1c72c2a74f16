"""Measure prompts of 32K to 256K tokens: prefill time, time per generated token, GPU memory.

    python benchmarks/long_prompts.py FOLDER [--config llama_1b] [--lengths 32768 65536 131072 262144]
        [--kv-cache-dtype fp8] [--model HF_FOLDER] [--new-tokens 16]

Writes a model of the recipe's shape, with random weights and linear RoPE scaling, to FOLDER in Hugging Face format and
imports it as a Megatron checkpoint; --model takes an existing model instead. The evaluation's engine for each of the two
formats reads one random prompt of each length in chunks and answers; Megatron-Core also answers without CUDA graphs. All
give the mean log-probability of the prompt's last 256 tokens; it must be the same, because positions and their angles
are. A length that does not fit into memory is reported and skipped.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # not this folder: its profile.py hides the standard library's

from megatron_cream.common import devices
from megatron_cream.patches import platform

platform.setup()  # before any import of Megatron

import torch
import yaml
from transformers import AutoModelForCausalLM

from benchmarks.shapes import llama_config
from megatron_cream.checkpoint.convert import import_hf
from megatron_cream.checkpoint.hf_folder import HfFolder
from megatron_cream.checkpoint.megatron_folder import MegatronCheckpoint
from megatron_cream.config.recipe import locate
from megatron_cream.evaluation.models.fp8_memory import KV_CACHE_DTYPES
from megatron_cream.evaluation.models.hf_model import HfModel
from megatron_cream.evaluation.models.megatron_model import MegatronModel

CUDA = devices.has_cuda()
SCORED = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--config", default="llama_1b")
    parser.add_argument("--model", type=Path, help="a Hugging Face folder, in place of a recipe and random weights")
    parser.add_argument("--layers", type=int, help="in place of the recipe's")
    parser.add_argument("--new-tokens", type=int, default=16, help="of each answer")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 65536, 131072, 262144])
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--prefill-chunk", type=int, default=4096)
    parser.add_argument("--kv-cache-dtype", choices=KV_CACHE_DTYPES, default="auto")
    args = parser.parse_args()
    hf, checkpoint = args.model, args.folder / "checkpoint"
    if hf is None:
        recipe = yaml.safe_load(locate(args.config).read_text())
        recipe["num_layers"] = args.layers or recipe["num_layers"]
        hf = make(args.folder / "hf", recipe, max(args.lengths))
    shutil.rmtree(checkpoint, ignore_errors=True)
    import_hf(HfFolder(hf), checkpoint)
    vocabulary = MegatronCheckpoint(checkpoint).shape.vocab_size
    common = dict(
        dtype=torch.bfloat16 if CUDA else torch.float32,
        prefill_chunk=args.prefill_chunk,
        kv_cache_dtype=args.kv_cache_dtype,
        tokenizer=None,
        stop_ids=frozenset(),
        max_positions=max(args.lengths),
    )
    print(
        "| engine | tokens | read in, s | tokens/s | ms each token after | a second | mean log-probability | peak GiB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for engine in args.engines:
        model = ENGINES[engine](hf, checkpoint, common)
        model.generate([list(range(64))], 16, **GREEDY)  # warm up: compile and load once
        for length in args.lengths:
            print(f"| {engine} | {length:,} | {measured(model, length, vocabulary, args.new_tokens)} |", flush=True)
        del model
        free()


ENGINES = {
    "megatron": lambda hf, checkpoint, common: MegatronModel(MegatronCheckpoint(checkpoint), **common),
    "megatron-no-graphs": lambda hf, checkpoint, common: MegatronModel(
        MegatronCheckpoint(checkpoint), cuda_graphs=False, **common
    ),
    "transformers": lambda hf, checkpoint, common: HfModel(hf, **common),
}
GREEDY = dict(temperature=0.0, top_p=1.0, seeds=[0])


def make(hf: Path, recipe: dict, longest: int) -> Path:
    """Write random weights as the Hugging Face folder `hf`."""
    scaling = {"rope_type": "linear", "factor": longest / recipe["seq_length"], "rope_theta": 10000.0}
    config = llama_config(recipe, rms_norm_eps=1e-5, max_position_embeddings=longest, rope_parameters=scaling)
    shutil.rmtree(hf, ignore_errors=True)
    torch.manual_seed(0)
    with torch.device("cuda" if CUDA else "cpu"):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(hf)
    free()
    return hf


def measured(model, length: int, vocabulary: int, new: int) -> str:
    """Measure one prompt and return the cells of its table row."""
    prompt = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(length))
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    try:
        score = float(model.log_probs(prompt, length - SCORED).mean())  # first: it loads the kernels
        started = time.monotonic()
        model.generate(prompt.tolist(), 1, **GREEDY)
        read = time.monotonic() - started
        started = time.monotonic()
        model.generate(prompt.tolist(), 1 + new, **GREEDY)
        after = (time.monotonic() - started - read) / new
    except torch.OutOfMemoryError:
        return "does not fit"
    finally:
        free()
    peak = torch.cuda.max_memory_allocated() / 2**30 if CUDA else float("nan")
    return f"{read:.2f} | {length / read:,.0f} | {1000 * after:.1f} | {1 / after:.0f} | {score:.4f} | {peak:.1f}"


def free() -> None:
    if CUDA:
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
