"""Make the study's tables and pictures from its results: report.py --results results.jsonl --output FOLDER

Writes report.md, tradeoff.png, retrieval.png, depth.png and perplexity.png. Negative results are included.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

import cells
import numpy as np

from megatron_cream.common.files import save_picture

SAMPLERS = ("base", *cells.SAMPLERS)
SCALINGS = ("none", *cells.SCALINGS, *cells.CRITICAL)
TASKS = {"needle": "needle", "multikey": "16 facts in text", "lines": "16 of many lines"}
_COLOURS = {
    "cream": "#2a6f97",
    "pose": "#d08c2e",
    "pi": "#b04a3a",
    "cream even": "#57a0a8",
    "mix": "#4f8f4f",
    "randpos": "#8a6fb0",
    "full": "0.35",
    "cream long end": "#7d5a3c",
    "cream lora": "#c0559a",
    "cream lora+8": "#e08fc0",
    "base": "0.65",
}
_OFF_SCALE = ("base", "randpos")
"""Left out of pictures of perplexity."""
Value = Callable[[dict], float | None]


class Results:
    """Evaluations grouped over seeds, each scaling at its chosen learning rate."""

    def __init__(self, lines: list[dict]):
        self.evaluations = list({line["run"]: line for line in lines if line["what"] == "evaluation"}.values())
        self.training = {line["run"]: line for line in lines if line["what"] == "training"}
        creams = [line for line in self.evaluations if line["sampler"] == "cream" and not line.get("share")]
        first = min(((-line["factor"], line["seed"]) for line in creams), default=None)
        self.rates: dict[str, list[dict]] = {}
        for line in creams:
            if (-line["factor"], line["seed"]) == first and line["scaling"] not in cells.CRITICAL:
                self.rates.setdefault(line["scaling"], []).append(line)
        self.chosen = {
            scaling: min(found, key=cells.score)["rate"]
            for scaling, found in self.rates.items()
            if any(math.isfinite(cells.score(line)) for line in found)
        }
        if "theta" in self.chosen:
            self.chosen |= dict.fromkeys(cells.CRITICAL, self.chosen["theta"])
        self.factors = sorted({line["factor"] for line in self.evaluations}, reverse=True)

    def of(self, scaling: str, sampler: str, factor: int) -> list[dict]:
        """Return the evaluations of one combination without short text, one per seed."""
        key = (scaling, sampler, factor)
        every = [e for e in self.evaluations if not e.get("share")]
        found = [e for e in every if (e["scaling"], e["sampler"], e["factor"]) == key]
        return [e for e in found if sampler == "base" or e["rate"] == self.chosen.get(scaling)]

    def of_share(self) -> dict[float, list[dict]]:
        """Return the evaluations that have measured short text, by their share of it, one per seed."""
        found: dict[float, list[dict]] = {}
        for line in sorted(self.evaluations, key=lambda line: line.get("share", 0.0)):
            if line["sampler"] == "cream" and line["scaling"] == "yarn" and "short" in line:
                found.setdefault(line.get("share", 0.0), []).append(line)
        return found

    def groups(self, factor: int) -> Iterable[tuple[str, str, list[dict]]]:
        for scaling, sampler in itertools.product(SCALINGS, SAMPLERS):
            if found := self.of(scaling, sampler, factor):
                yield scaling, sampler, found

    def lengths(self, factor: int) -> list[str]:
        found = [e for e in self.evaluations if e["factor"] == factor]
        return list(next(iter(found[0]["tasks"].values())))


def accuracy(task: str, length: str) -> Value:
    return lambda e: 100 * e["tasks"][task][length]["accuracy"]


def loss(task: str, length: str) -> Value:
    return lambda e: e["tasks"][task][length]["loss"]


def perplexity(kind: str, length: str) -> Value:
    return lambda e: e["perplexity"][kind][length]


def report(results: Results) -> str:
    """Return the report as Markdown."""
    lines = ["Mean ± deviation over seeds; one seed has no deviation.", "", *_rates_table(results)]
    for factor in results.factors:
        lengths, window = results.lengths(factor), results.lengths(factor)[0]
        kinds = list(results.evaluations[0]["perplexity"])
        lines += ["", f"## {window} to {int(window) * factor} tokens"]
        for task, title in TASKS.items():
            error = _standard_error(results, factor, task, lengths[-1])
            lines += ["", f"**{title}**: answers found, % (of one run at {lengths[-1]}: ± {error:.1f}), by length", ""]
            lines += _table(results, factor, [(n, accuracy(task, n), 1) for n in lengths])
            lines += ["", f"**{title}**: loss of an answer's token, by length", ""]
            lines += _table(results, factor, [(n, loss(task, n), 3) for n in lengths])
        cut = f"the end of held-out texts of {lengths[-1]} tokens"  # so targets score different tokens
        lines += ["", f"**Perplexity** of {cut}, by length of context; GPU seconds of a run's steps", ""]
        columns = [(f"{kind} {n}", perplexity(kind, n), 3) for kind in kinds for n in lengths]
        lines += _table(results, factor, [*columns, ("GPU seconds", lambda e: _seconds(results, e), 0)])
        if pairs := _pairs(results, factor):
            lines += ["", *pairs]
    if shares := results.of_share():
        lines += ["", *_shares_table(shares)]
    return "\n".join(lines) + "\n"


def _rates_table(results: Results) -> list[str]:
    lines = ["**Learning rates**: answers' loss plus log perplexity, of `cream`; the least is held", ""]
    rates = sorted({line["rate"] for found in results.rates.values() for line in found})
    lines += _row(["scaling", *(f"{rate:g}" for rate in rates)]) + _row(["---"] * (len(rates) + 1))
    for scaling, found in results.rates.items():
        scores = {line["rate"]: cells.score(line) for line in found}
        best = results.chosen.get(scaling)
        shown = (f"**{scores[r]:.3f}**" if r == best else f"{scores[r]:.3f}" if r in scores else "" for r in rates)
        lines += _row([scaling, *shown])
    return lines


def _table(results: Results, factor: int, columns: list[tuple[str, Value, int]]) -> list[str]:
    head = ["scaling", "positions", "seeds", *(title for title, _, _ in columns)]
    lines = _row(head) + _row(["---"] * len(head))
    for scaling, sampler, found in results.groups(factor):
        values = [[v for e in found if (v := value(e)) is not None] for _, value, _ in columns]
        shown = [_cell(v, places) for v, (_, _, places) in zip(values, columns, strict=True)]
        lines += _row([scaling, "(not trained)" if sampler == "base" else sampler, str(len(found)), *shown])
    return lines


def _shares_table(shares: dict[float, list[dict]]) -> list[str]:
    """Return the table of the share of short text: what it does to short texts, and to long ones."""
    first = next(iter(shares.values()))[0]
    lengths = list(first["perplexity"][next(iter(first["perplexity"]))])
    columns: list[tuple[str, Value, int]] = [
        *((f"short {kind}", lambda e, k=kind: e["short"][k], 3) for kind in first["short"]),
        *((f"{k} {n}", perplexity(k, n), 3) for k in first["perplexity"] for n in (lengths[0], lengths[-1])),
        *((f"{task} {n}, %", accuracy(task, n), 1) for task in first["tasks"] for n in (lengths[0], lengths[-1])),
    ]
    lines = [
        "## Share of short text",
        "",
        "`yarn`, `cream`. Perplexity of short documents, each alone from position 0; perplexity of held-out text and "
        "answers found at the shortest and the longest length.",
        "",
    ]
    head = ["share", "seeds", *(title for title, _, _ in columns)]
    lines += _row(head) + _row(["---"] * len(head))
    for share, found in shares.items():
        values = [[v for e in found if (v := value(e)) is not None] for _, value, _ in columns]
        shown = [_cell(v, places) for v, (_, _, places) in zip(values, columns, strict=True)]
        lines += _row([f"{share:g}", str(len(found)), *shown])
    return lines


def _pairs(results: Results, factor: int) -> list[str]:
    """Return a table of differences between samplers, and between scalings with `cream`, that have several seeds.

    It says whether a difference exceeds what the seeds' spread explains. Without such a pair there is no table.
    """
    longer = results.lengths(factor)[1:]
    measures = [
        (lambda e: _found(e, longer), 1),
        (lambda e: statistics.fmean(loss(t, n)(e) for t in e["tasks"] for n in longer), 3),
        (lambda e: _log_perplexity(e, longer), 4),
    ]
    title = [
        "**Pairs**, mean over tasks (or kinds of text) and the lengths beyond the window: the first less the second. "
        "`yes`: more than twice the standard error that the seeds' deviations give.",
        "",
    ]
    head = ["what is the same", "pair", "found, points", "beyond", "loss", "beyond", "log perplexity", "beyond"]
    title += _row(head) + _row(["---"] * len(head))
    lines = []
    several = [(scaling, sampler, found) for scaling, sampler, found in results.groups(factor) if len(found) > 1]
    same = {scaling: {name: found for s, name, found in several if s == scaling} for scaling in SCALINGS}
    same["cream"] = {scaling: found for scaling, name, found in several if name == "cream"}
    for shared, groups in same.items():
        for one, other in itertools.combinations(groups, 2):
            row = [shared, f"{one} - {other}"]
            for value, places in measures:
                a, b = ([value(e) for e in groups[name]] for name in (one, other))
                error = math.sqrt(_deviation(a) ** 2 / len(a) + _deviation(b) ** 2 / len(b))
                difference = statistics.fmean(a) - statistics.fmean(b)
                row += [
                    f"{difference:+.{places}f} ± {error:.{places}f}",
                    "yes" if abs(difference) > 2 * error else "no",
                ]
            lines += _row(row)
    return title + lines if lines else []


def _standard_error(results: Results, factor: int, task: str, length: str) -> float:
    """Return the standard error of a run's accuracy over prompts, in percentage points: the median over runs."""
    errors = []
    for _, _, found in results.groups(factor):
        for e in found:
            values = [100 * prompt[0] for prompt in e["tasks"][task][length]["by_prompt"]]
            errors.append(statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan)
    return statistics.median(errors)


