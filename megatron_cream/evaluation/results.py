"""The results folder: a run adds one example at a time, and the next run resumes from it."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TextIO

import torch

from megatron_cream.common import devices
from megatron_cream.common.errors import UsageError, one_line
from megatron_cream.common.files import (
    atomic_write,
    check_can_create,
    missing_folders,
    read_json,
    remove_empty,
    to_json,
)
from megatron_cream.common.versions import find_versions
from megatron_cream.evaluation import parts
from megatron_cream.evaluation.result_lines import format_line, is_record, read_records

RESULTS, SUMMARY, PICTURE = "results.jsonl", "summary.json", "picture.png"
_PACKAGES = ("torch", "transformers", "megatron-core", "tokenizers", "vllm", "lm_eval")
_CHECKSUMS = "line_checksums"

FORMER_SETTINGS = {
    "answers_stripped": False,
    "code_similarity": "indel",
    "convention": "ours",
    "longppl_bos": True,
    "max_length": None,
    "metadata": {},
    "plain_datasets": [],
    "varied_filler": False,
}
"""Settings that runs of earlier versions did not write down, and what they did."""


class Results:
    """The open results folder of one run; `open_results` makes it.

    Attributes:
        folder: holds results.jsonl (one line per example), summary.json and picture.png.
        records: records of the finished examples, by name.
        run: name of this run's parts, if other ranks write some; see parts.py.
    """

    def __init__(
        self,
        folder: Path,
        description: dict[str, Any],
        records: dict[str, dict[str, Any]],
        lines: TextIO,
        overwrites: bool,
    ):
        self.folder, self.records = folder, records
        self.run = parts.make_run_name(parts.compute_digest(description))
        self._description, self._lines, self._overwrites = description, lines, overwrites

    def add(self, record: dict[str, Any]) -> None:
        """Append one example's result, with its name as the key, and flush the file."""
        line = format_line(record)
        if self._overwrites:
            self.begin(line)
        else:
            self._lines.write(line)
            self._lines.flush()
        self.records[record["name"]] = record

    def begin(self, line: str = "") -> None:
        """Replace an earlier run's files by new ones; do nothing unless overwriting.

        Args:
            line: the first line of the new results.
        """
        if not self._overwrites:
            return
        with atomic_write(self.folder / SUMMARY) as file:
            self._dump(file, finished=False, results=None)
            file.flush()
            # A kill between the two leaves results without a summary, from which no run resumes.
            self._lines = _replace_lines(self.folder, line, remove=(PICTURE, SUMMARY))
        parts.remove_parts(self.folder, keep=self.run)
        self._overwrites = False

    def sort(self, order: dict[str, parts.Order]) -> None:
        """Sort the lines by `order`, after those that have none, and remove the parts of other ranks.

        Args:
            order: by name of the example.
        """
        names = sorted(self.records, key=lambda name: order.get(name, ()))
        if names != list(self.records):
            self.records = {name: self.records[name] for name in names}
            self._lines.close()
            self._lines = _replace_lines(self.folder, "".join(map(format_line, self.records.values())))
        os.fsync(self._lines.fileno())
        parts.remove_parts(self.folder)

    def finish(self, results: dict[str, Any]) -> None:
        """Write the final summary.json with the aggregate `results` of all examples."""
        self.begin()
        os.fsync(self._lines.fileno())
        self.write_summary(finished=True, results=results)

    def write_summary(self, **more: Any) -> None:
        """Write summary.json: the description of the run and the fields `more`."""
        with atomic_write(self.folder / SUMMARY) as file:
            self._dump(file, **more)

    def close(self) -> None:
        self._lines.close()

    def _dump(self, file: IO, **more: Any) -> None:
        file.write(to_json(self._description | {_CHECKSUMS: "crc32"} | more, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def open_results(
    folder: Path,
    *,
    settings: dict[str, Any],
    model: dict[str, Any],
    model_path: Path,
    overwrite: bool,
    facts: dict[str, Any] | None = None,
) -> Iterator[Results]:
    """Open a results folder, and resume if its settings and model are the same.

    A run that fails with a UsageError before its first result removes the files and empty folders that it made.

    Args:
        folder: the results folder; made if missing.
        settings: every setting that changes the results, as JSON values, by flag.
        model: the model's `Source.identity()`.
        model_path: the model's current path, for readers of summary.json.
        overwrite: start again; an earlier run's files stay until the first new result is on disk.
        facts: further values for summary.json, which resuming does not compare.

    Raises:
        UsageError: the folder has other settings or another model, is damaged, is in use by another run, or holds
            files that no evaluation wrote.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output {folder}: exists and is not a folder. Give another path.")
    check_can_create(folder, "--output")
    for name in (RESULTS, SUMMARY, PICTURE):
        if (folder / name).exists() and not (folder / name).is_file():
            raise UsageError(f"--output {folder}: its {name} is not a file. Give another folder.")
    made = [folder / name for name in (RESULTS, SUMMARY) if not (folder / name).exists()]
    if overwrite or len(made) == 2:
        _check_replaceable(folder)
    new = missing_folders(folder)
    description = {"settings": settings, "model": model, "model_path": str(model_path), "versions": _versions()}
    description = json.loads(json.dumps(description | (facts or {})))
    with _open_locked(folder) as lines:
        records: dict[str, dict[str, Any]] = {}
        try:
            overwrites = overwrite and len(made) < 2
            if not overwrites:
                records, lines = _load_earlier(folder, description, lines)
            results = Results(folder, description, records, lines, overwrites)
            with contextlib.closing(results):
                if not overwrites:
                    results.write_summary(finished=False, results=None)
                yield results
        except UsageError:  # for example, a model that cannot be loaded
            if not records:
                for path in made:
                    path.unlink(missing_ok=True)
                remove_empty(new)
            raise


def _load_earlier(folder: Path, description: dict[str, Any], lines: TextIO) -> tuple[dict[str, dict[str, Any]], TextIO]:
    """Return the records of an earlier run with the same settings, and the file to append to.

    Adds checksums to lines that have none, and what killed ranks wrote into files of their own.
    """
    path, has_checksums = folder / RESULTS, True
    if (folder / SUMMARY).exists():
        has_checksums = _check_same_run(folder, description)
    elif path.stat().st_size:
        raise UsageError(f"--output {folder}: its {RESULTS} has no {SUMMARY}. Give another folder, or --overwrite.")
    records = read_records(path, need_checksums=has_checksums)
    if not has_checksums:
        lines = _replace_lines(folder, "".join(map(format_line, records.values())))
    for record in parts.take_leftovers(folder, parts.compute_digest(description), records):
        lines.write(format_line(record))
        records[record["name"]] = record
    lines.flush()
    os.fsync(lines.fileno())
    parts.remove_parts(folder)
    return records, lines


def _open_locked(folder: Path) -> TextIO:
    """Open the folder's results.jsonl to append to it, with an exclusive lock.

    Raises:
        UsageError: another run holds the lock.
    """
    path, tries = folder / RESULTS, 100
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lines = open(path, "a+", encoding="utf-8")  # noqa: SIM115
        except FileNotFoundError:  # a run that failed has just removed its empty folders
            tries -= 1
            if tries:
                continue
            raise
        try:
            fcntl.flock(lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lines.close()
            raise UsageError(f"--output {folder}: another run is writing there now") from None
        # Another run may have replaced or removed the file since it was opened.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lines.fileno()), os.stat(path)):
                return lines
        lines.close()


def _replace_lines(folder: Path, text: str, remove: tuple[str, ...] = ()) -> TextIO:
    """Replace results.jsonl by a new, locked file that starts with `text`.

    If the disk is full, nothing changes.

    Args:
        folder: the results folder.
        text: complete lines.
        remove: names of files in the folder to remove just before the replacement.
    """
    path = Path(os.path.realpath(folder / RESULTS))
    partial = path.with_name(f".{path.name}.partial")
    lines = open(partial, "w", encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.flock(lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lines.write(text)
        lines.flush()
        os.fsync(lines.fileno())
        for name in remove:
            (folder / name).unlink(missing_ok=True)
        os.replace(partial, path)
    except BaseException:
        lines.close()
        partial.unlink(missing_ok=True)
        raise
    return lines


def _versions() -> dict[str, str]:
    """Return the versions of the packages that compute results, and the GPU's name."""
    return find_versions(_PACKAGES) | {"gpu": torch.cuda.get_device_name() if devices.has_cuda() else "none"}


def _check_replaceable(folder: Path) -> None:
    """Raise UsageError if the run would overwrite files that no evaluation wrote."""
    with contextlib.suppress(UsageError):
        summary = read_json(folder / SUMMARY, "a summary")
        if isinstance(summary, dict) and {"settings", "model", "finished"} <= summary.keys():
            return
    with contextlib.suppress(OSError, ValueError, RecursionError), open(folder / RESULTS, "rb") as lines:
        if is_record(json.loads(next(lines, b""))):
            return
    for name in (RESULTS, SUMMARY, PICTURE):
        if (folder / name).exists() and (folder / name).stat().st_size:
            raise UsageError(
                f"--output {folder}: its {name} was not written by an evaluation. Give another folder, or remove it."
            )


def _check_same_run(folder: Path, now: dict[str, Any]) -> bool:
    """Check that settings and model are the same; return whether lines have checksums.

    Args:
        folder: the results folder, with a summary.json.
        now: the description of this run.

    Raises:
        UsageError: the settings or the model differ, or summary.json is damaged.
    """
    try:
        before = read_json(folder / SUMMARY, "a summary")
        new = now["settings"]
        old = {key: value for key, value in FORMER_SETTINGS.items() if key in new} | before["settings"]
        same_model = before["model"] == now["model"]
    except (UsageError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"--output {folder}: its {SUMMARY} cannot be read ({one_line(error)}). Give another folder, or --overwrite."
        ) from error
    different = [key for key in [*new, *(old.keys() - new.keys())] if old.get(key) != new.get(key)]
    if different:
        key = different[0]
        reason = f"{key} {shorten(old.get(key))}, not {shorten(new.get(key))}"
    elif not same_model:
        reason = "another model, or another --engine, --dtype or --kv-cache-dtype"
    else:
        return _CHECKSUMS in before
    raise UsageError(f"--output {folder}: its results were made with {reason}. Give another folder, or --overwrite.")


def shorten(value: Any) -> str:
    """Return a setting as JSON of at most 80 characters, for a message."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
