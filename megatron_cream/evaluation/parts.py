"""Results files of several ranks: each rank appends to its own file, and rank 0 merges them into results.jsonl.

So a killed job loses no finished example: the next run, on any number of ranks, merges what is left. A part's name has
the digest of the run's settings and model, and a token of the run: results of other settings are never merged.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_cream.evaluation.result_lines import format_line, parse_line, read_records

_ORDER = "order"
Order = tuple[int, ...]
"""Where one rank alone would have written a result: results are sorted by it in the end."""


def compute_digest(description: dict[str, Any]) -> str:
    """Return a short digest of a run's settings and model."""
    same = json.dumps([description["settings"], description["model"]], sort_keys=True)
    return hashlib.sha256(same.encode()).hexdigest()[:12]


def make_run_name(digest: str) -> str:
    """Return a new name for the parts of one run."""
    return f"{digest}-{os.urandom(4).hex()}"


def take_leftovers(folder: Path, digest: str, records: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the results of killed runs with the same digest that are not in `records`."""
    found: dict[str, dict[str, Any]] = {}
    for path in _list_parts(folder, f"{digest}-*"):
        for name, record in read_records(path, need_checksums=True).items():
            record.pop(_ORDER, None)
            if name not in records:
                found.setdefault(name, record)
    return list(found.values())


def remove_parts(folder: Path, keep: str = "") -> None:
    """Remove the parts of all runs except that of the name `keep`."""
    kept = set(_list_parts(folder, keep)) if keep else set()
    for path in set(_list_parts(folder)) - kept:
        path.unlink(missing_ok=True)


def _list_parts(folder: Path, run: str = "*") -> list[Path]:
    return sorted(folder.glob(f"results.rank*.{run}.jsonl"))


class PartResults:
    """The results of a rank that is not the first; see results.Results for the attributes.

    Args:
        folder: the results folder.
        rank: rank of this process.
        run: name of the run, as `make_run_name` returned it on rank 0.
        finished: names of the examples that earlier runs finished.
    """

    def __init__(self, folder: Path, rank: int, run: str, finished: list[str]):
        self.folder, self.records = folder, {name: {} for name in finished}
        self._path, self._lines = folder / f"results.rank{rank}.{run}.jsonl", None

    def add(self, record: dict[str, Any], order: Order) -> None:
        """Append one example's result, and flush the file."""
        if self._lines is None:
            self._lines = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
        self._lines.write(format_line(record | {_ORDER: list(order)}))
        self._lines.flush()

    def close(self) -> None:
        if self._lines is not None and not self._lines.closed:
            os.fsync(self._lines.fileno())
            self._lines.close()


class PartReader:
    """Reads what the other ranks of a run have written since the last call.

    Args:
        folder: the results folder.
        run: name of the run.
    """

    def __init__(self, folder: Path, run: str):
        self._folder, self._run = folder, run
        self._ends: dict[Path, int] = {}

    def read_new(self) -> Iterator[tuple[dict[str, Any], Order]]:
        """Yield each new result and its order."""
        for path in _list_parts(self._folder, self._run):
            with open(path, "rb") as file:
                file.seek(self._ends.get(path, 0))
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]  # the last line may not be complete yet
            self._ends[path] = self._ends.get(path, 0) + len(whole)
            for line in whole.split(b"\n")[:-1]:
                record = parse_line(line, need_checksums=True)
                yield record, tuple(record.pop(_ORDER))
