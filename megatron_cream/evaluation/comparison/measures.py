"""What changed between two models: rows of means with their intervals, by length, depth, task or data set."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from megatron_cream.evaluation.comparison.bootstrap import Interval, bootstrap_mean
from megatron_cream.evaluation.comparison.sides import Pair
from megatron_cream.evaluation.tasks import kv, longbench

FEW = 10
"""With fewer examples than this no row claims a change."""

Records = list[tuple[dict[str, Any], dict[str, Any]]]
Key = Callable[[dict[str, Any]], tuple[Any, str]]


@dataclass(frozen=True)
class Row:
    """One line of a table: the same examples, answered by both models.

    names: of the row, one for each heading of its table.
    kind: score: base and extended are percent and the change is in points; perplexity: the change is in percent of
        the base model's perplexity, and less is better.
    base: mean of the base model, with the interval of that mean alone.
    extended: the same of the extended model.
    change: of the paired differences.
    examples: how many pairs.
    longest: context length of the longest example in tokens; 0 for tasks that have none.
    """

    names: tuple[str, ...]
    kind: Literal["score", "perplexity"]
    base: Interval
    extended: Interval
    change: Interval
    examples: int
    longest: int = 0

    @property
    def is_uniform(self) -> bool:
        """Whether every example changed by the same amount, so that a bootstrap has no spread."""
        return self.change.low == self.change.high

    @property
    def verdict(self) -> str:
        if self.examples < FEW:
            return "few examples"
        if self.is_uniform and self.change.mean == 0:
            return "equal"
        if self.change.low <= 0 <= self.change.high:
            return "not clear"
        return "better" if (self.change.mean > 0) == (self.kind == "score") else "worse"


@dataclass(frozen=True)
class Table:
    title: str
    headings: tuple[str, ...]
    rows: list[Row]


@dataclass(frozen=True)
class Comparison:
    """All that a page says.

    pairs: results, in the order of the page.
    window: positions of the base model; None if its results do not say.
    extended_window: the same of the extended model.
    beyond: a row for each task, of the examples that are longer than the base model's window; of all lengths where
        that is unknown.
    within: a row for each task, of the examples that fit into it, and of tasks without a length.
    tables: by title of the pair.
    """

    pairs: list[Pair]
    window: int | None
    extended_window: int | None
    beyond: list[Row]
    within: list[Row]
    tables: dict[str, list[Table]]


def format_tokens(count: int) -> str:
    """Write a number of tokens as people say it, without loss: 8K is 8,192."""
    return f"{count // 1024:,}K" if count >= 1024 and count % 1024 == 0 else f"{count:,}"


def compare(pairs: list[Pair]) -> Comparison:
    """Compute all rows; seconds for thousands of examples."""
    order = {task: place for place, task in enumerate(_TABLES)}
    pairs = sorted(pairs, key=lambda pair: order.get(pair.task, len(order)))
    window = _find_positions(pairs, "base")
    beyond, within = _make_overview(pairs, window)
    tables = {pair.title: _make_tables(pair) for pair in pairs}
    return Comparison(pairs, window, _find_positions(pairs, "extended"), beyond, within, tables)


def _find_positions(pairs: list[Pair], side: str) -> int | None:
    for pair in pairs:
        positions = getattr(pair, side).summary.get("positions")
        if isinstance(positions, int) and 0 < positions < 1 << 32:  # more: the configuration names none
            return positions
    return None


def _make_tables(pair: Pair) -> list[Table]:
    """Return the tables of one task, the most important first."""
    records = list(pair.records())
    if pair.task == "perplexity":
        return _make_perplexity_tables(pair, records)
    if not records:
        return []
    return [
        Table(title, headings, make_score_rows(records, keys))
        for title, headings, keys in _TABLES.get(pair.task, _BY_PART)
    ]


def _make_overview(pairs: list[Pair], window: int | None) -> tuple[list[Row], list[Row]]:
    """Return (rows beyond the base model's window, rows within it and of tasks without a length)."""
    beyond: list[Row] = []
    within: list[Row] = []
    for pair in pairs:
        records = list(pair.records())
        if pair.task == "harness":
            for row in make_score_rows(records, (_get_part,)):
                title = pair.task if pair.base.folder.name == row.names[0] else pair.title  # a suite's folder
                within.append(_rename(row, f"{title}: {row.names[0]}"))
            continue
        for is_within, target in ((True, within), (False, beyond)):
            if pair.task == "perplexity":
                rows = _make_perplexity_rows(records, "nll", "tokens")
                rows = [row for row in rows if _is_within(row.longest, window) == is_within][-1:]  # the longest
                target += [_rename(row, f"{pair.title}, context {row.names[0]}") for row in rows]
            else:
                some = [each for each in records if _is_within(_count_tokens(pair, each[0]), window) == is_within]
                if some:
                    weights = _weigh_alike(some) if pair.task == "longbench" else None
                    target.append(_make_score_row((_name_in_overview(pair, window, is_within),), some, weights))
    return beyond, within


def make_score_rows(records: Records, keys: tuple[Key, ...]) -> list[Row]:
    """Return a row for each group of examples with the same keys, sorted by them."""
    groups: dict[tuple[tuple[Any, str], ...], Records] = {}
    for base, extended in records:
        groups.setdefault(tuple(key(base) for key in keys), []).append((base, extended))
    return [_make_score_row(tuple(text for _, text in group), groups[group]) for group in sorted(groups)]


def _count_tokens(pair: Pair, record: dict[str, Any]) -> int:
    """Return the tokens of an example's prompt and answer; LongBench's `length` is only their maximum."""
    dataset = longbench.DATASETS.get(record["part"].removesuffix("_e")) if pair.task == "longbench" else None
    if dataset is None or "prompt_tokens" not in record:
        return record["length"]
    return min(record["length"], record["prompt_tokens"] + dataset.max_new_tokens)


def _weigh_alike(records: Records) -> np.ndarray:
    """Return weights with which the mean over examples is the mean over data sets, as in LongBench's score."""
    counts = Counter(base["part"] for base, _ in records)
    return np.array([1 / counts[base["part"]] for base, _ in records])


def _make_score_row(names: tuple[str, ...], records: Records, weights: np.ndarray | None = None) -> Row:
    base, extended = (100 * np.array([pair[side]["score"] for pair in records], dtype=float) for side in (0, 1))
    return Row(
        names,
        "score",
        bootstrap_mean(base, weights),
        bootstrap_mean(extended, weights),
        bootstrap_mean(extended - base, weights),
        len(records),
        max(pair[0]["length"] for pair in records),
    )


def _make_perplexity_tables(pair: Pair, records: Records) -> list[Table]:
    tables = [Table("by length of the context", ("context",), _make_perplexity_rows(records, "nll", "tokens"))]
    if pair.base.settings.get("key_token_model"):  # else each model has chosen its own tokens, which do not compare
        rows = _make_perplexity_rows(records, "key_nll", "key_tokens")
        tables.append(Table("LongPPL, by length of the context", ("context",), rows))
    return tables


def _make_perplexity_rows(records: Records, nll: str, tokens: str) -> list[Row]:
    """Return a row for each context length: means per token over documents, which weigh by their tokens."""
    rows = []
    for length in sorted({length for base, _ in records for length in base["lengths"]}, key=int):
        parts = [(base["lengths"][length], extended["lengths"][length]) for base, extended in records]
        parts = [part for part in parts if part[0].get(tokens)]
        if not parts:
            continue
        weights = np.array([part[0][tokens] for part in parts], dtype=float)
        base, extended = (np.array([part[side][nll] for part in parts]) / weights for side in (0, 1))
        change = bootstrap_mean(extended - base, weights)
        rows.append(
            Row(
                (format_tokens(int(length)),),
                "perplexity",
                _apply(np.exp, bootstrap_mean(base, weights)),
                _apply(np.exp, bootstrap_mean(extended, weights)),
                _apply(lambda value: 100 * np.expm1(value), change),
                len(parts),
                int(length),
            )
        )
    return rows


def _apply(function: Callable[[float], Any], interval: Interval) -> Interval:
    """Apply a growing function to the mean and both ends."""
    with np.errstate(over="ignore"):
        return Interval(*(float(function(value)) for value in (interval.mean, interval.low, interval.high)))


def _is_within(length: int, window: int | None) -> bool:
    return window is not None and length <= window


def _rename(row: Row, name: str) -> Row:
    return Row((name,), row.kind, row.base, row.extended, row.change, row.examples, row.longest)


def _name_in_overview(pair: Pair, window: int | None, is_within: bool) -> str:
    if window is None:
        return pair.title
    return f"{pair.title}, {'up to' if is_within else 'beyond'} {format_tokens(window)}"


# Keys of a group: what sorts it, and its text.


def _get_length(record: dict[str, Any]) -> tuple[int, str]:
    return record["length"], format_tokens(record["length"])


def _get_depth(record: dict[str, Any]) -> tuple[int, str]:
    return round(100 * record["depth"]), f"{100 * record['depth']:.0f} %"


def _get_place(record: dict[str, Any]) -> tuple[int, str]:
    return _get_depth({"depth": kv.find_asked_depth(record)})


def _get_part(record: dict[str, Any]) -> tuple[int, str]:
    return 0, record["part"]


def _get_size(record: dict[str, Any]) -> tuple[int, str]:
    """The number of keys or lines where that was asked for, else the length."""
    number, _, rest = record["part"].partition("_")
    return (int(number), f"{number} {rest}") if number.isdecimal() else _get_length(record)


_BY_PART = [("by part", ("part",), (_get_part,))]
_TABLES: dict[str, list[tuple[str, tuple[str, ...], tuple[Key, ...]]]] = {
    "needle": [
        ("by length", ("length",), (_get_length,)),
        ("by depth", ("depth",), (_get_depth,)),
        ("by length and depth", ("length", "depth"), (_get_length, _get_depth)),
    ],
    "kv": [
        ("by size", ("size",), (_get_size,)),
        ("by size and place", ("size", "place of the pair"), (_get_size, _get_place)),
    ],
    "lines": [("by length", ("length",), (_get_size,))],
    "ruler": [
        ("by length", ("length",), (_get_length,)),
        ("by task and length", ("task", "length"), (_get_part, _get_length)),
    ],
    "longbench": [("by data set", ("data set",), (_get_part,))],
    "perplexity": [],
    "harness": [("by task", ("task",), (_get_part,))],
}
"""{task: (title, headings, keys) of its tables}, in the order of the page; `_make_perplexity_tables` has its own."""
