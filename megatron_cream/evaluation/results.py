"""A folder of results that a run fills one example at a time, and that the next run goes on with."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_cream import platform
from megatron_cream.errors import UsageError, one_line
from megatron_cream.files import check_can_be_made, read_json, replacing
from megatron_cream.record import versions

RESULTS, SUMMARY, PICTURE = "results.jsonl", "summary.json", "picture.png"
_PACKAGES = ("torch", "transformers", "megatron-core", "tokenizers", "vllm", "lm_eval")


class Results:
    """Made by `open_results`.

    Attributes:
        folder: holds results.jsonl (a line an example), summary.json and picture.png.
        records: of the examples that are done, by name.
    """

    def __init__(self, folder: Path, description: dict[str, Any], records: dict[str, dict[str, Any]], lines):
        self.folder, self.records = folder, records
        self._description, self._lines = description, lines

    def add(self, record: dict[str, Any]) -> None:
        """Keep one example's result; `name` is its key. It is on disk when this returns."""
        self._lines.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._lines.flush()
        self.records[record["name"]] = record

    def finish(self, results: dict[str, Any]) -> None:
        """Write summary.json anew, with the aggregate `results` of all examples."""
        os.fsync(self._lines.fileno())
        _write_summary(self.folder, self._description | {"finished": True, "results": results})


@contextlib.contextmanager
def open_results(
    folder: Path, *, settings: dict[str, Any], model: dict[str, Any], model_path: Path, overwrite: bool
) -> Iterator[Results]:
    """The folder's results, and what was done before, if it was with the same settings and model.

    Args:
        settings: whatever changes the results, as JSON values, by flag.
        model: `Source.identity()`.
        model_path: where it lies now, for the reader of summary.json.
        overwrite: begin anew, whatever an earlier run left there.

    Raises:
        UsageError: made with others, damaged, in use by another run, or not results of an evaluation.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output {folder}: exists and is not a folder; give another")
    check_can_be_made(folder, "--output")
    for name in (RESULTS, SUMMARY, PICTURE):
        if (folder / name).exists() and not (folder / name).is_file():
            raise UsageError(f"--output {folder}: its {name} is not a file; give another folder")
    if overwrite or not any((folder / name).exists() for name in (RESULTS, SUMMARY)):
        _check_ours(folder)
    new = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    description = {"settings": settings, "model": model, "model_path": str(model_path), "versions": _versions()}
    description = json.loads(json.dumps(description))
    with open(folder / RESULTS, "a+", encoding="utf-8") as lines:
        try:
            fcntl.flock(lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"--output {folder}: another run is writing there now") from None
        if overwrite:
            lines.truncate(0)
            for name in (SUMMARY, PICTURE):
                (folder / name).unlink(missing_ok=True)
        elif (folder / SUMMARY).exists():
            _check_same(folder, description)
        elif (folder / RESULTS).stat().st_size:
            raise UsageError(f"--output {folder}: its {RESULTS} has no {SUMMARY}; give another folder, or --overwrite")
        records = _read(folder / RESULTS)
        _write_summary(folder, description | {"finished": False, "results": None})
        try:
            yield Results(folder, description, records, lines)
        except UsageError:  # a model that cannot be loaded, say
            if new and not lines.tell():
                shutil.rmtree(new[-1])
            raise


def _versions() -> dict[str, str]:
    """Of what computes results, and the GPU's name."""
    return versions(_PACKAGES) | {"gpu": torch.cuda.get_device_name() if platform.has_cuda() else "none"}


def _check_ours(folder: Path) -> None:
    """Raise UsageError where files that no evaluation wrote would be written over."""
    with contextlib.suppress(UsageError):
        summary = read_json(folder / SUMMARY, "a summary")
        if isinstance(summary, dict) and {"settings", "model", "finished"} <= summary.keys():
            return
    with contextlib.suppress(OSError, ValueError, RecursionError), open(folder / RESULTS, "rb") as lines:
        if _is_record(json.loads(next(lines, b""))):
            return
    for name in (RESULTS, SUMMARY, PICTURE):
        if (folder / name).exists() and (folder / name).stat().st_size:
            raise UsageError(f"--output {folder}: no evaluation wrote its {name}; give another folder, or remove it")


def _check_same(folder: Path, now: dict[str, Any]) -> None:
    try:
        before = read_json(folder / SUMMARY, "a summary")
        old, new = dict(before["settings"]), now["settings"]
        same_model = before["model"] == now["model"]
    except (UsageError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"--output {folder}: its {SUMMARY} cannot be read ({one_line(error)}); give another folder, or --overwrite"
        ) from error
    different = [key for key in [*new, *(old.keys() - new.keys())] if old.get(key) != new.get(key)]
    if different:
        key = different[0]
        reason = f"{key} {_short(old.get(key))}, not {_short(new.get(key))}"
    elif not same_model:
        reason = "another model, or another --engine or --dtype"
    else:
        return
    raise UsageError(f"--output {folder}: its results were made with {reason}; give another folder, or --overwrite")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """The records of the whole lines; one that was cut when a run was killed is cut off."""
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    records = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            record = json.loads(line)
            if not _is_record(record):
                raise ValueError("a name or a score is missing, or is none")
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"--output: {path}, line {number}: not a result ({one_line(error)}); give another folder, or "
                "--overwrite"
            ) from error
        records[record["name"]] = record
    return records


def _is_record(record: Any) -> bool:
    """Whether it has what `report.summarise` or `runner.perplexities` reads."""
    if not isinstance(record, dict) or not isinstance(record.get("name"), str):
        return False
    if "lengths" in record:  # of perplexity
        rows = record["lengths"].items() if isinstance(record["lengths"], dict) else [("", None)]
        return all(
            length.isdecimal()
            and isinstance(row, dict)
            and {"nll", "tokens"} <= row.keys()
            and all(map(_is_number, row.values()))
            for length, row in rows
        )
    score, depth = record.get("score"), record.get("depth")
    right = _is_number(score) and 0 <= score <= 1 and _is_number(record.get("rouge_l", 0))
    right = right and isinstance(record.get("part"), str) and type(record.get("length")) is int
    return right and (depth is None or _is_number(depth))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _write_summary(folder: Path, summary: dict[str, Any]) -> None:
    with replacing(folder / SUMMARY) as file:
        json.dump(summary, file, indent=2, ensure_ascii=False)
        file.write("\n")
