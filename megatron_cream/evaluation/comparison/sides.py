"""The two sides of a comparison: finished results of two models, made with the same settings, paired by example."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cream.common.errors import UsageError
from megatron_cream.common.files import read_json
from megatron_cream.evaluation.result_lines import read_records
from megatron_cream.evaluation.results import FORMER_SETTINGS, RESULTS, SUMMARY, shorten
from megatron_cream.evaluation.suites import read_states

BASE, EXTENDED = "BASE", "EXTENDED"
_OWN_SETTINGS = ("tokenizer",)  # each model may name its own; fingerprints are compared
_SAME_IN_A_PAIR = ("part", "length", "depth", "answers", "prompt_tokens", "prompt", "metric", "tokens")


@dataclass(frozen=True)
class Result:
    """One finished folder of `evaluate.py`.

    summary: all of summary.json.
    records: of results.jsonl, by name of the example.
    """

    folder: Path
    summary: dict[str, Any]
    records: dict[str, dict[str, Any]]

    @property
    def task(self) -> str:
        return self.summary["settings"]["command"]

    @property
    def model(self) -> dict[str, Any]:
        return self.summary["model"]

    @property
    def model_name(self) -> str:
        return Path(self.summary["model_path"]).name or self.summary["model_path"]

    @property
    def dtype(self) -> str:
        """The model's dtype, and that of keys and values if it is another."""
        kept = self.model.get("kv_cache_dtype")
        return f"{self.model.get('dtype')}{f' with keys and values in {kept}' if kept else ''}"

    @property
    def gpu(self) -> str:
        name = self.summary.get("versions", {}).get("gpu", "none")
        return "a CPU" if name == "none" else f"GPU {name}"

    @property
    def settings(self) -> dict[str, Any]:
        """What both sides must have in common."""
        return {name: value for name, value in self.summary["settings"].items() if name not in _OWN_SETTINGS}

    @property
    def key(self) -> str:
        """The settings as text, the same where an earlier version did not write down what it always did."""
        settings = {name: value for name, value in self.settings.items() if not _is_former(name, value)}
        return json.dumps(settings, sort_keys=True)

    def get_setting(self, name: str) -> Any:
        return self.settings.get(name, FORMER_SETTINGS.get(name))


