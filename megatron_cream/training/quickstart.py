"""The embedded default: `torchrun --nproc_per_node=2 pretrain_cream.py`, with no flags.

Trains a tiny Llama at its window N on text that is already on the machine, extends it to
L = sN with CREAM, and shows what that did to held-out perplexity at N, 2N .. sN.
Both trainings are ordinary runs of two recipes.
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

from megatron_cream.common.files import save_picture
from megatron_cream.config.recipe import locate
from megatron_cream.distributed import nodes

BASE, EXTEND = "quickstart_base", "quickstart"


def quickstart(train: Callable[[list[str]], None]) -> None:
    """Train, extend, compare.

    Args:
        train: one training run from a list of flags.
    """
    from megatron.training.training import destroy_global_state

    started = time.monotonic()
    first = int(os.environ.get("RANK", 0)) == 0
    folder = run_folder()
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
        before, after = (last_perplexity(folder / name) for name in ("base", "cream"))
        picture = plot(before, after, window, folder / "perplexity.png")
        show(before, after, window, folder, picture, time.monotonic() - started)


def run_folder() -> Path:
    """`runs/quickstart-<when the launcher started>`: new for each launch, the same on every rank.

    On several nodes, whose launchers start when they do, `runs/quickstart-<torchrun's --rdzv_id>`.
    """
    if nodes.is_multi_node():
        return Path("runs") / f"quickstart-{os.environ['TORCHELASTIC_RUN_ID']}".replace("/", "_")  # --rdzv_id
    launcher = os.getppid() if "RANK" in os.environ else 0
    started = time.localtime(psutil.Process(launcher or os.getpid()).create_time())  # 0: outside this container
    return Path("runs") / time.strftime("quickstart-%Y%m%d-%H%M%S", started)


def last_perplexity(folder: Path) -> dict[int, float]:
    """Context length -> perplexity, from the newest line a run wrote."""
    lines = (folder / "perplexity_by_length.jsonl").read_text().splitlines()
    # JSON has null for NaN
    return {int(n): float(value or "nan") for n, value in json.loads(lines[-1])["perplexity"].items()}


def show(before: dict, after: dict, window: int, folder: Path, picture: Path, seconds: float) -> None:
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
    console.print(
        "Try next, on your own long documents:\n"
        "  python tools/preprocess_data.py --input docs.jsonl --output-prefix data/docs "
        "--tokenizer-type HuggingFaceTokenizer --tokenizer-model meta-llama/Llama-2-7b-hf\n"
        "  python pretrain_cream.py --config llama2_7b_32k --data-path data/docs --print-config",
        soft_wrap=True,
        highlight=False,
    )


def plot(before: dict, after: dict, window: int, path: Path) -> Path:
    import matplotlib

    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it announces its font cache
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    lengths = sorted(before)
    axes.plot(lengths, [before[n] for n in lengths], "o--", color="#b04a3a", label="before")
    axes.plot(lengths, [after[n] for n in lengths], "o-", color="#2a6f97", label="after CREAM")
    axes.axvline(window, color="0.6", linewidth=1, zorder=0)
    axes.annotate(
        "trained window N", (window, 1.0), xycoords=("data", "axes fraction"), xytext=(4, -12),
        textcoords="offset points", color="0.4", fontsize=9,
    )  # fmt: skip
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
