"""Task files that are damaged, of wrong types or given twice: one-line errors before the model runs."""

import json
import re
import zipfile
from pathlib import Path

import pytest

from megatron_cream.common.errors import UsageError
from megatron_cream.evaluation.tasks import kv, lines, longbench
from megatron_cream.evaluation.tasks.ruler import qa
from tests.evaluation.test_tasks_files import (
    TOKENS,
    hotpot,
    longeval,
    pairs_record,
    record,
    squad,
    text_file,
    write_lines,
)

DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("task", "text", "told"),
    [
        # Lone surrogates, too deeply nested, empty.
        ("lines", json.dumps(longeval() | {"prompt": "a \ud800"}), r"data\.jsonl, line 1: not a JSON object"),
        ("kv", json.dumps(pairs_record() | {"key": "\ud800"}), r"data\.jsonl, line 1: not a JSON object"),
        ("longbench", json.dumps(record(context="\udfff")), r"narrativeqa\.jsonl, line 1: not a JSON object"),
        ("longbench", json.dumps(record(_id="\udfff")), r"narrativeqa\.jsonl, line 1: not a JSON object"),
        ("squad", json.dumps(squad()).replace("Who", "\\ud800"), r"data\.jsonl: cannot be read"),
        ("longbench", DEEP, r"narrativeqa\.jsonl, line 1: not a JSON object"),
        ("squad", DEEP, r"data\.jsonl: cannot be read"),
        ("lines", "", r"data\.jsonl: there are no records"),
        ("kv", "\n", r"data\.jsonl: there are no records"),
        ("longbench", "", r"narrativeqa\.jsonl: there are no records"),
        # Values of wrong types.
        ("lines", json.dumps(longeval() | {"num_lines": float("inf")}), r"data\.jsonl, line 1: not one of LongEval's"),
        ("lines", json.dumps(longeval() | {"prompt": ""}), r"data\.jsonl, line 1: not one of LongEval's"),
        ("lines", json.dumps(longeval() | {"prompt": 5}), r"data\.jsonl, line 1: not one of LongEval's"),
        ("kv", json.dumps(pairs_record(1, 0)), r"data\.jsonl, line 1: not an example of key-value"),
        ("longbench", json.dumps(record(all_classes=5)), r"narrativeqa\.jsonl, line 1: all_classes must be a list"),
        ("longbench", json.dumps(record(all_classes=True)), r"narrativeqa\.jsonl, line 1: all_classes must be a list"),
        ("squad", json.dumps(squad()).replace('"Name 0-0"', "5"), r"data\.jsonl: not SQuAD's JSON .*text must be"),
        ("squad", json.dumps(squad()).replace('"Who is 0.0?"', "[]"), r"data\.jsonl: not SQuAD's JSON .*question must"),
        ("hotpotqa", json.dumps(hotpot()).replace('"yes1"', '["yes"]'), r"data\.jsonl, record 2: .*answer must be"),
        ("hotpotqa", json.dumps(hotpot()).replace('"yes1"', "1"), r"data\.jsonl, record 2: .*answer must be"),
        ("hotpotqa", json.dumps([*hotpot(), hotpot()[0] | {"context": []}]), r"data\.jsonl, record 4: .*context is"),
        # Duplicate names.
        ("longbench", f"{json.dumps(record())}\n" * 2, r"jsonl, line 2: _id 'id0' is also that of .*jsonl, line 1"),
    ],
)
def test_bad_data_prints_one_line(tmp_path, task, text, told):
    (tmp_path / "bench").mkdir()
    path = text_file(tmp_path / ("bench/narrativeqa.jsonl" if task == "longbench" else "data.jsonl"), text)
    read = {
        "lines": lambda: lines.load(TOKENS, [path]),
        "kv": lambda: kv.load(TOKENS, [path]),
        "squad": lambda: [qa.read_squad(path)],
        "hotpotqa": lambda: [qa.read_hotpotqa(path)],
        "longbench": lambda: longbench.examples(TOKENS, folder=path.parent, length=900),
    }[task]
    with pytest.raises(UsageError, match=told) as error:
        list(read())
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_files_with_the_same_name_are_rejected(tmp_path):
    """Examples are identified by file name, so those of two files would be confused."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_lines(tmp_path / folder / "4_lines.jsonl", [longeval()])
        write_lines(tmp_path / folder / "5_keys.jsonl", [pairs_record()])
    for load, name in ((lines.load, "4_lines"), (kv.load, "5_keys")):
        files = [tmp_path / folder / f"{name}.jsonl" for folder in ("a", "b")]
        for given in (files, [files[0], Path(str(files[0]))]):
            with pytest.raises(UsageError, match=re.escape(f"--data {given[0]} {given[1]}: two files with one name")):
                list(load(TOKENS, given))
    bench = tmp_path / "data.zip"
    with zipfile.ZipFile(bench, "w") as archive:
        for folder in ("a", "b"):
            archive.writestr(f"{folder}/trec.jsonl", json.dumps(record()))
    with pytest.raises(UsageError, match="--data .*zip: a/trec.jsonl b/trec.jsonl: two files with one name"):
        list(longbench.examples(TOKENS, folder=bench, length=900))
    write_lines(tmp_path / "trec.jsonl", [record()])
    with pytest.raises(UsageError, match="--datasets trec: given twice"):
        list(longbench.examples(TOKENS, folder=tmp_path, length=900, datasets=["trec", "trec"]))


def test_members_of_a_zip(tmp_path):
    """A member name with "./" is read; encrypted members and unknown compression methods give errors."""
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("./data/trec.jsonl", json.dumps(record()))
    assert [example.part for example in longbench.examples(TOKENS, folder=path, length=900)] == ["trec"]
    data = path.read_bytes()
    local, central = data.index(b"PK\x03\x04"), data.index(b"PK\x01\x02")
    for offset, value in ((6, 1), (8, 77)):  # flag bits: encrypted; compression method: unknown
        changed = bytearray(data)
        changed[local + offset] = changed[central + offset + 2] = value
        path.write_bytes(changed)
        with pytest.raises(UsageError, match=r"data\.zip: cannot be read"):
            list(longbench.examples(TOKENS, folder=path, length=900))
