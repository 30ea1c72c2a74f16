"""Measure one long prompt on a Llama-2-7B that several GPUs share: prefill time, time per token, memory.

    torchrun --nproc_per_node=4 benchmarks/long_ranks.py --tensor-model-parallel-size 4 [--length 262144]
    torchrun --nproc_per_node=4 benchmarks/long_ranks.py --context-parallel-size 4

The weights are random, with linear RoPE scaling; each rank makes its own part of them, so that no file is needed. Both
layouts must give the same loss of the prompt's last tokens; in bf16 random weights can give other answers.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # not this folder: its profile.py hides the standard library's

from megatron_cream.common import devices
from megatron_cream.patches import platform

platform.setup()  # before any import of Megatron

import torch

from benchmarks.shapes import llama_config
from megatron_cream.checkpoint.families import shape_from_config
from megatron_cream.checkpoint.model import Group
from megatron_cream.distributed import rendezvous
from megatron_cream.evaluation.models.megatron_model import MegatronModel

CUDA = devices.has_cuda()
WINDOW = 4096
NEW = 16
SCORED = 256
"""Tokens at the end of the prompt whose mean loss is given."""
GREEDY = dict(temperature=0.0, top_p=1.0, seeds=[0])
SEVEN_B = dict(vocab_size=32000, hidden_size=4096, ffn_hidden_size=11008, num_layers=32, num_attention_heads=32)


class RandomWeights:
    """Weights that are the same on each rank.

    Args:
        recipe: the model's shape.
        longest: tokens of its window.
    """

    def __init__(self, recipe: dict, longest: int):
        scaling = {"rope_type": "linear", "factor": longest / WINDOW, "rope_theta": 10000.0}
        config = llama_config(recipe, rms_norm_eps=1e-5, max_position_embeddings=longest, rope_parameters=scaling)
        self.shape = shape_from_config(config.to_dict(), Path("config.json"))
        self._noise = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()

    def read(self, row, layer: int | None, out: torch.Tensor) -> torch.Tensor:
        if out.dim() == 1:
            return out.fill_(1)
        for part in out.view(-1).split(len(self._noise)):
            part.copy_(self._noise[: len(part)])
        return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--context-parallel-size", type=int, default=1)
    parser.add_argument("--length", type=int, default=262144)
    parser.add_argument("--layers", type=int, default=SEVEN_B["num_layers"])
    parser.add_argument("--prefill-chunk", type=int, default=4096)
    args = parser.parse_args()
    if args.length < WINDOW:
        parser.error(f"--length {args.length}: must be at least {WINDOW}, the window that is extended")
    if CUDA:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    rank = int(os.environ["RANK"])
    sizes = dict(tensor=args.tensor_model_parallel_size, context=args.context_parallel_size)
    model = MegatronModel(
        RandomWeights(SEVEN_B | {"num_layers": args.layers}, args.length),
        dtype=torch.bfloat16 if CUDA else torch.float32,
        prefill_chunk=args.prefill_chunk,
        tokenizer=None,
        stop_ids=frozenset(),
        max_positions=args.length,
        group=Group(rendezvous.open_store(), rank, **sizes),
    )
    prompt = torch.randint(5, 31000, (args.length - NEW,), generator=torch.Generator().manual_seed(1)).tolist()
    model.generate([prompt[: 2 * args.prefill_chunk]], 2, **GREEDY)  # warm up: kernels and communicators
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    read, _ = _timed(model, prompt, 1)
    both, answer = _timed(model, prompt, 1 + NEW)
    peak = round(torch.cuda.max_memory_allocated() / 2**30, 2) if CUDA else None  # of answering, not of the loss
    loss = -model.log_probs(torch.tensor([prompt]), args.length - NEW - SCORED).mean().item()
    if rank == 0:
        found = dict(
            gpu=torch.cuda.get_device_name() if CUDA else "CPU",
            **sizes,
            length=args.length,
            seconds_to_read=round(read, 2),
            ms_each_token_after=round(1000 * (both - read) / NEW, 1),
            peak_gib=peak,
            loss=round(loss, 4),
            answer=answer,
        )
        print(json.dumps(found), flush=True)


def _timed(model: MegatronModel, prompt: list[int], new: int) -> tuple[float, list[int]]:
    """Return the seconds and the tokens of an answer of `new` tokens."""
    started = time.monotonic()
    answer = model.generate([prompt], new, **GREEDY)[0]
    return time.monotonic() - started, answer


if __name__ == "__main__":
    main()
