"""A folder of results that a run fills one example at a time, and that the next run goes on with."""

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
from megatron_cream.evaluation.result_lines import format_line, is_record, read_records

RESULTS, SUMMARY, PICTURE = "results.jsonl", "summary.json", "picture.png"
_PACKAGES = ("torch", "transformers", "megatron-core", "tokenizers", "vllm", "lm_eval")
_CHECKSUMS = "line_checksums"


class Results:
    """Made by `open_results`.

    Attributes:
        folder: holds results.jsonl (a line an example), summary.json and picture.png.
        records: of the examples that are done, by name.
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
        self._description, self._lines, self._overwrites = description, lines, overwrites

    def add(self, record: dict[str, Any]) -> None:
        """Keep one example's result; `name` is its key. It is on disk when this returns."""
        line = format_line(record)
        if self._overwrites:
            self.begin(line)
        else:
            self._lines.write(line)
            self._lines.flush()
        self.records[record["name"]] = record

    def begin(self, line: str = "") -> None:
        """With `overwrite`: replace the earlier run's files, once the new ones are on the disk.

        Args:
            line: the first of the new results.
        """
        if not self._overwrites:
            return
        with atomic_write(self.folder / SUMMARY) as file:
            self._dump(file, finished=False, results=None)
            file.flush()
            # Killed in between, it leaves results without a summary, which no run takes for its own.
            self._lines = _replace_lines(self.folder, line, remove=(PICTURE, SUMMARY))
        self._overwrites = False

    def finish(self, results: dict[str, Any]) -> None:
        """Write summary.json anew, with the aggregate `results` of all examples."""
        self.begin()
        os.fsync(self._lines.fileno())
        self.write_summary(finished=True, results=results)

    def write_summary(self, **more: Any) -> None:
        with atomic_write(self.folder / SUMMARY) as file:
            self._dump(file, **more)

    def close(self) -> None:
        self._lines.close()

    def _dump(self, file: IO, **more: Any) -> None:
        file.write(to_json(self._description | {_CHECKSUMS: "crc32"} | more, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def open_results(
    folder: Path, *, settings: dict[str, Any], model: dict[str, Any], model_path: Path, overwrite: bool
) -> Iterator[Results]:
    """Open the folder's results, and resume those of equal settings and model.

    A run that ends by a UsageError before its first result removes the files and the empty folders that it made.

    Args:
        folder: of the results; made where it is missing.
        settings: whatever changes the results, as JSON values, by flag.
        model: `Source.identity()`.
        model_path: where it lies now, for the reader of summary.json.
        overwrite: begin anew. What an earlier run left there stays until the first new result is on the disk.

    Raises:
        UsageError: made with others, damaged, in use by another run, or not results of an evaluation.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output {folder}: exists and is not a folder; give another")
    check_can_create(folder, "--output")
    for name in (RESULTS, SUMMARY, PICTURE):
        if (folder / name).exists() and not (folder / name).is_file():
            raise UsageError(f"--output {folder}: its {name} is not a file; give another folder")
    made = [folder / name for name in (RESULTS, SUMMARY) if not (folder / name).exists()]
    if overwrite or len(made) == 2:
        _check_replaceable(folder)
    new = missing_folders(folder)
    description = {"settings": settings, "model": model, "model_path": str(model_path), "versions": _versions()}
    description = json.loads(json.dumps(description))
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
        except UsageError:  # a model that cannot be loaded, say
            if not records:
                for path in made:
                    path.unlink(missing_ok=True)
                remove_empty(new)
            raise


def _load_earlier(folder: Path, description: dict[str, Any], lines: TextIO) -> tuple[dict[str, dict[str, Any]], TextIO]:
    """What an earlier run of the same settings has done, and where to append; lines without checksums get theirs."""
    path, has_checksums = folder / RESULTS, True
    if (folder / SUMMARY).exists():
        has_checksums = _check_same_run(folder, description)
    elif path.stat().st_size:
        raise UsageError(f"--output {folder}: its {RESULTS} has no {SUMMARY}; give another folder, or --overwrite")
    records = read_records(path, need_checksums=has_checksums)
    return records, lines if has_checksums else _replace_lines(folder, "".join(map(format_line, records.values())))


def _open_locked(folder: Path) -> TextIO:
    """The folder's results.jsonl, to append to; no other run has it.

    Raises:
        UsageError: another run writes there.
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
    """Replace results.jsonl by a new one, locked, that begins with `text`.

    Without room all stays as it was.

    Args:
        folder: of the results.
        text: whole lines.
        remove: files of the folder that go just before.
    """
    path = Path(os.path.realpath(folder / RESULTS))
    beside = path.with_name(f".{path.name}.partial")
    lines = open(beside, "w", encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.flock(lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lines.write(text)
        lines.flush()
        os.fsync(lines.fileno())
        for name in remove:
            (folder / name).unlink(missing_ok=True)
        os.replace(beside, path)
    except BaseException:
        lines.close()
        beside.unlink(missing_ok=True)
        raise
    return lines


def _versions() -> dict[str, str]:
    """Of what computes results, and the GPU's name."""
    return find_versions(_PACKAGES) | {"gpu": torch.cuda.get_device_name() if devices.has_cuda() else "none"}


def _check_replaceable(folder: Path) -> None:
    """Raise UsageError where files that no evaluation wrote would be written over."""
    with contextlib.suppress(UsageError):
        summary = read_json(folder / SUMMARY, "a summary")
        if isinstance(summary, dict) and {"settings", "model", "finished"} <= summary.keys():
            return
    with contextlib.suppress(OSError, ValueError, RecursionError), open(folder / RESULTS, "rb") as lines:
        if is_record(json.loads(next(lines, b""))):
            return
    for name in (RESULTS, SUMMARY, PICTURE):
        if (folder / name).exists() and (folder / name).stat().st_size:
            raise UsageError(f"--output {folder}: no evaluation wrote its {name}; give another folder, or remove it")


def _check_same_run(folder: Path, now: dict[str, Any]) -> bool:
    """Whether each line has a checksum, by a summary of the same settings and model.

    Raises:
        UsageError: of others, or damaged.
    """
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
        reason = f"{key} {_shorten(old.get(key))}, not {_shorten(new.get(key))}"
    elif not same_model:
        reason = "another model, or another --engine or --dtype"
    else:
        return _CHECKSUMS in before
    raise UsageError(f"--output {folder}: its results were made with {reason}; give another folder, or --overwrite")


def _shorten(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
