"""Tests of reading documents in every input format: complete and in order, or rejected with one line."""

import importlib.util
import io
import json
import os
import sys

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cream.data import documents, json_array
from megatron_cream.data import preprocess as preprocess_module
from megatron_cream.data.indexed import paths as output_paths
from megatron_cream.data.input_files import disk_size, find_files
from megatron_cream.data.preprocess import preprocess
from tests.data.test_preprocess import (
    ByteTokenizer,
    read_back,
    some_texts,
    write_input,
    write_lines,
    written,
)

FORMS = ["a.jsonl", "a.json", "a.ndjson.gz", "a.jsonl.zst", "array.json", "a.parquet", "categories.parquet", "a.arrow"]
FORMS += ["a.jsonl.bz2", "a.jsonl.xz", "a.csv", "a.csv.gz", "a.zip", "dataset", "dict", "texts", "mixed"]
if importlib.util.find_spec("lz4"):
    FORMS.append("a.jsonl.lz4")


@pytest.mark.parametrize("name", FORMS)
def test_documents_have_bos_token_ids_and_eod(tmp_path, name):
    texts = some_texts(40)
    path = write_input(tmp_path / name, texts)

    report = preprocess([path], tmp_path / "out" / "v1.5", ByteTokenizer(), progress=False)

    expected = [[256, *text.encode(), 257] for text in texts]
    assert read_back(tmp_path / "out" / "v1.5") == expected
    assert report.documents == 40 and not report.dropped
    assert report.tokens == sum(map(len, expected))
    assert report.lengths.tolist() == list(map(len, expected))
    assert report.documents_of_at_least(1500) == sum(len(ids) >= 1500 for ids in expected)
    assert sorted(os.listdir(tmp_path / "out")) == ["v1.5.bin", "v1.5.idx"]


@pytest.mark.parametrize("name", FORMS)
def test_reading_resumes_after_any_batch(tmp_path, monkeypatch, name):
    monkeypatch.setattr(documents, "BATCH_BYTES", 4000)
    inputs = [write_lines(tmp_path / "first.jsonl", ["a", "b"]), write_input(tmp_path / name, some_texts(40))]
    files = find_files([*inputs, write_lines(tmp_path / "last.jsonl", ["c"])])
    batches = list(documents.read_batches(files))
    assert len(batches) > 5
    assert batches[-1].end.disk_bytes == sum(map(disk_size, files))
    for i, batch in enumerate(batches):
        assert list(documents.read_batches(files, start=batch.end)) == batches[i + 1 :]


def test_inputs_are_read_in_the_order_given(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "b.txt").write_text("three")
    (folder / "a.txt").write_text("two")
    one, four = write_lines(tmp_path / "z.jsonl", ["one"]), write_lines(tmp_path / "a.jsonl.gz", ["four"])
    single = tmp_path / "five.txt"
    single.write_text("five")
    preprocess(
        [one, folder, four, single],
        tmp_path / "x",
        ByteTokenizer(),
        append_eod=False,
        prepend_bos=False,
        progress=False,
    )
    assert [bytes(ids).decode() for ids in read_back(tmp_path / "x")] == ["one", "two", "three", "four", "five"]


def test_any_number_of_workers_writes_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "BATCH_BYTES", 5000)  # makes many batches
    texts = some_texts(150)
    inputs = [write_lines(tmp_path / "a.jsonl", texts), write_lines(tmp_path / "b.jsonl.gz", texts[::-1])]
    with inputs[0].open("ab") as file:
        file.write(b"{broken\n")
    reports = [
        preprocess(inputs, tmp_path / f"w{workers}", ByteTokenizer(), workers=workers, progress=False)
        for workers in (1, 2, 3)
    ]
    assert written(tmp_path / "w1") == written(tmp_path / "w2") == written(tmp_path / "w3")
    assert len(read_back(tmp_path / "w1")) == 300
    assert all(report.dropped == {"malformed JSON": 1} for report in reports)
    assert all(report.first_dropped == reports[0].first_dropped for report in reports)


def test_unreadable_documents_are_counted_by_reason(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "good"}\n'
        b"{not json\n"
        b'{"body": "other key"}\n'
        b"\n"
        b"[1]\n"
        b'{"text": 7}\n'
        b'{"text": "\xff"}\n'
        b'{"text": "\\ud800"}\n'
        b'{"text": ""}\n'
        b'{"text": "ab"}\n'
        b'{"text": "no newline at the end"}'
    )
    report = preprocess([path], tmp_path / "x", ByteTokenizer(), min_document_tokens=3, progress=False)
    assert [bytes(ids[1:-1]).decode() for ids in read_back(tmp_path / "x")] == ["good", "no newline at the end"]
    assert report.dropped == {
        "malformed JSON": 1,
        "no key 'text'": 1,
        "not a JSON object": 1,
        "key 'text' is not a string": 1,
        "not UTF-8": 2,
        "empty text": 1,
        "shorter than 3 tokens": 1,
    }
    assert report.first_dropped["no key 'text'"] == f"{path}:3"
    assert report.first_dropped["not UTF-8"] == f"{path}:7"

    with pytest.raises(ValueError, match=rf"{path}:2: malformed JSON"):
        preprocess([path], tmp_path / "strict", ByteTokenizer(), strict=True, progress=False)
    assert not any(output.exists() for output in output_paths(tmp_path / "strict"))