def _seconds(results: Results, evaluation: dict) -> float | None:
    """Return the GPU seconds of a run's steps; None if another run used the GPU beside it."""
    training = results.training.get(evaluation["run"], {})
    return None if training.get("shared_gpu") else training.get("seconds", 0.0)


def _row(columns: Iterable[str]) -> list[str]:
    return ["| " + " | ".join(columns) + " |"]


def _cell(values: list[float], places: int) -> str:
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.{places}f}"
    return mean if len(values) == 1 else f"{mean} ± {_deviation(values):.{places}f}"


def _deviation(values: list[float]) -> float:
    """Return the standard deviation over seeds: 0 for one seed, NaN if a value is NaN (`statistics` rejects NaN)."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _found(e: dict, lengths: list[str]) -> float:
    return statistics.fmean(accuracy(task, n)(e) for task in e["tasks"] for n in lengths)


def _log_perplexity(e: dict, lengths: list[str]) -> float:
    return statistics.fmean(math.log(perplexity(kind, n)(e)) for kind in e["perplexity"] for n in lengths)


def draw(results: Results, folder: Path) -> None:
    """Draw the pictures: of each target what is won and lost, of the longest target the rest."""
    _tradeoff(results, folder / "tradeoff.png")
    factor = results.factors[0]
    lengths = results.lengths(factor)
    kinds = list(results.evaluations[0]["perplexity"])
    by_length = lambda measure: [(int(n), measure(n)) for n in lengths]
    rows = {f"{title}: found, %": by_length(lambda n, t=task: accuracy(t, n)) for task, title in TASKS.items()}
    _picture(results, factor, rows, "tokens of the prompt", folder / "retrieval.png", log=True)
    depth = lambda d: lambda e: 100 * e["tasks"]["multikey"][lengths[-1]]["by_depth"].get(str(d), [math.nan])[0]
    rows = {f"16 facts in {lengths[-1]} tokens: found, %": [(10 * d + 5, depth(d)) for d in range(10)]}
    _picture(results, factor, rows, "depth, %", folder / "depth.png")
    rows = {f"perplexity, {kind}": by_length(lambda n, k=kind: perplexity(k, n)) for kind in kinds}
    _picture(results, factor, rows, "tokens of context", folder / "perplexity.png", log=True)


def _tradeoff(results: Results, path: Path) -> None:
    """Draw answers found over perplexity, both means over the lengths beyond the window: a panel for each target."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    count = len(results.factors)
    figure, axes = plt.subplots(1, count, figsize=(5.2 * count + 1.2, 4.4), layout="constrained", squeeze=False)
    for panel, factor in zip(axes[0], results.factors):
        lengths = results.lengths(factor)
        for scaling, sampler, found in results.groups(factor):
            if sampler in _OFF_SCALE:
                continue
            x = math.exp(statistics.fmean(_log_perplexity(e, lengths[1:]) for e in found))
            values = [_found(e, lengths[1:]) for e in found]
            y = statistics.fmean(values)
            panel.errorbar(x, y, _deviation(values), fmt="o", markersize=4, color=_COLOURS[sampler], label=sampler)
            if sampler == "cream":
                panel.annotate(scaling, (x, y), (6, -9), textcoords="offset points", fontsize=8)
        panel.set_title(f"{lengths[0]} to {int(lengths[0]) * factor} tokens", fontsize=10)
        panel.set_xlabel("perplexity beyond the window (further left is better)")
        panel.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("answers found beyond the window, %")
    _save(figure, axes, path)


