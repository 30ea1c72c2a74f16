"""Table and pictures of the study, made from its results."""

import itertools
import math
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
RECIPES = {
    "linear, cream": ((methods.PUBLISHED, "cream"), "#b04a3a"),
    "yarn, cream": (("yarn", "cream"), "#8a6fb0"),
    "theta, cream": (("theta", "cream"), "#2a6f97"),
    "wide theta, cream": ((methods.WIDE, "cream"), "#57a0a8"),
    "4 wide theta, cream": ((methods.WIDER, "cream"), "#4f8f4f"),
    "yarn, cream + randpos": (("yarn", "cream + randpos"), "#d08c2e"),
    "yarn, cream, long end": (("yarn", methods.LONG_END), "0.35"),
}
"""Scaling, method and colour of the lines of scalings.png."""
_COLOURS |= {name: colour for name, (_, colour) in RECIPES.items()}


def write(results: list[dict], folder: Path) -> None:
    """Write table.md, and the pictures of the parts of the study that have results, to `folder`.

    `scalings` has scalings.png, `samplers` recall.png, perplexity.png and cost.png.
    """
    study = _Results(results)
    if not study.factors:
        return
    (folder / "table.md").write_text(table(results))
    if any(study.held("theta", "cream", factor) for factor in study.factors):
        _by_scaling(study, folder / "scalings.png")
    if any(study.of(method, factor) for method in COMPARED for factor in study.factors):
        _by_depth(study, folder / "recall.png")
        _by_length(study, folder / "perplexity.png")
        _cost_and_sigma(study, folder / "cost.png")


class _Results:
    """Measurements, by method and factor, over the seeds.

    rates: the learning rates that were chosen: {scaling: {seed of the search: rate}}. A search's rates are for its seed and
        the seeds after it, up to the next search's.
    """

    def __init__(self, results: list[dict]):
        # Results of before the part `scalings` have neither a scaling nor a learning rate.
        self.all = [{"scaling": methods.PUBLISHED, "rate": methods.RATE} | r for r in results]
        self.factors = sorted({r["factor"] for r in results if r["method"] != "base"})
        seeds = sorted({r["seed"] for r in results})
        self.rates = {
            scaling: {seed: rate for seed in seeds if (rate := chosen_rate(self.all, scaling, seed)) is not None}
            for scaling in methods.SCALINGS
        }
        samplers = [r for r in self.all if (r["scaling"], r["rate"]) == (methods.PUBLISHED, methods.RATE)]
        tried = {seed for rates in self.rates.values() for seed in rates}
        # A search also has a run of `cream` at the rate of the part `samplers`.
        self._with_samplers = {
            r["seed"] for r in samplers if r["method"] not in ("base", "cream") or r["seed"] not in tried
        }

    def held(self, scaling: str, method: str, factor: int) -> list[dict]:
        """Return the results at the rate that was chosen for their seed."""
        return [r for r in self._find(scaling, method, factor) if self._is_held(r)]

    def of(self, method: str, factor: int, scaling: str = methods.PUBLISHED, rate: float = methods.RATE) -> list[dict]:
        """Return the results at one rate: those of `held`, and those of the part `samplers`."""
        found = [r for r in self._find(scaling, method, factor) if r["rate"] == rate]
        return [r for r in found if self._is_held(r) or self._is_of_samplers(r)]

    def recipes(self, factor: int) -> list[tuple[str, str, float]]:
        """Return scaling, method and learning rate of every row of a factor's table."""
        rates = [(scaling, rate) for scaling, chosen in self.rates.items() for rate in sorted(set(chosen.values()))]
        rates = list(dict.fromkeys([(methods.PUBLISHED, methods.RATE), *rates]))
        every = ((scaling, method, rate) for scaling, rate in rates for method in methods.ALL)
        return [(scaling, m, rate) for scaling, m, rate in every if self.of(m, factor, scaling, rate)]

    def _find(self, scaling: str, method: str, factor: int) -> list[dict]:
        return [r for r in self.all if (r["scaling"], r["method"], r["factor"]) == (scaling, method, factor)]

    def _is_held(self, result: dict) -> bool:
        rates = self.rates[result["scaling"]]
        search = max((seed for seed in rates if seed <= result["seed"]), default=None)
        return search is not None and result["rate"] == rates[search]

    def _is_of_samplers(self, result: dict) -> bool:
        of_part = (result["scaling"], result["rate"]) == (methods.PUBLISHED, methods.RATE)
        return of_part and (result["seed"] in self._with_samplers or result["method"] == "base")

    def over_seeds(self, method: str, factor: int, value: Callable[[dict], float]) -> tuple[float, float] | None:
        """Return the mean and standard deviation of `value` with linear scaling, or None if there is no run."""
        return _spread([value(r) for r in self.of(method, factor)])