TRUNCATED = [("a.jsonl.gz", "gzip"), ("a.jsonl.zst", "zstd"), ("a.jsonl.bz2", "bzip2"), ("a.jsonl.xz", "xz")]


@pytest.mark.parametrize("name, kind", TRUNCATED)
@pytest.mark.parametrize("kept", [0.5, 0.99])
def test_a_truncated_compressed_file_is_an_error(tmp_path, name, kind, kept):
    path = write_lines(tmp_path / name, some_texts(50))
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(ValueError, match=f"{name}: not a complete {kind} file"):
        preprocess([path], tmp_path / "x", ByteTokenizer(), progress=False)
    assert os.listdir(tmp_path) == [name]
    text = tmp_path / f"a.txt.{name.split('.')[-1]}"
    text.write_bytes(path.read_bytes())
    good = write_lines(tmp_path / "good.jsonl", ["good"])
    report = preprocess([text, good], tmp_path / "x", ByteTokenizer(), progress=False)
    assert report.documents == 1 and [reason for reason in report.dropped if f"not a complete {kind} file" in reason]


def test_rows_without_text_are_counted(tmp_path):
    values = pyarrow.array([b"good", b"\xff", b"", None, b"fine"], pyarrow.binary())
    broken = pyarrow.StringArray.from_buffers(5, values.buffers()[1], values.buffers()[2], values.buffers()[0])
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": broken}), path)
    report = preprocess([path], tmp_path / "x", ByteTokenizer(), json_key="body", progress=False)
    assert [bytes(ids[1:-1]) for ids in read_back(tmp_path / "x")] == [b"good", b"fine"]
    assert report.dropped == {"not UTF-8": 1, "empty text": 2}
    assert report.first_dropped["not UTF-8"] == f"{path}:2"


def test_files_of_columns_are_checked_before_any_is_read(tmp_path, monkeypatch):
    good = write_lines(tmp_path / "a.jsonl", ["good"])
    tables = {"no": {"body": ["x"]}, "number": {"text": [1]}, "chat": {"text": [[{"from": "human", "value": "q"}]]}}
    for name, columns in tables.items():
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / f"{name}.parquet")
    (tmp_path / "not.parquet").write_bytes(b"PAR1 not a table PAR1")
    (tmp_path / "not.arrow").write_bytes(b"ARROW1 not")
    datasets.DatasetDict({s: datasets.Dataset.from_dict({"text": ["x"]}) for s in ("train", "test")}).save_to_disk(
        tmp_path / "two"
    )
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "state.json").write_text('{"_data_files": [{"filename": "data-0.arrow"}]}')
    monkeypatch.setattr(preprocess_module, "map_in_order", lambda *_: pytest.fail("began to read"))
    for path, message in [
        ("no.parquet", "no.parquet: no column 'text'; its columns are body"),
        ("number.parquet", "number.parquet: column 'text' is int64, expected text"),
        ("chat.parquet", "chat.parquet: column 'text' is list<.*expected text"),
        ("not.parquet", "not.parquet: not a Parquet file"),
        ("not.arrow", "not.arrow: not an Arrow file"),
        ("two", "two: a dataset of 2 splits; give the ones to read: .*two/train, .*two/test"),
        ("cut", "cut: its state.json names data-0.arrow, which does not exist"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            preprocess([good, tmp_path / path], tmp_path / "x", ByteTokenizer(), progress=False)
        assert "\n" not in str(caught.value)
    chats = tmp_path / "no.parquet"
    with pytest.raises(ValueError, match="no column 'conversations' or 'messages'"):
        preprocess([chats], tmp_path / "x", ByteTokenizer(), chat_format="llama2", progress=False)


@pytest.mark.parametrize(
    "name, package", [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow"), ("a.csv.lz4", "lz4")]
)
def test_a_missing_package_prints_one_line(tmp_path, monkeypatch, name, package):
    path = tmp_path / name
    path.touch() if package == "lz4" else write_input(path, ["text"])
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"pip install {package}$"):
        preprocess([path], tmp_path / "x", ByteTokenizer(), progress=False)
    assert os.listdir(tmp_path) == [name]


JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(st.lists(JSON), st.integers(1, 40), st.sampled_from([None, 1]), st.booleans())
def test_array_elements_do_not_depend_on_the_read_size(values, chunk, indent, ascii_only):
    data = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array, "_CHUNK", chunk)
        try:
            data.decode()
        except UnicodeDecodeError:
            with pytest.raises(json_array.DamagedArray, match="not UTF-8"):
                list(json_array.read_elements(io.BytesIO(data)))
            return
        assert [json.loads(element) for element in json_array.read_elements(io.BytesIO(data))] == values
        for cut in {len(data) // 2, len(data) - 1}:
            with pytest.raises(json_array.DamagedArray):
                list(json_array.read_elements(io.BytesIO(data[:cut])))
