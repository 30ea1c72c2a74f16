"""Show where a training step's time goes: a torch profiler trace as a table, with a lower bound per row.

    python benchmarks/profile.py OUTPUT_FOLDER [--config llama_7b_width] [any flag of the job]
    python benchmarks/profile.py --trace rank-0.json.gz [--config ...]        # read an existing trace

Runs pretrain_cream.py for twelve steps on one GPU, or on `--gpus 2`, traces two of the last steps on the first GPU, or
on those of `--ranks 0 1`, and sorts every kernel into a kind. A floor is the minimum work of the kind (FLOPs, or bytes
read once and written once), shared evenly by the GPUs, divided by the rate that this GPU reached in a large matrix
product, or copy, measured just before. `idle` is the time in which no kernel ran, `communication alone` the time in which
only transfers did; NCCL's also wait for another GPU. Kernels that run at the same time are both counted.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # not this folder: this file would hide the standard library's profile

import argparse
import gzip
import itertools
import json
import re
import subprocess
from collections import Counter

import yaml

from benchmarks.stopping import leave_no_ranks
from megatron_cream.config.recipe import locate

FIRST_STEP, STEPS = 8, 2
# The first pattern that matches a kernel's name decides its kind.
KINDS = [
    ("communication", r"nccl|PtoP|userbuffers"),
    ("attention", r"flash|fmha|cudnn.*(attn|attention|sdpa)|mha_"),
    ("cross-entropy", r"cross_entropy|nll_loss|log_?softmax"),
    ("SwiGLU", r"swiglu|silu"),
    ("rotary and split", r"rotary|rope|split_and_rotate"),
    ("norm", r"rms_?norm|layer_?norm"),
    ("optimizer", r"adam|multi_tensor|l2norm|foreach|lpnorm|NormTwo"),
    ("cast to FP8", r"cast_transpose|quantize|fp8|amax|transpose_"),
    ("GEMM", r"nvjet|gemm|cublas|cutlass|sm90_xmma|splitK"),
    ("residual add", r"CUDAFunctor_add<c10::BFloat16>|fused_add"),
    ("zero gradients", r"FillFunctor<float>"),
    (
        "embedding",
        r"embedding|compute_grad_weight|sum_and_scatter|gather_kernel|radix|krn_|unique|CUDAFunctor_add<float>",
    ),
    ("copies", r"copy|Memcpy|Memset|Cat"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", help="for the trace and the log")
    parser.add_argument("--trace", type=Path, help="a trace that is there already")
    parser.add_argument("--config", default="llama_7b_width")
    parser.add_argument(
        "--gpus", type=int, default=1, help="of this host; the layout that the flags say shares the work"
    )
    parser.add_argument("--ranks", type=int, nargs="+", help="whose steps to trace (default: 0)")
    args, flags = parser.parse_known_args()
    if bool(args.output) == bool(args.trace):
        parser.error("give OUTPUT_FOLDER, or --trace FILE")
    if args.trace and args.ranks:
        parser.error("--ranks: not with --trace, whose file has one rank")
    ranks = args.ranks or [0]
    if wrong := [rank for rank in ranks if not 0 <= rank < args.gpus]:
        parser.error(f"--ranks {wrong[0]}: must be from 0 to {args.gpus - 1}, of --gpus {args.gpus}")
    leave_no_ranks()
    traces = [args.trace] if args.trace else record(args.output, ["--config", args.config, *flags], args.gpus, ranks)
    recipe = yaml.safe_load(locate(args.config).read_text())
    recipe |= {flag[2:].replace("-", "_"): int(value) for flag, value in itertools.pairwise(flags) if value.isdigit()}
    floor = floors(recipe, args.gpus, *ceilings())
    for trace in traces:
        print(f"\n{trace.name}: ", end="")
        show(read_trace(trace), floor)


def record(folder: Path, flags: list[str], gpus: int, ranks: list[int]) -> list[Path]:
    """Run the job and return the trace files of these ranks."""
    last = FIRST_STEP + STEPS
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={gpus}", "--standalone"]
    command += [str(ROOT / "pretrain_cream.py"), *flags, "--train-iters", str(last + 2), "--profile"]
    command += ["--use-pytorch-profiler", "--profile-step-start", str(FIRST_STEP), "--profile-step-end", str(last)]
    command += ["--profile-ranks", *map(str, ranks), "--tensorboard-dir", str(folder / "tensorboard")]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log", "w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
    return [next((folder / "torch_profile").glob(f"rank-{rank}.json*")) for rank in ranks]


def read_trace(trace: Path) -> tuple[Counter, Counter, float]:
    """Return microseconds by kind, by kernel without a kind, and in all; two of the kinds are times without others."""
    opened = gzip.open(trace) if trace.suffix == ".gz" else open(trace)
    with opened as file:
        events = json.load(file)["traceEvents"]
    events = sorted(
        (e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")), key=lambda e: e["ts"]
    )
    kinds, unknown = Counter(), Counter()
    begin = busy = computing = events[0]["ts"]  # the ends of what ran so far: of all kernels, of all but transfers
    idle = without = 0.0
    for event in events:
        kind = next((kind for kind, pattern in KINDS if re.search(pattern, event["name"], re.IGNORECASE)), "other")
        kinds[kind] += event["dur"]
        if kind == "other":
            unknown[event["name"][:90]] += event["dur"]
        end = event["ts"] + event["dur"]
        idle += max(event["ts"] - busy, 0.0)
        busy = max(busy, end)
        if kind != "communication":
            without += max(event["ts"] - computing, 0.0)
            computing = max(computing, end)
    without += busy - max(computing, begin)
    kinds.update({"idle": idle, "communication alone": without - idle})
    return kinds, unknown, busy - begin


def ceilings() -> tuple[float, float]:
    """Return FLOP/s of a large bf16 product and bytes/s of a large copy on this GPU; without a GPU, an H200's."""
    import torch

    if not torch.cuda.is_available():
        return 802e12, 4.24e12  # benchmarks/RESULTS.md

    def seconds(work) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(3):
            work()
        begin.record()
        for _ in range(20):
            work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000 / 20

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source, target = (torch.empty(1 << 30, dtype=torch.int8, device="cuda") for _ in range(2))
    return 2 * 8192**3 / seconds(lambda: a @ b), 2 * source.numel() / seconds(lambda: target.copy_(source))


