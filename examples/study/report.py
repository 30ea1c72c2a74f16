"""Table and pictures of the study, made from its results."""

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

import methods

from megatron_cream.common.files import save_picture

COMPARED = ("pi", "randpos", "pose", "cream", "full")
ABLATED = ("cream", "cream, released", "cream, no Gaussian", "cream, no continuity", "cream, no relativity")
_COLOURS = {
    "cream": "#2a6f97",
    "pose": "#d08c2e",
    "randpos": "#8a6fb0",
    "pi": "#b04a3a",
    "full": "0.35",
    "cream, released": "#57a0a8",
    "cream, no Gaussian": "#d08c2e",
    "cream, no continuity": "#8a6fb0",
    "cream, no relativity": "#b04a3a",
}


def write(results: list[dict], folder: Path) -> None:
    """Write table.md, recall.png, perplexity.png and cost.png to `folder`, from the results so far."""
    study = _Results(results)
    if not study.factors:
        return
    (folder / "table.md").write_text(table(results))
    _by_depth(study, folder / "recall.png")
    _by_length(study, folder / "perplexity.png")
    _cost_and_sigma(study, folder / "cost.png")


class _Results:
    """Measurements, by method and factor, over the seeds."""

    def __init__(self, results: list[dict]):
        self._all = results
        self.factors = sorted({r["factor"] for r in results if r["method"] != "base"})
        self.methods = [m for m in (*methods.METHODS, *methods.SIGMAS) if any(r["method"] == m for r in results)]

    def of(self, method: str, factor: int) -> list[dict]:
        return [r for r in self._all if (r["method"], r["factor"]) == (method, factor)]

    def over_seeds(self, method: str, factor: int, value: Callable[[dict], float]) -> tuple[float, float] | None:
        """Return the mean and standard deviation of `value`, or None if there is no run."""
        values = [value(r) for r in self.of(method, factor)]
        return (statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0) if values else None


def table(results: list[dict]) -> str:
    """Return Markdown tables: one of the bases, then one per factor with a row per method."""
    study, seeds = _Results(results), len({r["seed"] for r in results})
    lengths = sorted({int(n) for r in results for n in r["recall"]})
    lines = [f"Mean and deviation over {seeds} seeds. Recall in %, over all depths unless it says otherwise.", ""]
    lines += _row(["before", *(f"recall at {n}" for n in lengths)]) + _row(["---"] * (len(lengths) + 1))
    lines += _row(
        ["the base", *(_cell(study.over_seeds("base", 1, lambda r: 100 * mean_recall(r, n))) for n in lengths)]
    )
    for factor in study.factors:
        window, longest = methods.WINDOW, methods.WINDOW * factor
        head = [f"s = {factor}", f"recall at {longest}", "at the worst depth", f"recall at {window}"]
        head += [f"perplexity at {longest}", f"perplexity at {window}", "GPU seconds"]
        lines += ["", *_row(head), *_row(["---"] * len(head))]
        for method in study.methods:
            measures = [
                lambda r: 100 * mean_recall(r, longest),
                lambda r: 100 * min(r["recall"][str(longest)].values()),
                lambda r: 100 * mean_recall(r, window),
                lambda r: r["perplexity"][str(longest)],
                lambda r: r["perplexity"][str(window)],
            ]
            if not study.of(method, factor):
                continue
            places = [1, 1, 1, 2, 2]
            cells = [_cell(study.over_seeds(method, factor, m), p) for m, p in zip(measures, places)]
            alone = [r["seconds"] for r in study.of(method, factor) if r["alone"]]
            lines += _row([method, *cells, f"{alone[0]:.1f}" if alone else ""])
    return "\n".join(lines) + "\n"


def mean_recall(result: dict, length: int) -> float:
    """Return the mean recall over all depths."""
    return statistics.mean(result["recall"][str(length)].values())


def _row(cells: Iterable[str]) -> list[str]:
    return ["| " + " | ".join(cells) + " |"]


def _cell(value: tuple[float, float] | None, places: int = 1) -> str:
    return "" if value is None else f"{value[0]:.{places}f} ± {value[1]:.{places}f}"


