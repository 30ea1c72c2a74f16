"""Means of a task's scores, as JSON values for summary.json and as a table for the console.

Scores are from 0 to 1 in the JSON values and in percent in the tables.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from typing import Any

from rich.table import Table

from megatron_cream.evaluation.tasks import kv
from megatron_cream.evaluation.tasks.ruler import suite as ruler

Records = list[dict[str, Any]]


def summarise(task: str, records: Records) -> dict[str, Any]:
    """Return the means of a task's scores, with strings as keys, as in JSON.

    Returns: {"score": mean, "examples": number of records} and, by task:
        needle: by_length_and_depth {length: {depth: mean}}; rouge_l if the records have it.
        lines: by_length {length or number of lines: mean}.
        kv: by_position {number of keys or length: {depth: mean}}.
        ruler: by_task {task: {length: mean}}, by_length {length: mean over tasks}, tasks (their number),
            missing_tasks, threshold, effective_length; the last two are None if tasks are missing.
        longbench: by_dataset {name: mean}; score is the mean over data sets, as published.
    """
    summary: dict[str, Any] = {"score": _mean(r["score"] for r in records), "examples": len(records)}
    if task == "needle":
        summary["by_length_and_depth"] = _means_by_two(records, lambda r: r["length"], _depth_key)
        if records and "rouge_l" in records[0]:
            summary["rouge_l"] = _mean(r["rouge_l"] for r in records)
    elif task == "lines":
        summary["by_length"] = _means_by(records, _size_key)
    elif task == "kv":
        summary["by_position"] = _means_by_two(records, _size_key, lambda r: f"{kv.find_asked_depth(r):.4g}")
    elif task == "ruler":
        by_task = _means_by_two(records, lambda r: r["part"], lambda r: r["length"])
        lengths = sorted({length for means in by_task.values() for length in means}, key=int)
        by_length = {
            length: _mean(means[length] for means in by_task.values() if length in means) for length in lengths
        }
        missing = [task for task in ruler.TASKS if not by_task.get(task, {}).keys() >= set(lengths)]
        percent = {int(length): 100 * mean for length, mean in by_length.items()}
        summary |= {
            "by_task": by_task,
            "by_length": by_length,
            "tasks": len(ruler.TASKS) - len(missing),
            "missing_tasks": missing,
            "threshold": None if missing else ruler.THRESHOLD / 100,
            "effective_length": None if missing else ruler.effective_length(percent),
        }
    elif task == "longbench":
        summary["by_dataset"] = _means_by(records, lambda r: r["part"])
        summary["score"] = _mean(summary["by_dataset"].values())
    return summary


def build_table(task: str, summary: dict[str, Any]) -> Table:
    """Build the console table of a task from its summary.

    Args:
        task: the name of the task.
        summary: what `summarise` returned; for perplexity, what `runner.summarise_perplexity` returned.
    """
    if task == "perplexity":
        return _build_perplexity_table(summary)
    title = f"{task}: {_format_share(summary['score'])} % over {summary['examples']} examples"
    if "rouge_l" in summary:
        title += f", ROUGE-L {summary['rouge_l']:.3f}"
    if task == "needle":
        return _build_grid(title, "depth \\ length", _transpose(summary["by_length_and_depth"]), row_name=_format_depth)
    if task == "kv":
        return _build_grid(title, "", summary["by_position"], column_name=lambda depth: f"at {_format_depth(depth)}")
    if task == "ruler":
        title += f"; {describe_effective_length(summary)}"
        return _build_grid(title, "task \\ length", summary["by_task"] | {"mean": summary["by_length"]})
    rows = summary["by_length"] if task == "lines" else summary["by_dataset"]
    return _build_grid(title, "", {name: {"%": mean} for name, mean in rows.items()})


def describe_effective_length(summary: dict[str, Any]) -> str:
    """Say the effective length of a RULER summary, or why there is none."""
    if summary["missing_tasks"]:
        return f"mean over {summary['tasks']} of {len(ruler.TASKS)} tasks, no effective length"
    length = summary["effective_length"]
    return f"effective length {f'{length:,}' if length else 'below the shortest'} (at least {ruler.THRESHOLD} %)"


def _build_perplexity_table(summary: dict[str, Any]) -> Table:
    with_longppl = any("longppl" in row for row in summary.values())
    first = next(iter(summary.values()))
    title = f"perplexity by context length, convention {first.get('convention', 'ours')}"
    if with_longppl:
        title += f"; LongPPL {'after a BOS' if first.get('longppl_bos') else 'without BOS'}"
    result = Table(title=title, min_width=len(title))
    for name in ("context", "perplexity", "tokens", *(("LongPPL", "key tokens") if with_longppl else ())):
        result.add_column(name, justify="right")
    for length, row in summary.items():
        cells = [length, _format_number(row["perplexity"]), f"{row['tokens']:,}"]
        if with_longppl:
            cells += [_format_number(row["longppl"]), f"{row['key_tokens']:,}"]
        result.add_row(*cells)
    return result


def _build_grid(
    title: str,
    corner: str,
    rows: dict[str, dict[str, float]],
    row_name: Callable[[str], str] = str,
    column_name: Callable[[str], str] = str,
) -> Table:
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    result = Table(title=title, min_width=len(title))
    result.add_column(corner)
    for column in columns:
        result.add_column(column_name(column), justify="right")
    for name, row in rows.items():
        result.add_row(row_name(name), *(_format_share(row[column]) if column in row else "" for column in columns))
    return result


def _means_by_two(records: Records, outer: Callable[[dict], Hashable], inner: Callable[[dict], Hashable]) -> dict:
    groups = defaultdict(list)
    for record in records:
        groups[str(outer(record))].append(record)
    return {name: _means_by(group, inner) for name, group in groups.items()}


def _means_by(records: Records, key: Callable[[dict], Hashable]) -> dict[str, float]:
    groups = defaultdict(list)
    for record in records:
        groups[str(key(record))].append(record["score"])
    return {name: _mean(scores) for name, scores in groups.items()}


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


def _depth_key(record: dict) -> str:
    return f"{record['depth']:.4g}"


def _size_key(record: dict) -> str:
    """Return an example's requested size: its part, such as "75_keys", or its length."""
    return record["part"] or str(record["length"])


def _transpose(rows: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    columns = dict.fromkeys(column for row in rows.values() for column in row)
    return {column: {name: row[column] for name, row in rows.items() if column in row} for column in columns}


def _format_share(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _format_depth(depth: str) -> str:
    return f"{100 * float(depth):.0f} %"


def _format_number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value < 1e4 else f"{value:.3g}"
