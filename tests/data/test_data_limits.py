"""Tests of inputs that could take unbounded memory or time: long lines, chat template loops, many long rows."""

import bz2
import gzip
import io
import json
import lzma
import zipfile

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from megatron_cream.common.errors import UsageError
from megatron_cream.data import compressed, documents, time_limit
from megatron_cream.data.chat import TemplateChat
from megatron_cream.data.columns import read_rows
from megatron_cream.data.preprocess import preprocess
from megatron_cream.data.tokenizers import load_tokenizer
from megatron_cream.evaluation.models.tokenizer import open_tokenizer
from megatron_cream.evaluation.tasks.sources import read_json_lines
from tests.data.test_preprocess import ByteTokenizer
from tests.evaluation_models import save_tokenizer

COMPRESS = {".jsonl": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
COMPRESS |= {".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.fixture
def short(monkeypatch):
    """Limit lines to 1 MiB."""
    monkeypatch.setattr(compressed, "LONGEST_LINE", 1 << 20)
    monkeypatch.setattr(documents, "LONGEST_LINE", 1 << 20)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_an_overlong_line_is_rejected_by_number(short, tmp_path, suffix):
    """A compressed file of a few kilobytes may contain one line of gigabytes."""
    path = tmp_path / f"x.jsonl{suffix.replace('.jsonl', '')}"
    good = json.dumps({"text": "a" * ((1 << 20) - 13)}).encode() + b"\n"
    path.write_bytes(COMPRESS[suffix](good * 2))
    assert preprocess([path], tmp_path / "out", ByteTokenizer(), progress=False).documents == 2
    path.write_bytes(COMPRESS[suffix](good + b" " + good))
    words = "line 2 is longer than 1 MiB. Put one JSON object on each line, or split the document"
    with pytest.raises(ValueError, match=f"{path}: {words}"):
        preprocess([path], tmp_path / "out", ByteTokenizer(), progress=False, overwrite=True)
    if suffix in (".jsonl", ".gz"):
        with pytest.raises(UsageError, match=f"{path}: cannot be read .{words}"):
            list(read_json_lines(path, ["text"]))


def zip_text(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", data)
    return file.getvalue()


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".bz2", ".xz", ".zip"])
def test_an_overlong_text_file_is_skipped(short, tmp_path, suffix):
    compress = zip_text if suffix == ".zip" else COMPRESS[suffix or ".jsonl"]
    (tmp_path / f"a.txt{suffix}").write_bytes(compress(b"a" * (1 << 20)))
    (tmp_path / f"b.txt{suffix}").write_bytes(compress(b"a" * ((1 << 20) + 1)))
    inputs = [tmp_path] if suffix != ".zip" else sorted(tmp_path.iterdir())
    report = preprocess(inputs, tmp_path / "out", ByteTokenizer(), progress=False)
    assert report.documents == 1 and report.dropped == {"text file larger than 1 MiB": 1}


def test_an_endless_chat_template_is_rejected(monkeypatch, tmp_path):
    monkeypatch.setattr(time_limit, "SECONDS", 0.2)
    save_tokenizer(tmp_path / "tokenizer")
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(loops)
    tokenizer = load_tokenizer("HuggingFaceTokenizer", tmp_path / "tokenizer")
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(ValueError, match="did not finish within 0.2 s"):
        TemplateChat(tokenizer)(turns)
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    with pytest.raises(ValueError, match=f"^{tmp_path}/x.jsonl:1: the chat template of {tmp_path}/tokenizer did not"):
        preprocess([tmp_path / "x.jsonl"], tmp_path / "out", tokenizer, chat_format="tokenizer", progress=False)
    with pytest.raises(UsageError, match="--chat: the model's chat template did not finish"):
        open_tokenizer(tmp_path / "tokenizer", flag="--model").encode_chat("q")


def test_long_texts_repeated_in_a_dictionary_are_read(tmp_path):
    """A few hundred rows may exceed 2 GiB, the limit of one Arrow text array."""
    texts = ["é" + "a" * (17 << 20), "short", "b" * (16 << 20)]
    places = [0, 2, None, 1] * 64
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array(places, pyarrow.int32()), pyarrow.array(texts))
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "x.parquet")
    found = [value for _, value, _ in read_rows(tmp_path / "x.parquet", ("text",), False, 0)]
    wanted = [text.encode() for text in texts]
    assert sum(map(len, filter(None, found))) > 1 << 31
    assert all(value == (None if place is None else wanted[place]) for place, value in zip(places, found, strict=True))