def _plots(rows: int, columns: int, height: float, *, same_y: bool = True):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(4.2 * columns, height * rows),
        layout="constrained",
        sharey="row" if same_y else False,
        squeeze=False,
    )
    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _line(panel, xs, means_and_deviations, method: str) -> None:
    means, deviations = ([pair[i] for pair in means_and_deviations] for i in (0, 1))
    style = dict(color=_COLOURS[method], linewidth=2.4 if method == "cream" else 1.5)
    panel.plot(xs, means, "o" + ("--" if method == "full" else "-"), markersize=3.5, label=method, **style)
    low, high = ([m + sign * d for m, d in zip(means, deviations)] for sign in (-1, 1))
    panel.fill_between(xs, low, high, color=_COLOURS[method], alpha=0.12, linewidth=0)


def _by_depth(study: _Results, path: Path) -> None:
    figure, axes = _plots(2, len(study.factors), 3.2)
    for row, shown in zip(axes, (COMPARED, ABLATED)):
        for panel, factor in zip(row, study.factors):
            longest = methods.WINDOW * factor
            for method in shown:
                if found := study.of(method, factor):
                    depths = list(found[0]["recall"][str(longest)])
                    of_depth = lambda d: study.over_seeds(method, factor, lambda r: 100 * r["recall"][str(longest)][d])
                    _line(panel, [100 * float(d) for d in depths], [of_depth(d) for d in depths], method)
            panel.set_title(f"{longest} tokens (s = {factor})", fontsize=10)
            panel.set_ylim(-3, 103)
            panel.set_xlabel("depth of what is asked for, %")
        row[0].set_ylabel("recall, %")
        row[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_picture(figure, path, dpi=130)


def _by_length(study: _Results, path: Path) -> None:
    figure, axes = _plots(1, len(study.factors), 3.2)
    for panel, factor in zip(axes[0], study.factors):
        for method in COMPARED:
            if found := study.of(method, factor):
                lengths = sorted(map(int, found[0]["perplexity"]))
                of_length = lambda n: study.over_seeds(method, factor, lambda r: r["perplexity"][str(n)])
                _line(panel, lengths, [of_length(n) for n in lengths], method)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_yticks([4, 6, 10, 20, 40], ["4", "6", "10", "20", "40"])
        panel.minorticks_off()
        panel.set_xticks(lengths, [str(n) for n in lengths])
        panel.set_title(f"extended to {methods.WINDOW * factor} (s = {factor})", fontsize=10)
        panel.set_xlabel("tokens of context")
    axes[0][0].set_ylabel("held-out perplexity")
    axes[0][-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_picture(figure, path, dpi=130)


def _cost_and_sigma(study: _Results, path: Path) -> None:
    figure, axes = _plots(1, 2, 3.2, same_y=False)
    seconds, spread = axes[0]
    timed = {
        (m, s): [r["seconds"] for r in study.of(m, s) if r["alone"]] for m in ("cream", "full") for s in study.factors
    }
    for offset, method in ((-0.2, "cream"), (0.2, "full")):
        bars = [(i, timed[method, s][0]) for i, s in enumerate(study.factors) if timed[method, s]]
        drawn = seconds.bar(
            [i + offset for i, _ in bars], [v for _, v in bars], 0.38, color=_COLOURS[method], label=method
        )
        seconds.bar_label(drawn, fmt="%.1f", fontsize=8)
    seconds.set_xticks(range(len(study.factors)), [f"{methods.WINDOW * s}" for s in study.factors])
    seconds.set_xlabel("extended to, tokens")
    seconds.set_title("GPU seconds of an extension", fontsize=10)
    seconds.legend(frameon=False, fontsize=8)
    sigmas = {"cream": 3.0} | {name: float(flags[1]) for name, flags in methods.SIGMAS.items()}
    sigmas["cream, no Gaussian"] = 16.0  # the axis labels this place "none"
    for factor in study.factors:
        found = sorted((sigma, m) for m, sigma in sigmas.items() if study.of(m, factor))
        if len(found) < 3:
            continue
        longest = methods.WINDOW * factor
        pairs = [study.over_seeds(m, factor, lambda r: 100 * mean_recall(r, longest)) for _, m in found]
        spread.errorbar(
            [s for s, _ in found], [m for m, _ in pairs], [d for _, d in pairs], fmt="o-", color="#2a6f97", capsize=3
        )
        spread.set_title(f"recall at {longest} (s = {factor}) by sigma, %", fontsize=10)
        spread.set_xscale("log", base=2)
        spread.set_xticks([s for s, _ in found], ["none" if s == 16 else f"{s:g}" for s, _ in found])
        spread.minorticks_off()
        spread.set_xlabel("sigma (none: no Gaussian)")
        break
    save_picture(figure, path, dpi=130)
