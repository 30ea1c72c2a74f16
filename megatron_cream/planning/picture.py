"""Bar chart of the parts of a step's time in each layout, with waiting in warm colours."""

from pathlib import Path

from megatron_cream.common.files import save_picture
from megatron_cream.planning.layouts import Plan

# (label, fields of `Time`, colour)
PIECES = [
    ("matrix products", ("products",), "#1d3f5e"),
    ("attention", ("attention",), "#2a6f97"),
    ("norms, SwiGLU, loss, ...", ("passes",), "#7fb2cf"),
    ("optimizer, host", ("optimizer", "idle"), "#bcd4e0"),
    ("recompute", ("recompute",), "#9a9a9a"),
    ("waiting for TP", ("tensor",), "#f2c14e"),
    ("waiting for CP", ("context",), "#ec9a29"),
    ("waiting for DP", ("data",), "#d1603d"),
    ("waiting for PP", ("pipeline", "bubble"), "#8f2d2b"),
]


def draw(plans: list[Plan], title: str, path: Path) -> None:
    """Draw the predicted seconds of a step as one bar for each plan, in the given order.

    Args:
        plans: the layouts, from top to bottom.
        title: the title above the bars.
        path: the file to write: .png, .svg or .pdf.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 1.8 + 0.42 * len(plans)), layout="constrained")
    ends = [0.0] * len(plans)
    for label, parts, colour in PIECES:
        widths = [sum(getattr(plan.speed.time, part) for part in parts) for plan in plans]
        if any(widths):
            axes.barh(range(len(plans)), widths, left=ends, color=colour, label=label, height=0.72)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    for place, plan in enumerate(plans):
        axes.annotate(
            f"MFU {plan.speed.utilization:.0%}",
            (ends[place], place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color="0.35",
        )
    axes.set_yticks(range(len(plans)), [_name(plan) for plan in plans])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * max(ends))
    axes.set_xlabel("predicted seconds per step")
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    save_picture(figure, path)
    plt.close(figure)


def _name(plan: Plan) -> str:
    layout = plan.layout
    name = f"TP {layout.tensor}, PP {layout.pipeline}, CP {layout.context}, DP {layout.data}"
    return name if layout.recompute == "none" else f"{name}, recompute"
