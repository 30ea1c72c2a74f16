"""Compare training steps of this project and of common alternatives: tokens/s, MFU, peak memory, ratios.

    python benchmarks/train_step.py OUTPUT_FOLDER [--config llama_7b_width] [--rows flash liger ...]

Each row is a separate process, one after the other, on one GPU; `--rounds` repeats the whole list. This project
and Megatron run through Megatron's trainer, data loader and distributed optimizer, with float32 master weights
and gradients, on real text and CREAM's positions (plain ones for Megatron's own model). The transformers loops
keep everything in bf16 and train on random tokens. A row's figure is the median over its steps after the first
`--warmup`. MFU counts 6 x parameters in matrix products + 6 x layers x sequence x hidden FLOPs per token, against the
GPU's dense bf16 peak. A second table has ratios of tokens/s between two rows of the same round: median over the rounds,
smallest and largest. If a row fails, its last lines are printed and the other rows still run.

With --config llama_7b_lora, compare the rows flash, flash-only, peft and peft-recompute: all train the same adapters,
embeddings and norms of a whole 7B with random weights.

All rows but auto run without CUDA graphs, unless the flags `--cuda-graph-impl local --te-rng-tracker` are given.

Other flags set sizes and layout (`--config llama_3b --micro-batch-size 4 --global-batch-size 16`); `--gpus 2` gives
this project's rows and Megatron's more GPUs.
"""

import argparse
import itertools
import json
import os
import re
import runpy
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # not this folder: its profile.py hides the standard library's

from benchmarks.stopping import leave_no_ranks
from megatron_cream.config.recipe import locate

# name: (description, kind for `child`, its flags)
ROWS = {
    "flash": ("this project, Transformer Engine's layers, flash-attn-4", "ours", ["--attention-backend", "flash"]),
    "te": ("this project, Transformer Engine's layers and attention", "ours", ["--attention-backend", "te"]),
    "flash-only": (
        "this project, without Transformer Engine, flash-attn-4",
        "without",
        ["--attention-backend", "flash"],
    ),
    "torch-only": ("this project, nothing but torch", "without", ["--attention-backend", "sdpa"]),
    "megatron-te": ("megatron-core + Transformer Engine", "megatron", []),
    "transformers": ("transformers, sdpa, fused AdamW, all in bf16", "transformers", []),
    "liger": ("the same + liger-kernel", "liger", []),
}
FP8 = "--fp8-format hybrid --fp8-recipe delayed --fp8-amax-history-len 16 --fp8-amax-compute-algo max".split()
RECIPES = {
    "tensorwise": "--fp8-format hybrid --fp8-recipe tensorwise".split(),  # each tensor scaled by its current maximum
    "blockwise": "--fp8-format e4m3 --fp8-recipe blockwise".split(),  # 128 x 128 of a weight, 1 x 128 of an input
}
ROWS |= {
    "flash-plain": (
        "this project, Transformer Engine's layers, flash-attn-4, plain positions",
        "ours",
        ["--attention-backend", "flash", "--position-sampler", "pi"],
    ),
    "flash-fp8": ("this project, FP8 delayed scaling, flash-attn-4", "ours", ["--attention-backend", "flash", *FP8]),
    "megatron-te-fp8": ("megatron-core + Transformer Engine, FP8 delayed scaling", "megatron", FP8),
    **{
        f"flash-fp8-{name}": (
            f"this project, FP8 {name} scaling, flash-attn-4",
            "ours",
            ["--attention-backend", "flash", *flags],
        )
        for name, flags in RECIPES.items()
    },
    **{
        f"megatron-te-fp8-{name}": (f"megatron-core + Transformer Engine, FP8 {name} scaling", "megatron", flags)
        for name, flags in RECIPES.items()
    },
    "auto": ("this project, as it is installed, attention as measured", "ours", []),
    "peft": ("transformers + peft + liger-kernel, all in bf16", "peft", []),
    "peft-recompute": ("the same with gradient checkpointing", "peft-recompute", []),
    "compile": ("transformers + torch.compile", "compile", []),
    "compile-fp8": ("transformers + torch.compile + torchao float8 (tensorwise)", "compile-fp8", []),
}


