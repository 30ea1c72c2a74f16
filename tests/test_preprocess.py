"""Documents to .bin/.idx: what is written, that it is whole or absent, and the tool's errors."""

import gzip
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_cream.data import documents, json_array
from megatron_cream.data import preprocess as preprocess_module
from megatron_cream.data.indexed import paths as output_paths
from megatron_cream.data.preprocess import preprocess
from megatron_cream.data.tokenizers import bos_to_prepend, load_tokenizer

TOOL = Path(__file__).parents[1] / "tools" / "preprocess_data.py"


class ByteTokenizer:
    """UTF-8 bytes, then BOS and EOD."""

    bos, eod, vocab_size = 256, 257, 258

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode())


class RaisingTokenizer(ByteTokenizer):
    def tokenize(self, text: str) -> list[int]:
        if "poison" in text:
            raise RuntimeError("cannot tokenize")
        return super().tokenize(text)


def write_lines(path: Path, texts: list[str]) -> Path:
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    # Two frames, as `cat a.zst b.zst` leaves them.
    zst = lambda data: zstandard.compress(data[:99]) + zstandard.compress(data[99:])
    path.write_bytes({".gz": gzip.compress, ".zst": zst}.get(path.suffix, bytes)(data))
    return path


def some_texts(count: int, longest: int = 3000) -> list[str]:
    rng = random.Random(count)
    return ["".join(rng.choices("ab cdé\n☃", k=rng.randint(1, longest))) for _ in range(count)]


def read_back(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(str(prefix))
    assert list(dataset.document_indices) == list(range(len(dataset) + 1))
    return [dataset[i].tolist() for i in range(len(dataset))]


def written(prefix: Path) -> list[bytes]:
    return [path.read_bytes() for path in output_paths(prefix)]


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory) -> Path:
    import sentencepiece

    prefix = tmp_path_factory.mktemp("spm") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(some_texts(50)), model_prefix=str(prefix), vocab_size=300, model_type="bpe",
        byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    return prefix.with_suffix(".model")