def table(results: list[dict]) -> str:
    """Return Markdown tables: the bases, the learning rates, one per factor with a row per recipe, and the pairs."""
    study = _Results(results)
    lengths = sorted({int(n) for r in results for n in r["recall"]})
    lines = ["Mean and deviation over seeds. Recall in %, over all depths unless it says otherwise.", ""]
    lines += _head(["before", "seeds", *(f"recall at {n}" for n in lengths)])
    bases = [study.over_seeds("base", 1, lambda r, n=n: 100 * mean_recall(r, n)) for n in lengths]
    lines += _row(["the base", str(len(study.of("base", 1))), *map(_cell, bases)])
    lines += _rate_lines(study)
    for factor in study.factors:
        window, longest = methods.WINDOW, methods.WINDOW * factor
        head = [f"s = {factor}", "positions", "learning rate", "seeds", f"recall at {longest}", "at the worst depth"]
        head += [f"recall at {window}", f"perplexity at {longest}", f"perplexity at {window}", "GPU seconds"]
        lines += ["", *_head(head)]
        for scaling, method, rate in study.recipes(factor):
            found = study.of(method, factor, scaling, rate)
            measures = [
                lambda r: 100 * mean_recall(r, longest),
                lambda r: 100 * min(r["recall"][str(longest)].values()),
                lambda r: 100 * mean_recall(r, window),
                lambda r: r["perplexity"][str(longest)],
                lambda r: r["perplexity"][str(window)],
            ]
            places = [1, 1, 1, 2, 2]
            cells = [_cell(_spread([m(r) for r in found]), p) for m, p in zip(measures, places)]
            alone = [r["seconds"] for r in found if r["alone"]]
            cells = [f"{rate:g}", str(len(found)), *cells, f"{alone[0]:.1f}" if alone else ""]
            lines += _row([scaling, method, *cells])
    return "\n".join([*lines, *_pair_lines(study)]) + "\n"


def _rate_lines(study: _Results) -> list[str]:
    """Return the table of the learning rates that were tried, if any."""
    scores = {
        (seed, scaling): _scores(study.all, scaling, seed) for scaling in methods.TRIED for seed in study.rates[scaling]
    }
    if not scores:
        return []
    lines = ["", "Loss of the answers plus log perplexity by learning rate, `cream`, one seed; the least is used.", ""]
    lines += _head(["scaling", "seed", *(f"{rate:g}" for rate in methods.RATES)])
    for (seed, scaling), found in sorted(scores.items()):
        best = min(found, key=found.get)
        cells = ["" if rate not in found else f"{found[rate]:.3f}" for rate in methods.RATES]
        cells = [f"**{cell}**" if rate == best else cell for rate, cell in zip(methods.RATES, cells)]
        lines += _row([scaling, str(seed), *cells])
    return lines


def chosen_rate(results: list[dict], scaling: str, seed: int) -> float | None:
    """Return the learning rate with the lowest score, or None if this seed has not tried several."""
    scores = _scores(results, "theta" if scaling in methods.THETAS else scaling, seed)
    return min(scores, key=scores.get) if scores else None


def _scores(results: list[dict], scaling: str, seed: int) -> dict[float, float]:
    """Return the score of each learning rate that was tried with `cream` on a seed, as in the study of a real model.

    It is the mean loss of the answers over lengths, plus the mean log perplexity over lengths, in nats.
    """
    tried: dict[int, dict[float, float]] = {}
    for r in results:
        if (r["method"], r.get("scaling"), r["seed"]) == ("cream", scaling, seed) and "loss" in r:
            score = statistics.fmean(r["loss"].values()) + statistics.fmean(map(math.log, r["perplexity"].values()))
            if math.isfinite(score):
                tried.setdefault(r["factor"], {})[r["rate"]] = score
    most = max(tried.values(), key=len, default={})
    return most if len(most) > 1 else {}


