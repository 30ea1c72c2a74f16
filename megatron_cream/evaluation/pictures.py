"""The picture of a task's results, as a PNG file."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display

from matplotlib import pyplot
from matplotlib.axes import Axes

from megatron_cream.common.files import save_picture
from megatron_cream.evaluation import report


def draw(task: str, summary: dict[str, Any], file: Path) -> None:
    """Write the picture of a task's summary.

    Args:
        task: the name of the task.
        summary: what `report.summarise` returned; for perplexity, what `runner.summarise_perplexity` returned.
        file: the PNG file to write.
    """
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    _DRAW[task](axes, summary)
    save_picture(figure, file)
    pyplot.close(figure)


def _draw_needle(axes: Axes, summary: dict[str, Any]) -> None:
    cells = summary["by_length_and_depth"]
    depths = sorted({depth for row in cells.values() for depth in row}, key=float)
    grid = [[100 * cells[length].get(depth, float("nan")) for length in cells] for depth in depths]
    image = axes.imshow(grid, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(cells)), [f"{int(length):,}" for length in cells], rotation=45)
    axes.set_yticks(range(len(depths)), [f"{100 * float(depth):.0f} %" for depth in depths])
    axes.set(
        title=_title("Needle in a haystack", summary), xlabel="context length (tokens)", ylabel="depth of the fact"
    )
    axes.figure.colorbar(image, label="found (%)")


def _draw_kv(axes: Axes, summary: dict[str, Any]) -> None:
    for size, means in summary["by_position"].items():
        axes.plot(
            [100 * float(d) for d in means], [100 * m for m in means.values()], marker="o", label=_format_size(size)
        )
    axes.legend()
    _set_percent_axis(axes)
    axes.set(title=_title("Key-value retrieval", summary), xlabel="place of the requested key (% of the context)")


def _draw_lines(axes: Axes, summary: dict[str, Any]) -> None:
    _draw_by_length(axes, {"": summary["by_length"]})
    axes.set(title=_title("LongChat-Lines", summary))


def _draw_ruler(axes: Axes, summary: dict[str, Any]) -> None:
    _draw_by_length(axes, summary["by_task"], alpha=0.35)
    _draw_by_length(axes, {"mean": summary["by_length"]}, color="black", linewidth=2.5)
    if summary["threshold"]:
        axes.axhline(100 * summary["threshold"], color="gray", linestyle="--", linewidth=1)
    axes.legend(fontsize="x-small", ncols=2, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set(title=f"{_title('RULER', summary)}; {report.describe_effective_length(summary)}")


def _draw_longbench(axes: Axes, summary: dict[str, Any]) -> None:
    means = summary["by_dataset"]
    axes.barh(list(means), [100 * mean for mean in means.values()])
    axes.invert_yaxis()
    axes.set(title=_title("LongBench", summary), xlabel="score (%)", xlim=(0, 100))


def _draw_perplexity(axes: Axes, summary: dict[str, Any]) -> None:
    lengths, drawn = list(range(len(summary))), []
    for key, label in (("perplexity", "perplexity"), ("longppl", "LongPPL (key tokens)")):
        values = [row.get(key) for row in summary.values()]
        if any(value is not None for value in values):
            axes.plot(lengths, [float("nan") if v is None else v for v in values], marker="o", label=label)
            drawn += [value for value in values if value is not None]
    axes.set_xticks(lengths, [f"{int(length):,}" for length in summary])
    convention = next(iter(summary.values())).get("convention", "ours")
    axes.set(title=f"Perplexity by context length, convention {convention}", xlabel="context length (tokens)")
    if max(drawn) > 10 * min(drawn):
        axes.set(yscale="log")
    axes.legend()


def _draw_by_length(axes: Axes, lines: dict[str, dict[str, float]], **style: Any) -> None:
    sizes = list(dict.fromkeys(size for means in lines.values() for size in means))
    for name, means in lines.items():
        places = [sizes.index(size) for size in means]
        axes.plot(places, [100 * mean for mean in means.values()], marker="o", label=name, **style)
    axes.set_xticks(range(len(sizes)), [_format_size(size) for size in sizes])
    _set_percent_axis(axes)
    axes.set(xlabel="context length (tokens)")


def _set_percent_axis(axes: Axes) -> None:
    axes.set(ylabel="correct (%)", ylim=(-3, 103))
    axes.grid(alpha=0.3)


def _title(name: str, summary: dict[str, Any]) -> str:
    return f"{name}: {100 * summary['score']:.1f} %"


def _format_size(size: str) -> str:
    """Return "12 keys" for "12_keys" and "4,096" for "4096"."""
    return f"{int(size):,}" if size.isdecimal() else size.replace("_", " ")


_DRAW = {
    "needle": _draw_needle,
    "kv": _draw_kv,
    "lines": _draw_lines,
    "ruler": _draw_ruler,
    "longbench": _draw_longbench,
    "perplexity": _draw_perplexity,
}
