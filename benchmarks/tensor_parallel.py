"""Measure the transfers of tensor parallelism, the products next to them, and ways to overlap the two.

    python benchmarks/tensor_parallel.py [--gpus 2] [--hidden-size 4096] [--ffn-hidden-size 11008] [--samples 1 4]

Samples of --seq-length tokens in bf16 with sequence parallelism, one process per GPU over NCCL; medians of 20 by CUDA
events on rank 0. The caller may set NCCL_PROTO, NCCL_MIN_CTAS and the like. The products of a layer's forward pass are
measured alone; after, or before, the whole transfer; in two parts, each overlapped with the other's transfer; and with
torch's symmetric memory, which overlaps without NCCL (with multicast disabled, because many machines have none).
"""

import argparse
import os
import statistics
import sys
from pathlib import Path

os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # as Megatron sets it

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: its profile.py hides the standard library's

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory  # registers the fused products
from torch.multiprocessing import spawn


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--ffn-hidden-size", type=int, default=11008)
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 4], help="in a micro-batch")
    args = parser.parse_args()
    if torch.cuda.device_count() < args.gpus:
        parser.error(f"--gpus {args.gpus}: this machine has {torch.cuda.device_count()}")
    spawn(measure, (args,), nprocs=args.gpus)
    return 0


def measure(rank: int, args: argparse.Namespace) -> None:
    torch.cuda.set_device(rank)
    address = "tcp://127.0.0.1:29511"
    dist.init_process_group("nccl", address, rank=rank, world_size=args.gpus, device_id=torch.device("cuda", rank))
    lines = ["| | ms | GB/s of each GPU |", "|---|---|---|"]
    for samples in args.samples:
        lines += transfers(samples * args.seq_length, args)
    lines += [
        "",
        "| product | by itself | transfer before or after | in two parts | symmetric memory |",
        "|---" * 5 + "|",
    ]
    tokens, tp = max(args.samples) * args.seq_length, args.gpus
    for name, outputs in (("qkv", 3 * args.hidden_size // tp), ("fc1", 2 * args.ffn_hidden_size // tp)):
        lines.append(row(f"gather, {name}", gathered(tokens, args.hidden_size, outputs)))
    for name, inputs in (("proj", args.hidden_size // tp), ("fc2", args.ffn_hidden_size // tp)):
        lines.append(row(f"{name}, reduce", reduced(tokens, inputs, args.hidden_size)))
    if rank == 0:
        print(torch.cuda.get_device_name(), *lines, sep="\n")
    dist.destroy_process_group()


def transfers(tokens: int, args: argparse.Namespace) -> list[str]:
    part, whole = random(tokens // args.gpus, args.hidden_size), random(tokens, args.hidden_size)
    sent = part.numel() * part.element_size() * (args.gpus - 1)
    ways = {
        "gather": lambda: dist.all_gather_into_tensor(whole, part),
        "reduce": lambda: dist.reduce_scatter_tensor(part, whole),
    }
    times = {name: milliseconds(way) for name, way in ways.items()}
    return [f"| {name} {tokens:,} tokens | {ms:.3f} | {sent / ms / 1e6:.0f} |" for name, ms in times.items()]


def gathered(tokens: int, inputs: int, outputs: int) -> list[float]:
    """Return milliseconds of gathering the input's parts, then multiplying, in each way."""
    size, rank = dist.get_world_size(), dist.get_rank()
    part, whole = random(tokens // size, inputs), random(tokens, inputs)
    weight, result = random(outputs, inputs).t(), random(tokens, outputs)
    mine = slice(rank * tokens // size, (rank + 1) * tokens // size)

    def one_after_the_other():
        dist.all_gather_into_tensor(whole, part)
        return whole @ weight

    def own_part_first():
        transfer = dist.all_gather_into_tensor(whole, part, async_op=True)
        torch.mm(part, weight, out=result[mine])
        transfer.wait()
        for others in (slice(0, mine.start), slice(mine.stop, tokens)):
            torch.mm(whole[others], weight, out=result[others])

    group = dist.group.WORLD.group_name
    ways = lambda: whole @ weight, one_after_the_other, own_part_first
    fused = lambda: torch.ops.symm_mem.fused_all_gather_matmul(part, [weight], 0, group)
    return [milliseconds(way) for way in (*ways, fused)]


def reduced(tokens: int, inputs: int, outputs: int) -> list[float]:
    """Return milliseconds of multiplying, then reducing and scattering the product, in each way."""
    size = dist.get_world_size()
    x, weight, part = random(tokens, inputs), random(outputs, inputs).t(), random(tokens // size, outputs)
    halves = x.view(size, 2, tokens // size // 2, inputs)

    def in_two_parts():
        transfers = []
        for half, place in enumerate(part.chunk(2)):
            product = (halves[:, half] @ weight).view(tokens // 2, outputs)
            transfers.append(dist.reduce_scatter_tensor(place, product, async_op=True))
        for transfer in transfers:
            transfer.wait()

    group = dist.group.WORLD.group_name
    ways = lambda: x @ weight, lambda: dist.reduce_scatter_tensor(part, x @ weight), in_two_parts
    fused = lambda: torch.ops.symm_mem.fused_matmul_reduce_scatter(x, weight, "sum", 0, group)
    return [milliseconds(way) for way in (*ways, fused)]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def row(name: str, times: list[float]) -> str:
    return f"| {name} | " + " | ".join(f"{ms:.3f}" for ms in times) + " |"


def milliseconds(way, repeats: int = 20) -> float:
    for _ in range(5):
        way()
    torch.cuda.synchronize()
    dist.barrier()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        way()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


if __name__ == "__main__":
    sys.exit(main())
