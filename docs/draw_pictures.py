"""Draw the pictures of the README and the docs: python docs/draw_pictures.py [FOLDER]

They come from the project's own sampler and from measured results, are readable in black and white, and have tokens on
the axes.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch, Patch, Rectangle

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_cream.positions import build_sampler

WINDOW, TARGET = 4096, 32768
STYLES = {
    "head": dict(facecolor="0.15", edgecolor="0.15"),
    "middle": dict(facecolor="0.85", edgecolor="0.15", hatch="////"),
    "tail": dict(facecolor="0.6", edgecolor="0.15"),
}
SEED = 3
matplotlib.rcParams |= {"font.size": 10, "hatch.linewidth": 0.7, "axes.spines.top": False, "axes.spines.right": False}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    drawings = {"positions": draw_positions, "blocks": draw_blocks, "data": draw_data, "scalings": draw_scalings}
    for name, draw in drawings.items():
        figure = draw()
        figure.savefig(folder / f"{name}.png", dpi=160, metadata={"Software": None})
        plt.close(figure)


def draw_positions() -> plt.Figure:
    """Show the positions of samples without CREAM, with CREAM, and those that many samples cover together."""
    sampler = build_sampler("cream", window=WINDOW, target=TARGET, seed=SEED)
    plans = [sampler.plan(0, sample, TARGET) for sample in range(400)]
    long_ends = [plan for plan in plans if plan.lengths[0] > 1000]
    long_middles = [plan for plan in plans if plan.lengths[0] < 1000]
    shown = [plan for pair in zip(long_ends[:3], long_middles[:3], strict=True) for plan in pair]

    figure, axes = plt.subplots(figsize=(9, 3.9), layout="constrained")
    rows = 1.5 + len(shown) + 2
    add_bar(axes, rows, 0, WINDOW, dict(facecolor="white", edgecolor="0.15"))
    axes.text(WINDOW + 400, rows, "plain fine-tuning: every sample has positions 0 to 4K", va="center")
    for number, plan in enumerate(shown):
        for name, (start, length) in zip(STYLES, plan.segments, strict=True):
            add_bar(axes, len(shown) + 1.3 - number, start, start + length, STYLES[name])
    axes.text(-700, len(shown) / 2 + 1.8, "CREAM:\nsix samples\nof 4K tokens", ha="right", va="center")
    covered = sorted({position for plan in plans for position in plan.position_ids.tolist()})
    add_bar(axes, 0.5, covered[0], covered[-1] + 1, dict(facecolor="0.95", edgecolor="0.15"))
    share = len(covered) / TARGET
    axes.text(TARGET / 2, 0.5, f"400 samples train {share:.0%} of the positions", ha="center", va="center")
    finish_axes(axes, rows)
    handles = [Patch(label=name, **style) for name, style in STYLES.items()]
    axes.legend(handles=handles, loc="upper right", ncols=3, frameon=False, bbox_to_anchor=(1, 1.06))
    return figure


def add_bar(axes: plt.Axes, row: float, start: int, stop: int, style: dict) -> None:
    shortest = TARGET / 300  # so that 32 tokens can be seen
    left = min(start, TARGET - shortest)
    axes.add_patch(Rectangle((left, row - 0.32), max(stop - start, shortest), 0.64, linewidth=0.8, **style))


def finish_axes(axes: plt.Axes, rows: float) -> None:
    axes.set_xlim(0, TARGET)
    axes.set_ylim(-0.1, rows + 0.6)
    ticks = range(0, TARGET + 1, WINDOW)
    axes.set_xticks(ticks, [f"{tick // 1024}K" if tick else "0" for tick in ticks])
    axes.set_xlabel("position id, in tokens")
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)


def draw_blocks() -> plt.Figure:
    """Show where one sample of each kind takes its tokens from, and which positions they get."""
    sampler = build_sampler("cream", window=WINDOW, target=TARGET, seed=SEED)
    plans = [sampler.plan(0, sample, TARGET) for sample in range(100)]
    kinds = {
        "relativity: head and tail of N/3 tokens": next(p for p in plans if p.lengths[0] > 1000),
        "continuity: a middle of almost N tokens": next(p for p in plans if p.lengths[0] < 1000),
    }
    figure, axes = plt.subplots(2, 1, figsize=(9, 4.2), layout="constrained", sharex=True)
    for panel, (title, plan) in zip(axes, kinds.items(), strict=True):
        add_bar(panel, 2, 0, TARGET, dict(facecolor="white", edgecolor="0.5"))
        at = 0
        for name, (start, length) in zip(STYLES, plan.segments, strict=True):
            add_bar(panel, 2, start, start + length, STYLES[name])
            add_bar(panel, 0.5, at, at + length, STYLES[name])
            for old, new in ((start, at), (start + length, at + length)):
                panel.plot([old, new], [1.66, 0.84], color="0.5", linewidth=0.7, linestyle=":")
            at += length
        panel.text(TARGET, 2.45, "a document, or the target window", ha="right", fontsize=9)
        panel.text(WINDOW + 300, 0.5, f"the sample: {WINDOW // 1024}K tokens with the position ids above", va="center")
        panel.set_title(f"{title} (alpha = {plan.alpha:g})", loc="left", fontsize=10)
        finish_axes(panel, 2.2)
    axes[0].set_xlabel("")
    handles = [Patch(label=name, **style) for name, style in STYLES.items()]
    axes[0].legend(handles=handles, loc="upper right", ncols=3, frameon=False, bbox_to_anchor=(1, 1.32))
    return figure


def draw_data() -> plt.Figure:
    """Show the way from documents to a served model."""
    stages = [
        ("documents", ".jsonl .txt .parquet,\nchats", "preprocess_data.py"),
        ("tokens", "PREFIX.bin, .idx\n(PREFIX_loss_mask)", "data set"),
        ("samples", "long documents,\nshuffled", "position sampler"),
        ("batches", "N tokens and N\nposition ids each", "pretrain_cream.py"),
        ("checkpoint", "torch_dist, any\nTP x PP x DP", "convert_hf.py"),
        ("model folder", "safetensors,\nconfig.json", ""),
    ]
    width, step, drop = 1.5, 2.3, 1.75
    figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
    for number, (title, details, tool) in enumerate(stages):
        row, column = divmod(number, 3)
        left, bottom = (2 - column if row else column) * step, -row * drop  # the second row runs back
        style = dict(boxstyle="round,pad=0.06", facecolor="0.95", edgecolor="0.15")
        axes.add_patch(FancyBboxPatch((left, bottom), width, 1, **style))
        axes.text(left + width / 2, bottom + 0.76, title, ha="center", va="center", fontweight="bold")
        axes.text(left + width / 2, bottom + 0.3, details, ha="center", va="center", fontsize=9)
        if column == 2 and row == 0:
            ends = (left + width / 2, bottom - 0.1), (left + width / 2, bottom - drop + 1.1)
            place = dict(xy=(left + width / 2 - 0.1, bottom - (drop - 1) / 2), ha="right", va="center")
        elif row == 0:
            ends = (left + width + 0.1, bottom + 0.5), (left + step - 0.1, bottom + 0.5)
            place = dict(xy=(left + (width + step) / 2, bottom + 1.15), ha="center")
        else:
            ends = (left - 0.1, bottom + 0.5), (left - step + width + 0.1, bottom + 0.5)
            place = dict(xy=(left - (step - width) / 2, bottom + 1.15), ha="center")
        if tool:
            axes.annotate("", ends[1], ends[0], arrowprops=dict(arrowstyle="->", color="0.15"))
            axes.annotate(tool, fontsize=9, style="italic", **place)
    axes.set_xlim(-0.15, 2 * step + width + 0.15)
    axes.set_ylim(-drop - 0.15, 1.45)
    axes.axis("off")
    return figure


def draw_scalings() -> plt.Figure:
    """Show what each RoPE scaling did to a real model: examples/study_real."""
    figure, (found, perplexity) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    styles = {"none": "x:", "linear": "D:", "ntk": "^-.", "yarn": "o-", "theta": "s--"}
    study = read_study()
    for scaling, (needles, manual) in ((scaling, study[scaling]) for scaling in styles):
        style = dict(color="0.55" if scaling == "none" else "0.1", markersize=5, markerfacecolor="white")
        label = {"none": "before", "theta": "larger theta"}.get(scaling, scaling)
        lengths = sorted(needles)
        found.plot(lengths, [100 * needles[n] for n in lengths], styles[scaling], label=label, **style)
        perplexity.plot(lengths, [manual[n] for n in lengths], styles[scaling], label=label, **style)
    for axes, title in ((found, "needles found, %"), (perplexity, "perplexity of a manual")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{n // 1024}K" for n in lengths])
        axes.set_xlabel("context, in tokens")
        axes.set_title(title, loc="left", fontsize=10)
    perplexity.set_ylim(8, 16)
    perplexity.text(lengths[1], 15.6, "before: 459 and more", color="0.4", fontsize=9, va="top", ha="center")
    perplexity.legend(frameon=False, fontsize=9, ncols=2, loc="upper left", bbox_to_anchor=(0.08, 0.57))
    return figure


def read_study() -> dict[str, tuple[dict[int, float], dict[int, float]]]:
    """Return {scaling: (needles found, perplexity), each by length}: means over seeds of CREAM at the best rate."""
    best = {"linear": 1.6e-3}  # of five learning rates; 8e-4 for the others
    runs = defaultdict(list)
    for line in (ROOT / "examples" / "study_real" / "seen" / "results.jsonl").read_text().splitlines():
        run = json.loads(line)
        is_before = run["scaling"] == "none" and run["sampler"] == "base"
        is_cream = run["sampler"] == "cream" and run["rate"] == best.get(run["scaling"], 8e-4) and run["factor"] == 8
        if run["what"] == "evaluation" and (is_before or is_cream):
            runs[run["scaling"]].append(run)
    means = {}
    for scaling, same in runs.items():
        needles = [{n: cell["accuracy"] for n, cell in run["tasks"]["needle"].items()} for run in same]
        manuals = [run["perplexity"]["manual"] for run in same]
        means[scaling] = _mean(needles), _mean(manuals)
    return means


def _mean(seeds: list[dict[str, float]]) -> dict[int, float]:
    return {int(length): sum(seed[length] for seed in seeds) / len(seeds) for length in seeds[0]}


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "pictures")
