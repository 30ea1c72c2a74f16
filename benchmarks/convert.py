"""Time and peak memory of importing and exporting a model of Llama-2-7B's shape, compared with `cp`.

    python benchmarks/convert.py FOLDER [--layers 32] [--rounds 2]

FOLDER needs room for three copies of the weights (41 GB); the files are removed at the end.
Each round runs cp, import, cp, export, each from a cold page cache to the disk (the files that cp wrote are
fsynced afterwards; the converter does that itself, and also hashes the files that it writes).
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
TOOL = [sys.executable, str(ROOT / "tools" / "convert_hf.py")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    source, checkpoint, copy, out = (args.folder / name for name in ("hf", "checkpoint", "copy", "out"))
    # In a separate process, because a child inherits its parent's peak memory.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        nbytes = pool.submit(write_llama, source, args.layers).result()
    print(f"{nbytes / 1e9:.2f} GB of bf16 weights, {args.layers} layers")
    steps = {
        "cp (HF folder)": (source, copy, ["cp", "-r", source, copy]),
        "import": (source, checkpoint, [*TOOL, "import", "--hf-path", source, "--output", checkpoint]),
        "cp (checkpoint)": (checkpoint, copy, ["cp", "-r", checkpoint, copy]),
        "export": (checkpoint, out, [*TOOL, "export", "--checkpoint", checkpoint, "--hf-path", out]),
    }
    seconds = {name: [] for name in steps}
    peak = {name: 0.0 for name in steps}
    for _ in range(args.rounds):
        for name, (read, written, command) in steps.items():
            shutil.rmtree(written, ignore_errors=True)
            forget(read)
            taken, memory = run(command, written)
            seconds[name].append(taken)
            peak[name] = max(peak[name], memory)
            print(f"  {name:16} {taken:6.1f} s  {nbytes / 1e9 / taken:5.2f} GB/s  peak {memory:5.2f} GiB", flush=True)
            if written in (copy, out):
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                    same = written == copy or pool.submit(equal_weights, source, out).result()
                shutil.rmtree(written)
                assert same, "the exported weights are not the imported ones"
    for name, base in (("import", "cp (HF folder)"), ("export", "cp (checkpoint)")):
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))
        largest = 4096 * 32000 * 2 / 2**30
        print(f"{name}: {ratio:.2f} x cp, peak {peak[name]:.2f} GiB; the largest tensor has {largest:.2f} GiB")
    shutil.rmtree(checkpoint)
    shutil.rmtree(source)


def run(command: list, written: Path) -> tuple[float, float]:
    """Return the seconds until the written files are on the disk, and the process's peak memory in GiB."""
    started = time.monotonic()
    process = subprocess.Popen([str(item) for item in command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, command
    for file in written.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    return time.monotonic() - started, usage.ru_maxrss / 2**20


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def equal_weights(ours: Path, theirs: Path) -> bool:
    from safetensors import safe_open

    def tensors(folder: Path):
        for file in sorted(folder.glob("*.safetensors")):
            for name in safe_open(file, "pt").keys():  # noqa: SIM118
                yield name, file

    files = dict(tensors(theirs))
    return all(
        torch.equal(safe_open(file, "pt").get_tensor(name), safe_open(files[name], "pt").get_tensor(name))
        for name, file in tensors(ours)
    )


def write_llama(folder: Path, layers: int) -> int:
    """Write a Hugging Face folder of Llama-2-7B's shape with random weights; return the bytes of its weights."""
    folder.mkdir()
    hidden, ffn, vocabulary = 4096, 11008, 32000
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        prefix = f"model.layers.{i}."
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (ffn, hidden) for name in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, ffn)
        shapes |= {f"{prefix}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    shards, total = [{}], 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        if sum(2 * torch.Size(s).numel() for s in shards[-1].values()) + size > 5_000_000_000:
            shards.append({})
        shards[-1][name] = shape
        total += size
    weight_map = {}
    generator = torch.Generator().manual_seed(0)
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            key: torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=generator).view(torch.bfloat16)
            for key, shape in shard.items()
        }
        for tensor in tensors.values():  # avoid infinities and NaN: NaN is unequal to itself
            tensor.view(torch.int16).bitwise_and_(~0x0080)
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        hidden_act="silu",
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    (folder / "config.json").write_text(json.dumps(config))
    return total


if __name__ == "__main__":
    main()