def main() -> None:
    if sys.argv[1:2] == ["child"]:
        return child(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--config", default="llama_7b_width")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--warmup", type=int, default=8)
    parser.add_argument("--gpus", type=int, default=1, help="of one host; rows of transformers use the first")
    args, flags = parser.parse_known_args()
    leave_no_ranks()
    args.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict]] = {}
    for round_ in range(args.rounds):
        for row in args.rows:
            started = time.monotonic()
            text, error = run(row, args, flags, args.output / f"{row}.{round_}.log")
            steps = [(float(m[1].replace(",", "")), float(m[2])) for m in STEP.finditer(text)][args.warmup :]
            losses = [float(x) for x in re.findall(r"\| loss ([\d.]+)", text)]
            measured = None
            if steps:
                rate, mfu = (statistics.median(values) for values in zip(*steps, strict=True))
                peak = max(float(x) for x in re.findall(r"([\d.]+) GiB", text))
                measured = dict(round=round_, rate=rate, mfu=mfu, peak=peak, loss=losses[-1])
                results.setdefault(row, []).append(measured | {"losses": losses})
            seconds = time.monotonic() - started
            print(f"{row:16} {measured or 'failed: ' + error}  ({seconds:.0f} s)", flush=True)
            if layout := re.search(r"^layout  .*", text, re.MULTILINE):
                print(f"{'':16} {layout[0]}", flush=True)
    (args.output / "results.json").write_text(json.dumps(results))
    print("\n| row | tokens/s | MFU | peak GiB | loss, last tenth of the steps |\n|---|---|---|---|---|")
    for row, values in results.items():
        rate, mfu = (statistics.median(v[key] for v in values) for key in ("rate", "mfu"))
        peak, losses = max(v["peak"] for v in values), values[-1]["losses"]
        loss = statistics.mean(losses[-max(len(losses) // 10, 1) :])
        print(f"| {ROWS[row][0]} | {rate:,.0f} | {mfu:.1f} % | {peak:.1f} | {loss:.3f} |")
    print("\n| row | beside | tokens/s, ratio of the same round: median (smallest to largest) |\n|---|---|---|")
    for row, other in itertools.product(results, (name for name in BESIDE if name in results)):
        ratio = ratios(results[row], results[other])
        if row != other and ratio:
            middle, low, high = statistics.median(ratio), min(ratio), max(ratio)
            print(f"| {row} | {other} | {middle:.3f} ({low:.3f} to {high:.3f}, {len(ratio)} rounds) |")


BESIDE = ("megatron-te", "liger", "megatron-te-fp8", "peft")  # rows that the others are compared with


def ratios(row: list[dict], other: list[dict]) -> list[float]:
    """Return the ratios of tokens/s in the rounds that both rows have."""
    rates = {each["round"]: each["rate"] for each in other}
    return [each["rate"] / rates[each["round"]] for each in row if each["round"] in rates]


STEP = re.compile(r"\| ([\d,]+) tokens/s/GPU \| MFU ([\d.]+) %")


def run(row: str, args, flags: list[str], log: Path) -> tuple[str, str]:
    """Run one row; return its standard output, and the last lines of its errors if it failed."""
    _, kind, extra = ROWS[row]
    ranks = args.gpus if kind in ("ours", "without", "megatron") else 1
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"]
    # Without graphs unless the flags or the row ask for them, so that a row is the same in each setting.
    graphs = ["--cuda-graph-impl", "none"] if row != "auto" and kind in ("ours", "without", "megatron") else []
    command = [*launcher, __file__, "child", kind, "--config", args.config, *graphs, *extra, *flags]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "8"}
    )
    log.write_text(result.stdout + result.stderr)
    if not result.returncode:
        return result.stdout, f"no step in {log}"
    # torchrun's own report comes last and does not name the cause.
    said = result.stderr.split("torch/distributed/elastic/multiprocessing/api.py")[0].strip().splitlines()
    return result.stdout, "\n".join(said[-12:]) or f"exit code {result.returncode}"


# ---------------------------------------------------------------- code of a row's process


def child(kind: str, flags: list[str]) -> None:
    if kind == "without":
        for package in ("transformer_engine", "apex"):
            sys.modules[package] = None  # as if it were not installed
    if kind in ("ours", "without"):
        sys.argv = [str(ROOT / "pretrain_cream.py"), *flags]
        runpy.run_path(sys.argv[0], run_name="__main__")
    elif kind == "megatron":
        megatron(flags)
    else:
        transformers(flags, kind)


def megatron(flags: list[str]) -> None:
    """Train Megatron's own GPTModel with Transformer Engine's layers and fused RoPE at plain positions."""
    from megatron.training.argument_utils import gpt_config_from_args

    import pretrain_cream as main_job
    from megatron_cream.config import parse, values
    from megatron_cream.optimizer import finite
    from megatron_cream.patches import single_rank_collectives, weight_gradients

    values.initial_weights = lambda args: None
    flags = [*flags, "--attention-backend", "te", "--position-sampler", "pi"]

    def stock_config(args):
        args.position_embedding_type, args.apply_rope_fusion = "rope", True
        config = gpt_config_from_args(args)
        config.lora = None
        return config

    values.model_config = stock_config
    # Disable this project's optimizer, checks and shortcuts, and Megatron's own checks, which would cost it time.
    weight_gradients.install = single_rank_collectives.install = lambda: None
    values.can_use_one_pass_optimizer = lambda args: False
    finite.install = lambda *_: None
    real_parse = parse.parse

    def parse_without_fusion(argv, *rest):
        parsed = real_parse(argv, *rest)
        # Megatron's output layer needs apex for it; Transformer Engine's layers do not.
        parsed.args.gradient_accumulation_fusion = False
        return replace(parsed, model=stock_config(parsed.args))

    parse.parse = parse_without_fusion
    main_job.train(flags)


def transformers(flags: list[str], kind: str) -> None:
    import torch
    import yaml
    from transformers import LlamaForCausalLM

    from benchmarks.shapes import llama_config
    from megatron_cream.common.devices import peak_flops
    from megatron_cream.model.flops import flops_per_token

    if kind == "liger" or kind.startswith("peft"):
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    c = yaml.safe_load(locate(flags[flags.index("--config") + 1]).read_text())
    for flag, value in itertools.pairwise(flags):
        name = flag.removeprefix("--").replace("-", "_")
        if isinstance(c.get(name), int):
            c[name] = int(value)
    config = llama_config(c, max_position_embeddings=c["seq_length"], use_cache=False, attn_implementation="sdpa")
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    if kind == "compile-fp8":
        from torchao.float8 import convert_to_float8_training

        # The head stays in bf16, as in the recipes of torchtitan and torchao.
        convert_to_float8_training(model, module_filter_fn=lambda module, name: name != "lm_head")
    if kind.startswith("compile"):
        model.compile()
    if kind.startswith("peft"):
        from benchmarks.lora import add_adapters

        model = add_adapters(model, c, recompute=kind == "peft-recompute")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    micro, accumulate = c["micro_batch_size"], c["global_batch_size"] // c["micro_batch_size"]
    tokens = micro * accumulate * c["seq_length"]
    flops = flops_per_token(
        num_layers=c["num_layers"],
        hidden_size=c["hidden_size"],
        ffn_hidden_size=c["ffn_hidden_size"],
        num_query_groups=config.num_key_value_heads,
        kv_channels=c["hidden_size"] // c["num_attention_heads"],
        num_attention_heads=c["num_attention_heads"],
        vocab_size=c["vocab_size"],
        seq_length=c["seq_length"],
        frozen_layers="lora_rank" in c,
        frozen_head="embeddings" not in c.get("lora_train", "embeddings"),
    )
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(c["train_iters"]):
        begin.record()
        for _ in range(accumulate):
            ids = torch.randint(0, c["vocab_size"], (micro, c["seq_length"]), device="cuda")
            loss = model(input_ids=ids, labels=ids).loss / accumulate
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        end.record()
        end.synchronize()
        rate = tokens / (begin.elapsed_time(end) / 1000)
        peak = torch.cuda.max_memory_allocated() / 2**30
        mfu = 100 * rate * flops / peak_flops()
        print(f"| loss {loss.item() * accumulate:.4f} | {rate:,.0f} tokens/s/GPU | MFU {mfu:.1f} % | {peak:.1f} GiB")


if __name__ == "__main__":
    main()
