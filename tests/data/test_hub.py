"""Tests of datasets on the Hugging Face Hub, with local folders in its place: `datasets` streams both alike."""

import json
import sys
from pathlib import Path

import datasets
import pytest

from megatron_cream.data import documents, hub, partial
from megatron_cream.data.chat import Llama2Chat
from megatron_cream.data.chat_records import extract_chat
from megatron_cream.data.hub import HubDataset, parse_hub_dataset
from megatron_cream.data.input_files import parse_input
from megatron_cream.data.preprocess import PreprocessReport, preprocess
from tests.data.test_preprocess import ByteTokenizer, read_back, run_tool, some_texts, write_lines, written

CARD = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: train.jsonl}
  - {split: test, path: test.jsonl}
- config_name: chats
  data_files: chats.jsonl
---
"""
TEXTS = some_texts(40)
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> Path:
    """Make `owner/name` on the Hub a local folder."""
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    write_lines(folder / "train.jsonl", TEXTS)
    write_lines(folder / "test.jsonl", ["test"])
    (folder / "chats.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    load = datasets.load_dataset

    def load_local(name, *config, revision, **options):
        assert options["streaming"] and revision in (None, "v1")
        return load(str(tmp_path / name), *config, **options)

    monkeypatch.setattr(datasets, "load_dataset", load_local)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return folder


def run(text: str, prefix: Path, **options: object) -> PreprocessReport:
    return preprocess([parse_input(text)], prefix, ByteTokenizer(), progress=False, overwrite=True, **options)


def test_rows_are_documents(tmp_path, stand_in, monkeypatch):
    monkeypatch.setattr(documents, "BATCH_BYTES", 4000)
    preprocess([stand_in / "train.jsonl"], tmp_path / "local", ByteTokenizer(), progress=False)
    for workers in (1, 2):
        report = run("hf://datasets/owner/name", tmp_path / "hub", workers=workers)
        assert report.documents == 40 and written(tmp_path / "hub") == written(tmp_path / "local")
    run("hf://datasets/owner/name@v1::test", tmp_path / "test")
    assert read_back(tmp_path / "test") == [[256, *b"test", 257]]
    run("hf://datasets/owner/name:chats", tmp_path / "chats", chat_format="llama2")
    assert read_back(tmp_path / "chats") == [Llama2Chat(ByteTokenizer())(extract_chat({"messages": CHAT}).messages)[0]]


def test_reading_resumes_after_any_batch(tmp_path, stand_in, monkeypatch):
    monkeypatch.setattr(documents, "BATCH_BYTES", 8000)
    files = [parse_input("hf://datasets/owner/name"), write_lines(tmp_path / "last.jsonl", ["c"])]
    batches = list(documents.read_batches(files))
    assert len(batches) > 4
    for i, batch in enumerate(batches):
        assert list(documents.read_batches(files, start=batch.end)) == batches[i + 1 :]


def test_a_lost_connection_keeps_the_unfinished_run(tmp_path, stand_in, monkeypatch):
    monkeypatch.setattr(documents, "BATCH_BYTES", 8000)
    run("hf://datasets/owner/name", tmp_path / "whole")
    content = hub._content

    def fail(row, *rest):
        if row["text"] == TEXTS[30]:
            raise TimeoutError("timed out\nafter 10 s")
        return content(row, *rest)

    monkeypatch.setattr(hub, "_content", fail)
    monkeypatch.setattr(partial, "CHECKPOINT_SECONDS", 0)
    resumable = dict(tokenizer_id="same")
    with pytest.raises(
        ConnectionError, match=r"^hf://datasets/owner/name::train: cannot be read after row 31 \(timed out"
    ):
        run("hf://datasets/owner/name", tmp_path / "x", **resumable)
    assert (tmp_path / "x.partial").is_dir()
    monkeypatch.setattr(hub, "_content", content)
    skipped = []
    skip = datasets.IterableDataset.skip
    monkeypatch.setattr(datasets.IterableDataset, "skip", lambda self, n: skipped.append(n) or skip(self, n))
    run("hf://datasets/owner/name", tmp_path / "x", **resumable)
    assert skipped[0] > 0 and written(tmp_path / "x") == written(tmp_path / "whole")


@pytest.mark.parametrize(
    "text, error, message",
    [
        ("owner/other", ConnectionError, "::train: cannot be read at the start "),
        ("owner/name:french", ConnectionError, "french:train: cannot be read at the start .*french"),
        ("owner/name::validation", ConnectionError, "::validation: cannot be read at the start .*validation"),
        ("owner/name:chats", ValueError, "chats:train: no column 'text'; its columns are messages; choose one with"),
    ],
)
def test_what_cannot_be_read_is_one_line_and_writes_nothing(tmp_path, stand_in, text, error, message):
    with pytest.raises(
        error, match=f"^hf://datasets/{text.split(':')[0]}:.*{message}".replace(":.*:", ":.*")
    ) as caught:
        run(f"hf://datasets/{text}", tmp_path / "x", tokenizer_id="same")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("x*"))


def test_rows_of_other_types_are_counted(tmp_path, stand_in):
    (stand_in / "train.jsonl").write_text('{"text": 1}\n{"text": null}\n{"text": 3}\n')
    (stand_in / "README.md").unlink()
    (stand_in / "chats.jsonl").unlink()
    (stand_in / "test.jsonl").unlink()
    with pytest.raises(ValueError, match="no document is left to write .key 'text' is not a string: 2, empty text: 1."):
        run("hf://datasets/owner/name", tmp_path / "x")


def test_forms_of_names():
    assert parse_hub_dataset("hf://datasets/a/b") == HubDataset("a/b")
    assert parse_hub_dataset("hf://datasets/b@refs/pr/1:en:test") == HubDataset("b", "refs/pr/1", "en", "test")
    assert parse_hub_dataset("hf://datasets/a/b::test") == HubDataset("a/b", split="test")
    for wrong in ("hf://a/b", "hf://models/a/b", "hf://datasets/", "hf://datasets/a/b/c", "hf://datasets/a/b:c:d:e"):
        with pytest.raises(ValueError, match=f"^{wrong}: expected hf://datasets/OWNER/NAME"):
            parse_hub_dataset(wrong)


def test_a_missing_package_prints_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="^hf://datasets/a/b::train: .*not installed: pip install datasets$"):
        run("hf://datasets/a/b", tmp_path / "x")


def test_the_tool_rejects_other_addresses(tmp_path):
    flags = ["--output-prefix", tmp_path / "x", "--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", "x.model"]
    done = run_tool("--input", "hf://a/b", *flags)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "--input: hf://a/b: expected hf://datasets/OWNER/NAME[@REVISION][:CONFIG[:SPLIT]]" in done.stderr