def _pair_lines(study: _Results) -> list[str]:
    """Return the table of differences, over the seeds that both recipes of a pair have."""
    head = ["s", "what is the same", "pair", "seeds", "recall at the target, points", "beyond"]
    head += ["recall over lengths, points", "beyond", "loss over lengths", "beyond"]
    head += ["log perplexity at the target", "beyond", "log perplexity over lengths", "beyond"]
    rows = []
    for factor in study.factors:
        longest = methods.WINDOW * factor
        lengths = [methods.WINDOW * 2**i for i in range(1, factor.bit_length())]
        measures = [
            (1, lambda r: 100 * mean_recall(r, longest)),
            (1, lambda r: statistics.fmean(100 * mean_recall(r, n) for n in lengths)),
            (3, lambda r: statistics.fmean(r["loss"][str(n)] for n in lengths)),
            (3, lambda r: math.log(r["perplexity"][str(longest)])),
            (3, lambda r: statistics.fmean(math.log(r["perplexity"][str(n)]) for n in lengths)),
        ]
        recipes = [(scaling, m) for scaling in methods.SCALINGS for m in methods.ALL if study.held(scaling, m, factor)]
        for same, first, second in _pairs(recipes):
            one, two = (
                {r["seed"]: r for r in study.held(*recipe, factor) if "loss" in r} for recipe in (first, second)
            )
            seeds = sorted(one.keys() & two.keys())
            if len(seeds) < 2:
                continue
            cells = []
            for places, m in measures:
                cells += _difference([m(one[s]) for s in seeds], [m(two[s]) for s in seeds], places)
            names = [" ".join(part for part in recipe if part != same) for recipe in (first, second)]
            rows += _row([str(factor), same, f"{names[0]} - {names[1]}", str(len(seeds)), *cells])
    if not rows:
        return []
    rule = "`yes`: more than twice the standard error of these differences."
    means = (
        "Each recipe has the rate that was chosen for its seed. Means over lengths are over those beyond the window; the "
        "loss is that of the answers."
    )
    return ["", f"**Pairs**: the first less the second, on the same bases. {means} {rule}", "", *_head(head), *rows]


def _pairs(held: list[tuple[str, str]]) -> Iterable[tuple[str, tuple, tuple]]:
    """Yield what is the same and two recipes: against CREAM as published, by scaling, and by positions."""
    if {scaling for scaling, _ in held} == {methods.PUBLISHED}:
        return
    published = (methods.PUBLISHED, "cream")
    for recipe in held:
        if published in held and recipe[0] != methods.PUBLISHED and recipe[1] != "cream":
            yield "nothing", recipe, published
    for first, second in itertools.combinations(held, 2):
        if first[1] == second[1]:
            first, second = (second, first) if first[0] == methods.PUBLISHED else (first, second)
            yield first[1], first, second
        elif first[0] == second[0] and "cream" in (first[1], second[1]):
            first, second = (first, second) if second[1] == "cream" else (second, first)
            yield first[0], first, second


def _difference(one: list[float], two: list[float], places: int) -> tuple[str, str]:
    """Return the mean difference over bases with its standard error, and whether it exceeds twice that.

    Each base is one of a pair: what makes a base recall more or less than others is in both values.
    """
    differences = [a - b for a, b in zip(one, two, strict=True)]
    difference = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{difference:+.{places}f} ± {error:.{places}f}", "yes" if abs(difference) > 2 * error else "no"


def mean_recall(result: dict, length: int) -> float:
    """Return the mean recall over all depths."""
    return statistics.mean(result["recall"][str(length)].values())


def _spread(values: list[float]) -> tuple[float, float] | None:
    if not values:
        return None
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _head(cells: list[str]) -> list[str]:
    return _row(cells) + _row(["---"] * len(cells))


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
        lengths = [methods.WINDOW * 2**i for i in range(factor.bit_length())]
        for method in COMPARED:
            if study.of(method, factor):
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


def _by_scaling(study: _Results, path: Path) -> None:
    """Draw recall and perplexity by length for some recipes of the part `scalings`."""
    figure, axes = _plots(2, len(study.factors), 3.0)
    for column, factor in zip(axes.T, study.factors):
        lengths = [methods.WINDOW * 2**i for i in range(factor.bit_length())]
        for name, ((scaling, method), _) in RECIPES.items():
            found = study.held(scaling, method, factor)
            if not found:
                continue
            recall = [_spread([100 * mean_recall(r, n) for r in found]) for n in lengths]
            perplexity = [_spread([r["perplexity"][str(n)] for r in found]) for n in lengths]
            _line(column[0], lengths, recall, name)
            _line(column[1], lengths, perplexity, name)
        for panel in column:
            panel.set_xscale("log", base=2)
            panel.set_xticks(lengths, [str(n) for n in lengths])
            panel.minorticks_off()
        column[0].set_title(f"extended to {methods.WINDOW * factor} (s = {factor})", fontsize=10)
        column[1].set_xlabel("tokens of context")
    axes[0][0].set_ylabel("recall, %")
    axes[1][0].set_ylabel("held-out perplexity")
    # Not every recipe ran at every factor.
    lines = {line.get_label(): line for panel in axes[0] for line in panel.lines}
    axes[0][-1].legend(
        handles=list(lines.values()), frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5)
    )
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
