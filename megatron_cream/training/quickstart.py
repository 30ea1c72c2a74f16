"""The run without flags: `torchrun --nproc_per_node=2 pretrain_cream.py`.

Trains a tiny Llama at its window N on text that is already on the machine, extends it to L = sN with CREAM, and
shows held-out perplexity before and after at N, 2N .. sN.
Both trainings are ordinary runs, of the recipes quickstart_base and quickstart.
"""

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import yaml
from rich.console import Console
from rich.table import Table

from megatron_cream.common.advice import command_line
from megatron_cream.common.files import save_picture
from megatron_cream.config.recipe import locate
from megatron_cream.distributed import nodes, rendezvous

BASE, EXTEND = "quickstart_base", "quickstart"


def quickstart(train: Callable[[list[str]], None]) -> None:
    """Train a tiny model, extend it, and print its perplexity before and after.

    Args:
        train: runs one training from a list of flags.
    """
    from megatron.training.training import destroy_global_state

    started = time.monotonic()
    first = int(os.environ.get("RANK", 0)) == 0
    folder = choose_run_folder()
    recipe = yaml.safe_load(locate(EXTEND).read_text())
    window, target = recipe["seq_length"], recipe["target_length"]

    def say(text: str) -> None:
        if first:
            print(text, flush=True)

    say(f"1/2  A tiny Llama learns text at its window of {window} tokens.")
    train(["--config", BASE, "--save", str(folder / "base")])
    destroy_global_state()
    say(f"\n2/2  CREAM extends it from {window} to {target} tokens, training at {window} only.")
    train(["--config", EXTEND, "--save", str(folder / "cream"), "--pretrained-checkpoint", str(folder / "base")])
    if first:
        before, after = (read_last_perplexity(folder / name) for name in ("base", "cream"))
        picture = plot(before, after, window, folder / "perplexity.png")
        show(before, after, window, folder, picture, time.monotonic() - started)


def choose_run_folder() -> Path:
    """Return runs/quickstart-TIME: new for each launch, the same on all ranks.

    TIME is the start of the first rank's launcher. On several nodes torchrun gives an ID (--rdzv_id), which is used
    instead.
    """
    if nodes.is_multi_node() and "TORCHELASTIC_RUN_ID" in os.environ:
        return Path("runs") / f"quickstart-{os.environ['TORCHELASTIC_RUN_ID']}".replace("/", "_")
    parent = os.getppid() if "RANK" in os.environ else 0  # 0 too if it is outside this container
    started = time.localtime(psutil.Process(parent or os.getpid()).create_time())
    name = time.strftime("quickstart-%Y%m%d-%H%M%S", started)
    if nodes.is_multi_node():
        name = rendezvous.broadcast_from_rank_0(name)
    return Path("runs") / name


def read_last_perplexity(folder: Path) -> dict[int, float]:
    """Return {context length: perplexity} from the last line that a run wrote."""
    lines = (folder / "perplexity_by_length.jsonl").read_text().splitlines()
    # JSON has null for NaN
    return {int(n): float(value or "nan") for n, value in json.loads(lines[-1])["perplexity"].items()}


def show(before: dict, after: dict, window: int, folder: Path, picture: Path, seconds: float) -> None:
    """Print the table of perplexities, where the files are, and the next command."""
    table = Table(title=f"Held-out perplexity by context length (trained at {window} tokens)")
    for column in ("context", "before", "after CREAM"):
        table.add_column(column, justify="right")
    for n in sorted(before):
        name = f"{n} = {n // window} N" if n != window else f"{n} = N"
        table.add_row(name, f"{before[n]:.1f}", f"{after[n]:.1f}")
    console = Console()
    console.print()
    console.print(table)
    console.print(f"Picture: {picture}   checkpoint: {folder / 'cream'}   {seconds:.0f} s in all", soft_wrap=True)
    flags = "--input TEXTS --output-prefix data/texts --tokenizer-type HuggingFaceTokenizer --tokenizer-model HF_MODEL"
    command = command_line("preprocess_data", *flags.split())
    console.print(f"Next, with your own texts and model: {command}", soft_wrap=True, highlight=False)


def plot(before: dict, after: dict, window: int, path: Path) -> Path:
    """Draw perplexity by context length, before and after; return the picture's path."""
    import matplotlib

    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # its INFO lines announce the font cache
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    lengths = sorted(before)
    axes.plot(lengths, [before[n] for n in lengths], "o--", color="#b04a3a", label="before")
    axes.plot(lengths, [after[n] for n in lengths], "o-", color="#2a6f97", label="after CREAM")
    axes.axvline(window, color="0.6", linewidth=1, zorder=0)
    axes.annotate(
        "trained window N",
        (window, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(4, -12),
        textcoords="offset points",
        color="0.4",
        fontsize=9,
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("held-out perplexity (same tokens scored)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    save_picture(figure, path)
    plt.close(figure)
    return path
