"""Tests of preprocessing to .bin/.idx: the written data, complete or absent output, and the tool's errors."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
import subprocess
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_cream.commands import preprocess as command
from megatron_cream.data import documents
from megatron_cream.data.indexed import paths as output_paths
from megatron_cream.data.preprocess import preprocess
from megatron_cream.data.tokenizers import bos_to_prepend, load_tokenizer
from tests import forked_commands
from tests.bad_inputs import Ended, start

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_data.py"


class ByteTokenizer:
    """A tokenizer of UTF-8 bytes, with BOS 256 and EOD 257."""

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
    path.write_bytes(compress(data, path.suffix))
    return path


def compress(data: bytes, suffix: str) -> bytes:
    """Compress in the format of `suffix`, if it is one, as two streams, as `cat a.zst b.zst` writes them."""
    pack = {".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(suffix)
    if suffix == ".lz4":
        import lz4.frame

        pack = lz4.frame.compress
    padding = bytes(4) if suffix == ".xz" else b""
    return pack(data[:99]) + padding + pack(data[99:]) + padding if pack else data


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
        sentence_iterator=iter(some_texts(50)),
        model_prefix=str(prefix),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


@pytest.fixture(scope="module")
def huggingface_folder(tmp_path_factory) -> Path:
    """A word-level tokenizer that adds BOS by itself, like Llama 3's."""
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
    """Write the texts in the format that the name implies; in folders they follow the order of the files."""
    if path.suffix == ".parquet":
        # Row groups of 7 rows, a second column, and a categorical text column if asked for.
        texts = pyarrow.array(texts).dictionary_encode() if path.stem == "categories" else texts
        table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
        pyarrow.parquet.write_table(table, path, row_group_size=7)
    elif path.suffix == ".arrow":
        table = pyarrow.table({"text": texts})
        with pyarrow.ipc.new_file(path, table.schema) as file:
            file.write_table(table, max_chunksize=9)
    elif ".csv" in path.suffixes:
        file = io.StringIO(newline="")
        csv.writer(file).writerows([("id", "text"), *enumerate(texts)])
        path.write_bytes(compress(file.getvalue().encode(), path.suffix))
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for i, text in enumerate(texts[:20]):
                archive.writestr(f"a/{i:02}.txt", text, [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED][i % 2])
            for name in ("b.jsonl", "c.jsonl.bz2"):
                part = write_lines(path.with_name(name), texts[20:30] if name == "b.jsonl" else texts[30:])
                archive.write(part, name, zipfile.ZIP_DEFLATED)
                part.unlink()
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
    with pytest.raises(ValueError, match="empty text: 1, shorter than 5 tokens: 1"):
        preprocess([path], tmp_path / "x", ByteTokenizer(), min_document_tokens=5, progress=False)
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_ids_beyond_the_vocabulary_are_rejected(tmp_path):
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size = 99
    path = write_lines(tmp_path / "a.jsonl", ["abc"])  # "c" has id 99
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
    assert tokenizer.tokenize("the cat") == [1, 3, 4]  # the tokenizer adds BOS
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
    assert "1 file," in lines[0] and "1 document," in lines[1]


def run_tool(*flags: object) -> subprocess.CompletedProcess:
    command = [*forked_commands.python(), TOOL, *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def run_in_fork(*flags: object) -> Ended:
    """Run the tool without importing all again; for what a fresh process does in the same way."""
    return start(command.main, TOOL, *flags)()


def test_the_tool_writes_and_reports(tmp_path, sentencepiece_model):
    path = write_lines(tmp_path / "a.jsonl", some_texts(20, longest=9000))
    with path.open("a") as file:
        file.write("{broken\n")
    done = run_tool(
        "--input",
        path,
        "--output-prefix",
        tmp_path / "x",
        "--json-keys",
        "text",
        "--workers",
        2,
        "--tokenizer-type",
        "SentencePieceTokenizer",
        "--tokenizer-model",
        sentencepiece_model,
    )
    assert done.returncode == 0, done.stderr
    lengths = [len(ids) for ids in read_back(tmp_path / "x")]
    rows = {cells[1].strip(): cells[2].strip() for row in done.stdout.splitlines() if len(cells := row.split("│")) > 2}
    assert rows["documents"] == "20"
    assert rows["tokens"] == f"{sum(lengths):,}"
    assert rows["documents of 4,096 tokens or more"] == str(sum(length >= 4096 for length in lengths))
    assert rows["dropped: malformed JSON"] == "1"
    assert f"first dropped: malformed JSON: {path}:21" in done.stdout.splitlines()
    assert len(done.stderr.splitlines()) == 2


def test_bad_input_prints_one_line_and_writes_nothing(tmp_path, sentencepiece_model):
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
        ({"--output-prefix": path / "x"}, f"error: --output-prefix {path}/x: {path} is not a folder"),
        ({"--output-prefix": tmp_path / "x.bin"}, "x.bin: must be the path without .bin or .idx"),
        ({"--tokenizer-type": "BPE"}, "--tokenizer-type: invalid choice: 'BPE'"),
        ({"--tokenizer-model": tmp_path / "no.model"}, "--tokenizer-model"),
        ({"--tokenizer-model": path}, f"--tokenizer-model {path}: not a sentencepiece model"),  # imports Megatron
        ({"--parse-special": ""}, "--parse-special: Llama2Tokenizer never parses special tokens; leave it out"),
        ({"--workers": 0}, "--workers 0: must be a whole number above 0"),
        ({"--min-document-tokens": "many"}, "--min-document-tokens: invalid int value: 'many'"),
    ]
    before = sorted(os.listdir(tmp_path))
    for change, message in cases:
        done = run_in_fork(*(part for pair in (good | change).items() for part in pair if part != ""))
        assert done.code == 2, change
        assert len(done.error.splitlines()) == 1 and message in done.error, done.error
        assert not done.out
    assert sorted(os.listdir(tmp_path)) == before