def _picture(results: Results, factor: int, rows: dict, x: str, path: Path, log: bool = False) -> None:
    """Draw a column per scaling and a line per sampler, with a band of the deviation over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scalings = [
        s for s in cells.SCALINGS if any(group[0] == s and group[1] != "base" for group in results.groups(factor))
    ]
    figure, axes = plt.subplots(
        len(rows),
        len(scalings),
        figsize=(3.6 * len(scalings) + 1.2, 2.8 * len(rows)),
        layout="constrained",
        sharex=True,
        sharey="row",
        squeeze=False,
    )
    for line, (title, points) in zip(axes, rows.items()):
        line[0].set_ylabel(title)
        for panel, scaling in zip(line, scalings):
            for _, sampler, found in (group for group in results.groups(factor) if group[0] == scaling):
                if sampler in _OFF_SCALE and title.startswith("perplexity"):
                    continue
                values = [[value(e) for e in found] for _, value in points]
                means = [statistics.fmean(v) for v in values]
                spread = [_deviation(v) for v in values]
                xs, name = [at for at, _ in points], "not trained" if sampler == "base" else sampler
                panel.plot(xs, means, "o-", markersize=3, color=_COLOURS[sampler], label=name)
                low, high = ([m + sign * d for m, d in zip(means, spread)] for sign in (-1, 1))
                panel.fill_between(xs, low, high, color=_COLOURS[sampler], alpha=0.15, linewidth=0)
            if log:
                panel.set_xscale("log", base=2)
                panel.set_xticks(xs, [f"{n // 1024}K" if n >= 1024 else str(n) for n in xs])
                panel.minorticks_off()
            panel.spines[["top", "right"]].set_visible(False)
    for panel, scaling in zip(axes[0], scalings):
        panel.set_title(scaling, fontsize=10)
    for panel in axes[-1]:
        panel.set_xlabel(x)
    _save(figure, axes, path)


def _save(figure, axes, path: Path) -> None:
    """Save a figure with one legend of all its panels."""
    import matplotlib.pyplot as plt

    handles = {label: handle for panel in axes.flat for handle, label in zip(*panel.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, frameon=False, fontsize=8, loc="outside right upper")
    save_picture(figure, path, dpi=130)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results", type=Path, nargs="+", required=True, help="one or more; of a run in several, the last"
    )
    parser.add_argument("--output", type=Path, required=True)
    flags = parser.parse_args()
    lines = [json.loads(line) for file in flags.results for line in file.read_text().splitlines()]
    results = Results(lines)
    if not results.evaluations:
        print(f"report.py: error: --results {flags.results[0]}: no evaluation there yet", file=sys.stderr)
        return 2
    flags.output.mkdir(parents=True, exist_ok=True)
    (flags.output / "report.md").write_text(report(results))
    draw(results, flags.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