@dataclass(frozen=True)
class Pair:
    """Results of one task by both models, over the same examples.

    title: the task, and the folder's name where a task was run more than once.
    """

    base: Result
    extended: Result
    title: str

    @property
    def task(self) -> str:
        return self.base.task

    def records(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Yield (record of the base model, record of the extended model) of each example."""
        for name, record in self.base.records.items():
            yield record, self.extended.records[name]


def read_pairs(base: Path, extended: Path, tasks: list[str] | None = None) -> list[Pair]:
    """Read the results of both models and pair them by settings.

    Args:
        base: a folder of results, or a folder of such folders.
        extended: the same, of the extended model.
        tasks: leave out all others; None compares all.

    Raises:
        UsageError: a side has no results, results of several models, or lacks what the other side has; or the two
            sides were made with other settings, tokenizers or examples.
    """
    sides = [_read_side(folder, name, tasks) for folder, name in ((base, BASE), (extended, EXTENDED))]
    unpaired = find_unpaired(base, extended)
    sides = [[result for result in side if result.folder.name not in unpaired] for side in sides]
    if not all(sides):
        raise UsageError(
            f"{EXTENDED} {extended}: has none of the evaluations that {BASE} {base} has. Run the same suite"
        )
    if _get_identity(sides[0][0]) == _get_identity(sides[1][0]):
        raise UsageError(f"{EXTENDED} {extended}: has results of the same model as {BASE} {base}. Give another folder")
    pairs = []
    for ours, theirs in _match(*sides):
        _check_examples(ours, theirs)
        repeated = sum(other.task == ours.task for other in sides[0]) > 1
        pairs.append(Pair(ours, theirs, f"{ours.task} ({ours.folder.name})" if repeated else ours.task))
    return pairs


def find_unpaired(base: Path, extended: Path) -> dict[str, str]:
    """Return {name: side that has it} of the evaluations that only one of two suites finished.

    A suite leaves out what it does not find. In other folders a missing evaluation is an error.
    """
    suites = [read_states(folder, side) for folder, side in ((base, BASE), (extended, EXTENDED))]
    if not all(suites):
        return {}
    ours, theirs = ({run["name"] for run in suite["runs"] if run["state"] == "finished"} for suite in suites)
    return dict.fromkeys(sorted(ours - theirs), BASE) | dict.fromkeys(sorted(theirs - ours), EXTENDED)


def describe_differences(pairs: list[Pair]) -> list[str]:
    """Return a sentence for each thing beside the model that differs and may move scores a little."""
    found = {}
    for pair in pairs:
        for name, default in (("dtype", None), ("engine", None), ("kv_cache_dtype", "auto")):
            ours, theirs = (side.model.get(name, default) for side in (pair.base, pair.extended))
            if ours != theirs:
                found[f"The base model ran with {name} {ours}, the extended model with {name} {theirs}."] = True
        ours, theirs = (side.gpu for side in (pair.base, pair.extended))
        if ours != theirs:
            found[f"The base model ran on {ours}, the extended model on {theirs}."] = True
    return list(found)


def _read_side(folder: Path, side: str, tasks: list[str] | None) -> list[Result]:
    if not folder.is_dir():
        raise UsageError(f"{side} {folder}: no such folder. Give a folder that evaluate.py filled")
    candidates = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    folders = [path for path in candidates if (path / SUMMARY).is_file()]
    if folder in folders:
        folders = [folder]
    results = [result for path in folders if (result := _read_result(path, side, tasks))]
    if not results:
        wanted = f" of --tasks {' '.join(tasks)}" if tasks and folders else ""
        raise UsageError(f"{side} {folder}: has no results{wanted} (no {SUMMARY}). Run evaluate.py with a task first")
    for result in results:
        if _get_identity(result) != _get_identity(results[0]):
            raise UsageError(
                f"{side} {folder}: {results[0].folder.name} and {result.folder.name} are results of different models. "
                "Give a folder of one model's results"
            )
    return results


def _read_result(folder: Path, side: str, tasks: list[str] | None) -> Result | None:
    """The folder's result; None where `tasks` leaves it out."""
    summary = read_json(folder / SUMMARY, "a summary of evaluate.py")
    try:
        task, finished = summary["settings"]["command"], summary["finished"]
        complete = isinstance(task, str) and isinstance(summary["model_path"], str) and summary["model"]["digest"]
    except (KeyError, TypeError):
        complete = False
    if not complete:
        raise UsageError(f"{side} {folder}: its {SUMMARY} is not from evaluate.py. Give another folder")
    if tasks and task not in tasks:
        return None
    if not finished:
        raise UsageError(f"{side} {folder}: {task} is not finished. Run its command again: it resumes")
    try:
        records = read_records(folder / RESULTS, need_checksums="line_checksums" in summary)
    except OSError as error:
        raise UsageError(f"{side} {folder / RESULTS}: {error.strerror}. Run the evaluation again") from error
    except UsageError as error:
        problem = str(error).removeprefix("--output: ").split(". Delete")[0]
        raise UsageError(f"{side} {problem}. Delete that line and run the evaluation again") from error
    return Result(folder, summary, records)


def _get_identity(result: Result) -> tuple:
    return tuple(result.model.get(name) for name in ("format", "step", "digest"))


def _match(base: list[Result], extended: list[Result]) -> Iterator[tuple[Result, Result]]:
    """Yield results of the same settings.

    Raises:
        UsageError: one has no counterpart.
    """
    ours, theirs = (_group_by_settings(side, name) for side, name in ((base, BASE), (extended, EXTENDED)))
    for key in [*ours, *theirs]:
        if key not in ours or key not in theirs:
            _reject_unmatched(ours, theirs, key)
    for key, result in ours.items():
        yield result, theirs[key]


def _is_former(name: str, value: Any) -> bool:
    return name in FORMER_SETTINGS and value == FORMER_SETTINGS[name]


def _group_by_settings(side: list[Result], name: str) -> dict[str, Result]:
    found: dict[str, Result] = {}
    for result in side:
        other = found.setdefault(result.key, result)
        if other is not result:
            raise UsageError(f"{name} {result.folder}: the same evaluation as {other.folder}. Move one of them away")
    return found


def _reject_unmatched(ours: dict[str, Result], theirs: dict[str, Result], key: str) -> None:
    present, side, lacking = (ours, BASE, EXTENDED) if key in ours else (theirs, EXTENDED, BASE)
    result, others = present[key], theirs if present is ours else ours
    same_task = [other for other_key, other in others.items() if other.task == result.task and other_key not in present]
    if not same_task:
        common = sorted({each.task for each in ours.values()} & {each.task for each in theirs.values()})
        hint = f", or compare --tasks {' '.join(common)} alone" if common else ""
        raise UsageError(
            f"{lacking}: has no results of {result.task}, which {side} has in {result.folder}. Run evaluate.py "
            f"{result.task} with the other model{hint}"
        )
    other = same_task[0]
    names = dict.fromkeys([*result.settings, *other.settings])
    name = next(name for name in names if result.get_setting(name) != other.get_setting(name))
    raise UsageError(
        f"{lacking} {other.folder}: {result.task} was run with {name} {shorten(other.get_setting(name))}, in {side} "
        f"{result.folder} with {shorten(result.get_setting(name))}. Run both models with the same flags"
    )


def _check_examples(base: Result, extended: Result) -> None:
    """Raise UsageError unless both models were asked the same."""
    where = f"{EXTENDED} {extended.folder}"
    prints = {side.summary["tokenizer"] for side in (base, extended) if "tokenizer" in side.summary}
    if len(prints) > 1:
        raise UsageError(
            f"{where}: another tokenizer than {BASE} {base.folder}, so the texts are not the same. Evaluate both with "
            "the same --tokenizer"
        )
    if missing := sorted(base.records.keys() ^ extended.records.keys()):
        side = EXTENDED if missing[0] in base.records else BASE
        raise UsageError(
            f"{where}: {len(missing)} examples are not in both {BASE} and {EXTENDED}; {side} lacks {missing[0]}. "
            "Evaluate both models on the same data"
        )
    for name, record in base.records.items():
        other = extended.records[name]
        for key in _SAME_IN_A_PAIR:
            if record.get(key) != other.get(key):
                _reject_example(where, name, key, record.get(key), other.get(key))
        for length in record.get("lengths", {}).keys() | other.get("lengths", {}).keys():
            rows = (record["lengths"].get(length), other["lengths"].get(length))
            if None in rows or rows[0]["tokens"] != rows[1]["tokens"]:
                _reject_example(where, name, f"tokens at length {length}", *(row and row["tokens"] for row in rows))


def _reject_example(where: str, name: str, key: str, ours: Any, theirs: Any) -> None:
    raise UsageError(
        f"{where}: example {name} has {key} {shorten(theirs)}, in {BASE} {shorten(ours)}: the prompts are not the "
        "same. Evaluate both with the same tokenizer and data"
    )
