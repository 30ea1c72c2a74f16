"""Pictures of a comparison: readable in black and white, context lengths in tokens."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_cream.common.files import save_picture
from megatron_cream.evaluation.comparison.bootstrap import Interval
from megatron_cream.evaluation.comparison.measures import FEW, Row, Table, format_tokens

_STYLE = {"font.size": 10, "hatch.linewidth": 0.7, "axes.spines.top": False, "axes.spines.right": False}
_BASE: dict[str, Any] = dict(color="0.55", fmt="x:", label="base", markersize=6)
_EXTENDED: dict[str, Any] = dict(color="0.1", fmt="o-", label="extended", markersize=6, markerfacecolor="white")


def draw_changes(rows: list[Row], file: Path) -> None:
    """Draw the change of each score with its interval, one line each."""
    with pyplot.rc_context(_STYLE):
        figure, axes = pyplot.subplots(figsize=(8, 1.3 + 0.36 * len(rows)), layout="constrained")
        axes.axvline(0, color="0.6", linewidth=1)
        for place, row in enumerate(rows):
            change = row.change
            is_clear = row.verdict in ("better", "worse")
            axes.errorbar(
                change.mean,
                place,
                xerr=_to_error_bar(change),
                fmt="o",
                color="0.1",
                capsize=3,
                markersize=6,
                markerfacecolor="0.1" if is_clear else "white",
            )
        axes.set_yticks(range(len(rows)), [f"{', '.join(row.names)}  (n={row.examples:,})" for row in rows])
        axes.invert_yaxis()
        axes.margins(x=0.1, y=0.12)
        axes.set_xlabel("change of the score, points, with 95 % interval; filled: clear")
        _save(figure, file)


def draw_lines(table: Table, window: int | None, file: Path) -> None:
    """Draw both models' means by the table's first heading, with their own intervals."""
    rows = table.rows
    with pyplot.rc_context(_STYLE):
        figure, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
        for side, shift, style in (("base", -0.03, _BASE), ("extended", 0.03, _EXTENDED)):
            intervals = [getattr(row, side) for row in rows]
            errors = [[max(0, i.mean - i.low) for i in intervals], [max(0, i.high - i.mean) for i in intervals]]
            places = [place + shift for place in range(len(rows))]
            axes.errorbar(places, [i.mean for i in intervals], yerr=errors, capsize=3, **style)
        axes.set_xticks(range(len(rows)), [f"{row.names[0]}{_label_if_few(row)}" for row in rows])
        is_score = rows[0].kind == "score"
        axes.set_xlabel(_name_axis(table.headings[0]))
        axes.set_ylabel("score, %" if is_score else "perplexity")
        means = [interval.mean for row in rows for interval in (row.base, row.extended)]
        if is_score:
            axes.set_ylim(-3, 103)
        elif max(means) > 10 * min(means):
            axes.set_yscale("log")
        _mark_window(axes, rows, window)
        axes.legend(frameon=False)
        _save(figure, file)


def draw_cells(table: Table, file: Path) -> None:
    """Draw the change in each cell of a table with two headings, darker for more, hatched where it is worse."""
    columns, lines = ([*dict.fromkeys(row.names[place] for row in table.rows)] for place in (0, 1))
    cells = {row.names: row for row in table.rows}
    with pyplot.rc_context(_STYLE):
        size = max(6, 2 + 0.85 * len(columns)), 1.4 + 0.5 * len(lines)
        figure, axes = pyplot.subplots(figsize=size, layout="constrained")
        for x, column in enumerate(columns):
            for y, line in enumerate(lines):
                row = cells.get((column, line))
                if row is None:
                    continue
                change = row.change.mean
                shade = str(1 - 0.6 * min(abs(change), 100) / 100)
                box = dict(facecolor=shade, edgecolor="white", hatch="////" if change < 0 else "")
                axes.add_patch(pyplot.Rectangle((x - 0.5, y - 0.5), 1, 1, **box))
                text = f"{change:+.0f}\n{row.base.mean:.0f} → {row.extended.mean:.0f}{_label_if_few(row)}"
                back = dict(facecolor=shade, edgecolor="none", pad=1)
                axes.text(x, y, text, ha="center", va="center", fontsize=7, bbox=back)
        axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(lines) - 0.5, -0.5))
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(lines)), lines)
        axes.set_xlabel(_name_axis(table.headings[0]))
        axes.set_ylabel(table.headings[1])
        axes.set_title("change in points, base → extended in %; hatched: worse", loc="left", fontsize=10)
        _save(figure, file)


def _mark_window(axes: Axes, rows: list[Row], window: int | None) -> None:
    within = sum(row.longest <= (window or 0) for row in rows)
    if window and 0 < within < len(rows):
        axes.axvline(within - 0.5, color="0.6", linewidth=1, linestyle="--", zorder=0)
        place = dict(xy=(within - 0.5, 1), xycoords=("data", "axes fraction"), fontsize=9, color="0.4")
        axes.annotate(f" beyond the base model's {format_tokens(window)}", va="bottom", **place)


def _name_axis(heading: str) -> str:
    return "context length, tokens" if heading in ("length", "context") else heading


def _label_if_few(row: Row) -> str:
    """The number of examples, where they are few."""
    return f"\nn={row.examples}" if row.examples < FEW else ""


def _to_error_bar(interval: Interval) -> list[list[float]]:
    return [[max(0, interval.mean - interval.low)], [max(0, interval.high - interval.mean)]]


def _save(figure: Figure, file: Path) -> None:
    save_picture(figure, file)
    pyplot.close(figure)