@pytest.fixture(scope="module")
def huggingface_folder(tmp_path_factory) -> Path:
    """A word-level tokenizer that starts texts with BOS by itself, as Llama 3's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "the", "cat", "sat"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder = tmp_path_factory.mktemp("hf")
    PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def write_input(path: Path, texts: list[str]) -> Path:
    """The texts in the form that the name asks for; in folders, in the order of their files."""
    if path.suffix == ".parquet":
        # Row groups of 7 rows, a categorical column, and another one beside it.
        texts = pyarrow.array(texts).dictionary_encode() if path.stem == "categories" else texts
        table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
        pyarrow.parquet.write_table(table, path, row_group_size=7)
    elif path.suffix == ".arrow":
        table = pyarrow.table({"text": texts})
        with pyarrow.ipc.new_file(path, table.schema) as file:
            file.write_table(table, max_chunksize=9)
    elif path.name == "array.json":
        path.write_text(json.dumps([{"text": text} for text in texts], indent=1, ensure_ascii=False))
    elif path.name == "dataset":
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(path, num_shards=3)
    elif path.name == "dict":
        datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": texts})}).save_to_disk(path)
    elif path.name == "texts":
        for i, text in enumerate(texts):
            file = path / f"{i // 10}" / f"{i % 10}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, newline="")
        (path / "notes.md").write_text("not a document")
    elif path.name == "mixed":
        (path / "b").mkdir(parents=True)
        write_lines(path / "a.jsonl.zst", texts[:10])
        write_input(path / "b" / "b.parquet", texts[10:25])
        write_lines(path / "c.jsonl.gz", texts[25:])
        (path / "dataset_infos.json").write_text("{}")
    else:
        write_lines(path, texts)
    return path


FORMS = ["a.jsonl", "a.json", "a.ndjson.gz", "a.jsonl.zst", "array.json", "a.parquet", "categories.parquet", "a.arrow"]
FORMS += ["dataset", "dict", "texts", "mixed"]


@pytest.mark.parametrize("name", FORMS)
def test_documents_hold_bos_the_tokenizers_ids_and_eod(tmp_path, name):
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
def test_reading_goes_on_from_the_end_of_any_batch(tmp_path, monkeypatch, name):
    monkeypatch.setattr(documents, "BATCH_BYTES", 4000)
    inputs = [write_lines(tmp_path / "first.jsonl", ["a", "b"]), write_input(tmp_path / name, some_texts(40))]
    files = documents.find_files([*inputs, write_lines(tmp_path / "last.jsonl", ["c"])])
    batches = list(documents.read_batches(files))
    assert len(batches) > 5
    assert batches[-1].end.disk_bytes == sum(file.stat().st_size for file in files)
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
    monkeypatch.setattr(documents, "BATCH_BYTES", 5000)  # many batches
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


@pytest.mark.parametrize("name, kind", [("a.jsonl.gz", "gzip"), ("a.jsonl.zst", "zstd")])
@pytest.mark.parametrize("kept", [0.5, 0.99])
def test_a_cut_compressed_file_is_an_error_not_a_shorter_corpus(tmp_path, name, kind, kept):
    path = write_lines(tmp_path / name, some_texts(50))
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(ValueError, match=f"{name}: not a whole {kind} file"):
        preprocess([path], tmp_path / "x", ByteTokenizer(), progress=False)
    assert os.listdir(tmp_path) == [name]
    text = tmp_path / f"a.txt.{name.split('.')[-1]}"
    text.write_bytes(path.read_bytes())
    good = write_lines(tmp_path / "good.jsonl", ["good"])
    report = preprocess([text, good], tmp_path / "x", ByteTokenizer(), progress=False)
    assert report.documents == 1 and [reason for reason in report.dropped if f"not a whole {kind} file" in reason]


def test_rows_that_hold_no_text_are_counted(tmp_path):
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
        ("no.parquet", "no.parquet: no column 'text'; it has body"),
        ("number.parquet", "number.parquet: column 'text' is int64, expected text"),
        ("chat.parquet", "chat.parquet: column 'text' is list<.*expected text"),
        ("not.parquet", "not.parquet: not a Parquet file"),
        ("not.arrow", "not.arrow: not an Arrow file"),
        ("two", "two: a dataset of 2 splits; give those you mean: .*two/train, .*two/test"),
        ("cut", "cut: its state.json names data-0.arrow, which is not there"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            preprocess([good, tmp_path / path], tmp_path / "x", ByteTokenizer(), progress=False)
        assert "\n" not in str(caught.value)
    chats = tmp_path / "no.parquet"
    with pytest.raises(ValueError, match="no column 'conversations' or 'messages'"):
        preprocess([chats], tmp_path / "x", ByteTokenizer(), chat_format="llama2", progress=False)


@pytest.mark.parametrize("name, package", [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow")])
def test_a_package_that_is_missing_is_one_line(tmp_path, monkeypatch, name, package):
    path = write_input(tmp_path / name, ["text"])
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"pip install {package}$"):
        preprocess([path], tmp_path / "x", ByteTokenizer(), progress=False)
    assert os.listdir(tmp_path) == [name]


JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(JSON), st.integers(1, 40), st.sampled_from([None, 1]), st.booleans())
def test_elements_of_an_array_whatever_the_size_of_a_read(values, chunk, indent, ascii_only):
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


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failure_midway_leaves_nothing_and_touches_nothing(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(documents, "BATCH_BYTES", 1000)
    good = write_lines(tmp_path / "good.jsonl", ["hello"])
    bad = write_lines(tmp_path / "bad.jsonl", [*some_texts(30), "poison", *some_texts(30)])
    with pytest.raises(RuntimeError, match="cannot tokenize"):
        preprocess([bad], tmp_path / "x", RaisingTokenizer(), workers=workers, progress=False)
    assert sorted(os.listdir(tmp_path)) == ["bad.jsonl", "good.jsonl"]

    preprocess([good], tmp_path / "x", RaisingTokenizer(), progress=False)
    before = written(tmp_path / "x")
    with pytest.raises(RuntimeError):
        preprocess([bad], tmp_path / "x", RaisingTokenizer(), workers=workers, overwrite=True, progress=False)
    with pytest.raises(FileExistsError, match="x.bin already exists"):
        preprocess([bad], tmp_path / "x", RaisingTokenizer(), workers=workers, progress=False)
    assert written(tmp_path / "x") == before
    assert sorted(os.listdir(tmp_path)) == ["bad.jsonl", "good.jsonl", "x.bin", "x.idx"]

    other = write_lines(tmp_path / "other.jsonl", ["world"])
    preprocess([other], tmp_path / "x", RaisingTokenizer(), workers=workers, overwrite=True, progress=False)
    assert read_back(tmp_path / "x") == [[256, *b"world", 257]]


def test_nothing_is_written_where_no_document_is_left(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ["", "a"])
    with pytest.raises(ValueError, match="1 empty text, 1 shorter than 5 tokens"):
        preprocess([path], tmp_path / "x", ByteTokenizer(), min_document_tokens=5, progress=False)
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_ids_beyond_the_vocabulary_are_refused(tmp_path):
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size = 99
    path = write_lines(tmp_path / "a.jsonl", ["abc"])  # c is 99
    with pytest.raises(ValueError, match=r"a.jsonl:1: token id 99, but the tokenizer's vocab_size is 99"):
        preprocess([path], tmp_path / "x", tokenizer, progress=False)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_499, np.uint16), (65_500, np.int32)])
def test_ids_are_stored_in_the_type_that_holds_the_vocabulary(tmp_path, vocab_size, dtype):
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size, tokenizer.eod = vocab_size, vocab_size - 1
    preprocess([write_lines(tmp_path / "a.jsonl", ["a"])], tmp_path / "x", tokenizer, progress=False)
    dataset = IndexedDataset(str(tmp_path / "x"))
    assert dataset.index.dtype == dtype and dataset[0].tolist() == [256, 97, vocab_size - 1]


def test_sentencepiece_documents_start_with_bos(tmp_path, sentencepiece_model):
    tokenizer = load_tokenizer("Llama2Tokenizer", sentencepiece_model)
    texts = some_texts(5)
    path = write_lines(tmp_path / "a.jsonl", texts)
    preprocess([path], tmp_path / "x", tokenizer, progress=False)
    assert read_back(tmp_path / "x") == [[1, *tokenizer.tokenize(text), 2] for text in texts]
    assert bos_to_prepend(tokenizer, False) is None


@pytest.mark.parametrize("workers", [1, 2])
def test_huggingface_documents_have_one_bos(tmp_path, huggingface_folder, workers):
    tokenizer = load_tokenizer("HuggingFaceTokenizer", huggingface_folder)
    assert tokenizer.tokenize("the cat") == [1, 3, 4]  # BOS is the tokenizer's own doing
    path = write_lines(tmp_path / "a.jsonl", ["the cat sat", "cat"])
    options = dict(workers=workers, progress=False)
    preprocess([path], tmp_path / "own", tokenizer, **options)
    preprocess([path], tmp_path / "bare", tokenizer, prepend_bos=False, append_eod=False, **options)
    assert read_back(tmp_path / "own") == [[1, 3, 4, 5, 2], [1, 4, 2]]
    assert read_back(tmp_path / "bare") == [[3, 4, 5], [4]]


def test_files_without_a_tokenizer_are_told_apart(tmp_path):
    (tmp_path / "x.model").write_text("no model")
    for kind, path, message in [
        ("Llama2Tokenizer", tmp_path / "x.model", "x.model: not a sentencepiece model"),
        ("Llama2Tokenizer", tmp_path / "y.model", "y.model: no such file"),
        ("HuggingFaceTokenizer", tmp_path, "not a Hugging Face tokenizer folder"),
        ("HuggingFaceTokenizer", tmp_path / "gpt2", "gpt2: no such folder"),
        ("TikTokenizer", tmp_path, "TikTokenizer: expected one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_tokenizer(kind, path)


def test_progress_off_a_terminal_is_two_lines(tmp_path, capfd):
    path = write_lines(tmp_path / "a.jsonl", ["abc"])
    preprocess([path], tmp_path / "x", ByteTokenizer())
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("preprocess: ") for line in lines)
    assert "1 documents" in lines[1]


def run_tool(*flags: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, TOOL, *map(str, flags)], capture_output=True, text=True, timeout=120)


def test_the_tool_writes_and_reports(tmp_path, sentencepiece_model):
    path = write_lines(tmp_path / "a.jsonl", some_texts(20, longest=9000))
    with path.open("a") as file:
        file.write("{broken\n")
    done = run_tool(
        "--input", path, "--output-prefix", tmp_path / "x", "--json-keys", "text", "--workers", 2,
        "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", sentencepiece_model,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lengths = [len(ids) for ids in read_back(tmp_path / "x")]
    rows = {cells[1].strip(): cells[2].strip() for row in done.stdout.splitlines() if len(cells := row.split("│")) > 2}
    assert rows["documents"] == "20"
    assert rows["tokens"] == f"{sum(lengths):,}"
    assert rows["documents of 4,096 tokens or more"] == str(sum(length >= 4096 for length in lengths))
    assert rows["dropped: malformed JSON"] == "1"
    assert f"first dropped: malformed JSON: {path}:21" in done.stdout.splitlines()
    assert len(done.stderr.splitlines()) == 2


def test_bad_input_is_one_line_and_writes_nothing(tmp_path, sentencepiece_model):
    path = write_lines(tmp_path / "a.jsonl", ["abc"])
    (tmp_path / "a.parquet").write_text("")
    (tmp_path / "a.pdf").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.bin").write_text("old")
    good = {
        "--input": path,
        "--output-prefix": tmp_path / "x",
        "--tokenizer-type": "Llama2Tokenizer",
        "--tokenizer-model": sentencepiece_model,
    }
    cases = [
        ({"--input": tmp_path / "no.jsonl"}, f"--input {tmp_path}/no.jsonl: no such file"),
        ({"--input": tmp_path / "a.pdf"}, "a.pdf: expected a file that ends in .jsonl"),
        ({"--input": tmp_path / "empty"}, "file in this folder; name others with --glob"),
        ({"--input": tmp_path / "empty", "--glob": "*.md"}, "no file in this folder matches '*.md'"),
        ({"--output-prefix": tmp_path / "there"}, "there.bin already exists; give another prefix, or --overwrite"),
        ({"--output-prefix": tmp_path / "x.bin"}, "x.bin: expected a path up to .bin and .idx"),
        ({"--tokenizer-type": "BPE"}, "--tokenizer-type: invalid choice: 'BPE'"),
        ({"--tokenizer-model": tmp_path / "no.model"}, "--tokenizer-model"),
        ({"--tokenizer-model": path}, f"--tokenizer-model {path}: not a sentencepiece model"),  # imports Megatron
        ({"--workers": 0}, "--workers 0: expected a whole number from 1"),
        ({"--min-document-tokens": "many"}, "--min-document-tokens: invalid int value: 'many'"),
    ]
    before = sorted(os.listdir(tmp_path))
    for change, message in cases:
        done = run_tool(*(part for pair in (good | change).items() for part in pair))
        assert done.returncode == 2, change
        assert len(done.stderr.splitlines()) == 1 and message in done.stderr, done.stderr
        assert not done.stdout
    assert sorted(os.listdir(tmp_path)) == before
