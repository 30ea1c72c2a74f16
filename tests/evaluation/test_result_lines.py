"""Results folders: line checksums, files that --overwrite keeps, and files that a failed run removes."""

import json
import re

import pytest

from megatron_cream.common.errors import UsageError
from megatron_cream.common.files import to_json
from megatron_cream.evaluation import results as results_module
from megatron_cream.evaluation.results import PICTURE, RESULTS, SUMMARY, open_results
from megatron_cream.evaluation.runner import Generation, run_task
from tests.evaluation.test_evaluate_runs import plan_of, some_examples

RECORDS = [
    {"name": f"e{i}", "score": i / 4, "part": "", "length": 9, "depth": None, "output": "é\u2028"} for i in range(4)
]


def options(folder, **more) -> dict:
    return dict(settings={}, model={}, model_path=folder, overwrite=False) | more


def fill(folder, records=RECORDS) -> bytes:
    with open_results(folder, **options(folder)) as results:
        for record in records:
            results.add(record)
        results.finish({"score": float("nan")})
    return (folder / RESULTS).read_bytes()


def read(folder) -> dict:
    with open_results(folder, **options(folder)) as results:
        return results.records


def test_every_flipped_bit_is_named_and_its_line_can_be_deleted(tmp_path):
    """Flips that add a line feed are left out: they damage the neighbouring lines."""
    data = fill(tmp_path)
    assert list(read(tmp_path).values()) == RECORDS
    first, second = data.split(b"\n")[:2]
    for place in range(len(second)):
        damaged = bytearray(data)
        damaged[len(first) + 1 + place] ^= 1 << place % 8
        if 10 in damaged[len(first) + 1 : len(first) + 1 + len(second)]:
            continue
        (tmp_path / RESULTS).write_bytes(damaged)
        with pytest.raises(UsageError, match=f"{RESULTS}, line 2: not a result .*. Delete that line"):
            read(tmp_path)
    lines = bytes(damaged).splitlines(keepends=True)
    (tmp_path / RESULTS).write_bytes(b"".join(lines[:1] + lines[2:]))
    assert list(read(tmp_path).values()) == [RECORDS[0], *RECORDS[2:]]


def test_results_without_checksums_are_read_and_completed(tmp_path):
    data = fill(tmp_path)
    old = "".join(json.dumps(record) + "\n" for record in RECORDS)
    (tmp_path / RESULTS).write_text(old)
    summary = json.loads((tmp_path / SUMMARY).read_text())
    del summary["line_checksums"]
    (tmp_path / SUMMARY).write_text(json.dumps(summary))
    assert list(read(tmp_path).values()) == RECORDS and (tmp_path / RESULTS).read_bytes() == data


def test_contradicting_lines_are_reported(tmp_path):
    other = tmp_path / "other"
    data = fill(tmp_path / "out") + fill(other, [RECORDS[1] | {"length": 10}])
    (tmp_path / "out" / RESULTS).write_bytes(data)
    with pytest.raises(UsageError, match="lines 2 and 5: different results of e1. Delete one of them"):
        read(tmp_path / "out")
    (tmp_path / "out" / RESULTS).write_bytes(data + data)  # the copies agree, but the two results of e1 do not
    with pytest.raises(UsageError, match="lines 2 and 5: different results of e1"):
        read(tmp_path / "out")


def test_a_result_of_another_example_is_named(tmp_path):
    fill(tmp_path)
    with open_results(tmp_path, **options(tmp_path)) as results:
        with pytest.raises(UsageError, match=re.escape("has a result of e0 with length 9, not 100. Delete that line")):
            run_task(None, plan_of(some_examples(1)), Generation(batch_size=1), results)


def test_overwrite_keeps_old_results_until_new_ones_exist(monkeypatch, tmp_path):
    """A model that cannot be loaded, or a full disk, leaves the old results unchanged."""
    fill(tmp_path)
    (tmp_path / PICTURE).write_bytes(b"a picture")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def now() -> dict:
        return {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    with pytest.raises(UsageError, match="no such model"), open_results(tmp_path, **options(tmp_path, overwrite=True)):
        raise UsageError("no such model")
    assert now() == before

    def full(_):
        raise OSError(28, "No space left on device")

    for run in (lambda results: results.add(RECORDS[0]), lambda results: results.finish({})):
        with open_results(tmp_path, **options(tmp_path, overwrite=True)) as results, monkeypatch.context() as patched:
            patched.setattr(results_module.os, "fsync", full)
            with pytest.raises(OSError, match="No space left"):
                run(results)
        assert now() == before
    with open_results(tmp_path, **options(tmp_path, overwrite=True)) as results:
        results.add(RECORDS[0])
        assert sorted(now()) == [RESULTS, SUMMARY] and len(now()[RESULTS].splitlines()) == 1
        with pytest.raises(UsageError, match="another run is writing there now"):
            read(tmp_path)
    assert list(read(tmp_path).values()) == RECORDS[:1]


def test_a_failed_run_removes_only_its_own_files(tmp_path):
    """Files that others have written meanwhile, and folders that existed before, are kept."""
    folder = tmp_path / "runs" / "evaluation" / "model" / "kv"
    for other in (None, folder / "notes.txt", tmp_path / "runs" / "notes.txt"):
        with pytest.raises(UsageError, match="no such model"), open_results(folder, **options(folder)):
            if other:
                other.write_text("mine")
            raise UsageError("no such model")
        left = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert left == ([other] if other else []) and (tmp_path / "runs").exists() == bool(other)
        if other:
            other.unlink()
    with pytest.raises(UsageError), open_results(tmp_path / "runs", **options(folder)):
        raise UsageError("no such model")
    assert (tmp_path / "runs").is_dir() and not any(path.is_file() for path in tmp_path.rglob("*"))


def test_json_has_no_nan(tmp_path):
    nan, infinite = float("nan"), float("inf")
    assert to_json({"a": [nan, {"b": (-infinite, 1.5)}], "c": "NaN"}) == '{"a": [null, {"b": [null, 1.5]}], "c": "NaN"}'
    fill(tmp_path)
    assert json.loads((tmp_path / SUMMARY).read_text())["results"] == {"score": None}