def floors(c: dict, gpus: int, flops: float, bytes_: float) -> dict[str, float]:
    """Return the minimum microseconds per step of each kind, with all work shared evenly by the GPUs."""
    h, f, layers, vocabulary = c["hidden_size"], c["ffn_hidden_size"], c["num_layers"], c["padded_vocab_size"]
    heads = c["num_attention_heads"]
    groups, d = c.get("num_query_groups", heads), h // heads
    tokens = c["global_batch_size"] * c["seq_length"]
    weights = layers * (h * (2 * heads + 2 * groups) * d + 3 * h * f) + h * vocabulary
    moved = {  # bytes; bf16 activations
        "rotary and split": 2 * tokens * layers * 4 * (heads + 2 * groups) * d,
        "SwiGLU": 2 * tokens * layers * 8 * f,
        "norm": 2 * tokens * (2 * layers + 1) * 5 * h,
        "residual add": 2 * tokens * 2 * layers * 6 * h,
        "cross-entropy": 2 * tokens * 3 * vocabulary,
        # Read the gradient twice (norm, update); read and write weight and two moments; write the bf16 weight.
        "optimizer": (weights + h * vocabulary) * (4 + 4 + 3 * 8 + 2),
        "zero gradients": (weights + h * vocabulary) * 4,
    }
    worked = {
        "GEMM": 6 * weights * tokens,
        "attention": 6 * layers * c["seq_length"] * heads * d * tokens,
    }
    print(f"ceilings: {flops / 1e12:.0f} TFLOP/s in bf16, {bytes_ / 1e12:.2f} TB/s")
    least = {k: v / bytes_ for k, v in moved.items()} | {k: v / flops for k, v in worked.items()}
    return {kind: 1e6 * seconds / gpus for kind, seconds in least.items()}


def show(measured: tuple[Counter, Counter, float], floor: dict[str, float]) -> None:
    kinds, unknown, whole = measured
    print(
        f"{STEPS} steps, {whole / 1000 / STEPS:.1f} ms each\n\n| kind | ms a step | share | floor, ms | of its floor |"
    )
    print("|---|---|---|---|---|")
    for kind, duration in kinds.most_common():
        each = duration / STEPS
        least = f"{floor[kind] / 1000:.1f} | {each / floor[kind]:.2f} x" if kind in floor else "|"
        print(f"| {kind} | {each / 1000:.1f} | {100 * duration / whole:.1f} % | {least} |")
    for name, duration in unknown.most_common(5):
        print(f"other: {duration / 1000 / STEPS:.2f} ms {name}")


if __name__ == "__main__":
    main()
