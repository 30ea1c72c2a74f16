"""Tests that unusable training data gives a one-line error before the run, and an unreadable document a reason."""

import contextlib
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_cream.common.errors import UsageError
from megatron_cream.config import run_data
from megatron_cream.config.checks import data as data_checks
from megatron_cream.config.parser import build_parser
from megatron_cream.data import documents, indexed
from megatron_cream.data.documents import BadDocument, Batch, Position, extract_text, read_documents
from megatron_cream.data.preprocess import preprocess
from tests import forked_commands
from tests.config.test_parse import GOOD, read
from tests.data.test_chat_data import build
from tests.data.test_preprocess import ByteTokenizer
from tests.launch import ROOT, write_documents


def write(prefix, lists, dtype=np.int32) -> str:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for tokens in lists:
        builder.add_document(torch.tensor(tokens), [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


LISTS = [list(range(200)), [7] * 3, list(range(99, 0, -1))]


@pytest.mark.parametrize("dtype", [kind.name for kind in DType if "float" not in kind.name])
def test_data_is_read_and_written_in_megatrons_format(tmp_path, dtype):
    dtype = getattr(np, dtype)
    prefix = write(tmp_path / "x", [[t % 100 for t in tokens] for tokens in LISTS], dtype)
    index = indexed.read_index(prefix)
    assert index.dtype is dtype and index.lengths.tolist() == [200, 3, 99] and index.tokens == 302
    indexed.write_index(tmp_path / "ours.idx", np.array([200, 3, 99], dtype=np.int32), dtype)
    assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "x.idx").read_bytes()


@pytest.mark.parametrize("vocabulary", [100, 65_499, 65_500, 128_256])
def test_tokens_are_stored_as_megatron_does(vocabulary):
    assert indexed.token_type(vocabulary) is DType.optimal_dtype(vocabulary)


def put(path: Path, at: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[at : at + len(data)] = data
    path.write_bytes(content)


def cut(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


# name: (damage to a good pair of 3 documents with 302 int32 tokens, words that the error message must contain)
DAMAGE = {
    "no .bin": (lambda b, i: b.unlink(), ["there is no", "x.bin"]),
    "no .idx": (lambda b, i: i.unlink(), ["there is no", "x.idx"]),
    "a folder": (lambda b, i: (b.unlink(), b.mkdir()), ["there is no", "x.bin"]),
    ".bin cut": (lambda b, i: cut(b, 4), ["x.bin has 1204 bytes", "302 tokens of int32, 1208 bytes"]),
    ".bin empty": (lambda b, i: b.write_bytes(b""), ["x.bin has 0 bytes"]),
    ".bin longer": (lambda b, i: b.write_bytes(b.read_bytes() * 2), ["x.bin has 2416 bytes"]),
    ".idx empty": (lambda b, i: i.write_bytes(b""), ["x.idx does not have the header of an index"]),
    ".idx cut in its header": (lambda b, i: i.write_bytes(i.read_bytes()[:20]), ["header of an index"]),
    ".idx cut": (lambda b, i: cut(i, 1), ["x.idx has 101 bytes", "3 sequences need 102"]),
    "another magic": (lambda b, i: put(i, 0, b"TNTIDX"), ["header of an index"]),
    "another version": (lambda b, i: put(i, 9, b"\x02"), ["version 2, expected 1"]),
    "another dtype": (lambda b, i: put(i, 17, b"\x08"), ["sequences are not contiguous"]),
    "a whole index of another dtype": (
        lambda b, i: indexed.write_index(i, np.array([200, 3, 99], dtype=np.int32), np.uint16),
        ["x.bin has 1208 bytes", "302 tokens of uint16, 604 bytes"],
    ),
    "no dtype": (lambda b, i: put(i, 17, b"\x63"), ["type 99, which is not an integer"]),
    "floats": (lambda b, i: put(i, 17, b"\x07"), ["float32"]),
    "too many sequences": (lambda b, i: put(i, 18, b"\xff" * 8), ["truncated or damaged"]),
    "negative length": (lambda b, i: put(i, 38, b"\xff" * 4), ["sequences are not contiguous"]),
    "another place": (lambda b, i: put(i, 54, b"\x09"), ["sequences are not contiguous"]),
    "another end": (lambda b, i: put(i, 94, b"\x02"), ["documents are not contiguous"]),
    "no documents": (
        lambda b, i: (b.write_bytes(b""), indexed.write_index(i, np.zeros(0, dtype=np.int32), np.int32)),
        ["contains no documents", "empty"],
    ),
    "no tokens": (
        lambda b, i: (b.write_bytes(b""), indexed.write_index(i, np.zeros(2, dtype=np.int32), np.int32)),
        ["contains no tokens", "empty"],
    ),
    "all shorter than N": (
        lambda b, i: write(b.with_suffix(""), [[1] * 127, [2] * 5]),
        ["none of its 2 documents has 128 tokens", "the longest has 127"],
    ),
    "half a loss mask": (
        lambda b, i: Path(f"{b.with_suffix('')}_loss_mask.bin").write_bytes(b"\1"),
        ["there is no", "_loss_mask.idx"],
    ),
    "another's loss mask": (
        lambda b, i: write(f"{b.with_suffix('')}_loss_mask", [[1] * 200, [1] * 4, [0] * 98], np.uint8),
        ["is not the loss mask of", "documents differ"],
    ),
    "a loss mask of another type": (
        lambda b, i: write(f"{b.with_suffix('')}_loss_mask", [[1] * 200, [1] * 3, [0] * 99], np.int32),
        ["is not the loss mask of"],
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("flag", ["data_path", "train_data_path", "data_args_path", "per_split_data_args_path"])
def test_damaged_data_is_rejected_for_every_data_flag(monkeypatch, tmp_path, kind, flag):
    good, prefix = write(tmp_path / "good", LISTS), write(tmp_path / "x", LISTS)
    damage, words = DAMAGE[kind]
    damage(Path(f"{prefix}.bin"), Path(f"{prefix}.idx"))
    value = ["0.5", good, "0.5", prefix]
    if flag == "train_data_path":
        data = {flag: value, "valid_data_path": [good]}
    elif flag == "data_path":
        data = {flag: value}
    else:
        lists = (
            " ".join(value) if flag == "data_args_path" else json.dumps({"train": [good], "valid": value, "test": None})
        )
        (tmp_path / "lists").write_text(lists)
        data = {flag: str(tmp_path / "lists")}
    with pytest.raises(UsageError) as caught:
        data_checks.check_whole(run_data.read(read(monkeypatch, tmp_path, GOOD | data)))
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"--{flag.replace('_', '-')} {prefix}: ")
    assert not [word for word in words if word not in message], message


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"split": "100,0,0"}, ["--split 100,0,0", "--eval-iters 0"]),
        ({"split": "most"}, ["--split most", "969,30,1"]),
        ({"data_path": None, "train_data_path": "PREFIX"}, ["--valid-data-path is missing"]),
        (
            {"data_path": None, "valid_data_path": "PREFIX"},
            ["--train-data-path is missing: --valid-data-path needs it"],
        ),
        ({"data_path": None, "test_data_path": "PREFIX", "eval_iters": 0}, ["--train-data-path is missing"]),
        ({"data_path": None, "data_args_path": "no/list"}, ["--data-args-path no/list", "No such file"]),
        (
            {"data_path": None, "per_split_data_args_path": __file__},
            ["--per-split-data-args-path", "not a valid list of data"],
        ),
    ],
)
def test_data_settings_that_cannot_run(monkeypatch, tmp_path, changed, words):
    prefix = write(tmp_path / "x", LISTS)
    recipe = GOOD | {"data_path": prefix} | {k: prefix if v == "PREFIX" else v for k, v in changed.items()}
    with pytest.raises(UsageError) as caught:
        read(monkeypatch, tmp_path, {k: v for k, v in recipe.items() if v is not None})
    assert "\n" not in str(caught.value)
    assert not [word for word in words if word not in str(caught.value)], caught.value
    if "split" in changed and changed["split"] == "100,0,0":
        read(monkeypatch, tmp_path, recipe | {"eval_iters": 0})


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"train": None}, ["names no data for train"]),
        ({"valid": None}, ["names no data for valid", "--eval-iters 0"]),
        ({"test": ""}, ["test is empty; write null"]),
        ({"train": []}, ["train is empty; write null"]),
        (None, ["--data-args-path", "is empty"]),
    ],
)
def test_lists_of_data_that_name_too_little(monkeypatch, tmp_path, changed, words):
    lists = dict.fromkeys(("train", "valid", "test"), [write(tmp_path / "x", LISTS)])
    file = tmp_path / "list"
    file.write_text("" if changed is None else json.dumps(lists | changed))
    flag = "data_args_path" if changed is None else "per_split_data_args_path"
    with pytest.raises(UsageError) as caught:
        read(monkeypatch, tmp_path, GOOD | {flag: str(file)})
    assert f"--{flag.replace('_', '-')} {file}: " in str(caught.value)
    assert not [word for word in words if word not in str(caught.value)], caught.value


def test_held_out_data_alone_without_training(monkeypatch, tmp_path):
    prefix = write(tmp_path / "x", LISTS)
    args = read(monkeypatch, tmp_path, GOOD | {"valid_data_path": [prefix], "skip_train": True})
    assert args.split is None and run_data.read(args).held_out == [(prefix, (0.0, 1.0))]


def check_token_ids(prefix: str, vocabulary: int) -> None:
    args = build_parser(recipe=False).parse_args(["--data-path", prefix, "--seq-length", "2"])
    args.vocab_size = vocabulary
    data_checks.check_token_ids(args, run_data.read(args))


def test_token_ids_beyond_the_vocabulary(tmp_path):
    prefix = write(tmp_path / "x", LISTS)  # ids 0 to 199
    check_token_ids(prefix, 200)
    with pytest.raises(UsageError, match=r"--data-path .*x: contains token id 199, but the vocabulary .* has 199;"):
        check_token_ids(prefix, 199)
    negative = write(tmp_path / "negative", [[1, -1, 2]])
    with pytest.raises(UsageError, match="contains token id -1"):
        check_token_ids(negative, 200)
    write(indexed.loss_mask_prefix(prefix), [[2] * len(tokens) for tokens in LISTS], np.uint8)
    with pytest.raises(UsageError, match="_loss_mask.bin is not a loss mask: it has values other than 0 and 1"):
        check_token_ids(prefix, 200)


def test_only_a_bounded_part_of_large_data_is_read(tmp_path, monkeypatch):
    tokens = np.zeros(1 << 20, dtype=np.uint16)
    tokens[::1000], tokens[10_000] = 300, 400  # frequent ids beyond a small vocabulary, and a rare one
    prefix = write(tmp_path / "x", [tokens.astype(np.int64)], np.uint16)
    index, read_bytes, fromfile = indexed.read_index(prefix), [], np.fromfile

    def counted(file, dtype, count):
        read_bytes.append(np.dtype(dtype).itemsize * count)
        return fromfile(file, dtype, count)

    monkeypatch.setattr(np, "fromfile", counted)
    assert indexed.token_range(prefix, index, 1 << 22) == (0, 400)
    assert sum(read_bytes) == 1 << 21
    read_bytes.clear()
    assert indexed.token_range(prefix, index, 1 << 18) == (0, 300)
    assert sum(read_bytes) <= 1 << 18


def test_a_rare_id_beyond_the_vocabulary_stops_at_its_sample(tmp_path):
    prefix = write(tmp_path / "x", [[5] * 96, [5] * 95 + [100]])
    dataset = build([prefix], samples=2, vocab_size=100)
    with pytest.raises(ValueError, match=r"x.bin: document 1 contains token ids 5 to 100, but the vocabulary has 100"):
        [dataset[0], dataset[1]]
    assert len([build([prefix], samples=2, vocab_size=101)[i] for i in range(2)]) == 2


def test_the_run_ends_with_exit_code_2_and_writes_nothing(tmp_path):
    """Token ids are checked once the tokenizer is loaded, but still before anything is written."""
    prefix = write_documents(tmp_path / "x", shortest=200)
    before = sorted(tmp_path.iterdir())
    recipe = GOOD | {"vocab_size": 50, "lr": 1e-3, "split": "8,1,1"}
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in recipe.items()]
    result = subprocess.run(
        [
            *forked_commands.python(),
            ROOT / "pretrain_cream.py",
            *flags,
            "--data-path",
            prefix,
            "--save",
            tmp_path / "save",
            "--tensorboard-dir",
            tmp_path / "tensorboard",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 2, result.stderr
    error = result.stderr.strip().splitlines()[-1]
    assert error.startswith(f"pretrain_cream.py: error: --data-path {prefix}: contains token id ")
    assert sorted(tmp_path.iterdir()) == before


@pytest.fixture(scope="module")
def good_pair(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("good") / "x"
    write(prefix, LISTS)
    return prefix, prefix.with_suffix(".idx").read_bytes()


EDITS = st.lists(st.tuples(st.integers(0, 101), st.integers(0, 255)), min_size=1, max_size=4)


@settings(max_examples=500, deadline=None)
@given(edits=EDITS, length=st.none() | st.integers(0, 140))
def test_a_damaged_index_reads_the_same_or_is_rejected(good_pair, edits, length):
    prefix, good = good_pair
    data = bytearray(good)
    for at, value in edits:
        data[at] = value
    if length is not None:
        data = (data + bytes(40))[:length]
    other = prefix.with_name("y")
    other.with_suffix(".bin").write_bytes(prefix.with_suffix(".bin").read_bytes())
    other.with_suffix(".idx").write_bytes(data)
    try:
        index = indexed.read_index(other)
    except ValueError as error:
        assert "\n" not in str(error)
        assert bytes(data) != good
        return
    # The damaged index may look like one with modality bytes; Megatron must read the same documents.
    dataset = IndexedDataset(str(other))
    assert index.lengths.tolist() == [len(tokens) for tokens in LISTS]
    assert [dataset[i].tolist() for i in range(3)] == LISTS


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(0, 50), min_size=1, max_size=30).filter(any), minimum=st.integers(1, 50))
def test_training_uses_only_documents_that_are_long_enough(tmp_path_factory, lengths, minimum):
    """The length filter of preprocessing also agrees with its report."""
    folder = tmp_path_factory.mktemp("lengths")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": "x" * n}) + "\n" for n in lengths))
    kept = [n for n in lengths if n >= minimum]
    with pytest.raises(ValueError, match="no document is left") if not kept else contextlib.nullcontext():
        report = preprocess(
            [folder / "a.jsonl"], folder / "x", ByteTokenizer(), min_document_tokens=minimum, progress=False
        )
        assert report.lengths.tolist() == [n + 2 for n in kept]
        dropped = {
            "empty text": lengths.count(0),
            f"shorter than {minimum} tokens": sum(0 < n < minimum for n in lengths),
        }
        assert report.dropped == {reason: count for reason, count in dropped.items() if count}

    write(folder / "y", [[1] * (n + 60) for n in lengths])
    long = [i for i, n in enumerate(lengths) if n + 60 >= 96]
    if long:
        assert list(build([str(folder / "y")], samples=1).documents) == long
    else:
        with pytest.raises(UsageError, match=f"none of its {len(lengths)} documents has 96 tokens"):
            build([str(folder / "y")], samples=1)


TEXT = st.text() | st.text(st.characters(categories=["Cs", "Ll"]))
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["text", "a"]) | TEXT, inner),
    max_leaves=20,
)
LINE = (
    st.binary()
    | VALUE.map(lambda value: json.dumps(value).encode())
    | st.dictionaries(st.sampled_from(["text", "b"]), VALUE).map(
        lambda value: json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    )
)


@settings(max_examples=200, deadline=None)
@given(st.lists(LINE, max_size=8))
def test_any_line_gives_a_text_or_a_reason(lines):
    items = list(enumerate(lines, 1))
    results = list(read_documents(Batch(Path("f"), "json", items, Position()), lambda r: extract_text(r, "text")))
    assert [where for where, _ in results] == [f"f:{number}" for number, _ in items]
    for line, (_, result) in zip(lines, results):
        try:
            expected = json.loads(line.decode("utf-8-sig"))["text"]
            expected.encode()
        except (ValueError, LookupError, TypeError, AttributeError):
            expected = None
        if isinstance(expected, str) and expected:
            assert result == expected
        else:
            assert isinstance(result, BadDocument) and "\n" not in str(result)


@settings(max_examples=150, deadline=None)
@given(
    data=st.binary(max_size=300),
    name=st.sampled_from(
        ["a.jsonl", "a.json", "a.txt", "a.jsonl.gz", "a.txt.gz", "a.jsonl.zst", "a.txt.zst", "a.parquet", "a.arrow"]
    ),
)
def test_any_bytes_give_documents_or_one_error_line(tmp_path_factory, data, name):
    path = tmp_path_factory.mktemp("any") / name
    for content in (data, b'[{"text": "a"},' + data, b'{"text": "a"}\n' + data, b"ARROW1\0\0" + data):
        path.write_bytes(content)
        try:
            documents.check_files([path], ("text",), False)
            for batch in documents.read_batches([path]):
                for _, document in read_documents(batch, lambda record: extract_text(record, "text")):
                    assert isinstance(document, BadDocument) or document.encode()
        except ValueError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)


@settings(max_examples=60, deadline=None)
@given(flips=st.lists(st.tuples(st.floats(0, 0.999), st.integers(1, 255)), min_size=1, max_size=5), cut=st.floats(0, 1))
@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_damaged_tables_print_one_line(tmp_path_factory, name, flips, cut):
    from tests.data.test_preprocess import write_input

    path = write_input(tmp_path_factory.mktemp("tables") / name, [f"text {i}" for i in range(30)])
    data = bytearray(path.read_bytes())
    for at, value in flips:
        data[int(at * len(data))] ^= value
    path.write_bytes(data[: max(8, int(cut * 2 * len(data)))])
    try:
        documents.check_files([path], ("text",), False)
        for batch in documents.read_batches([path]):
            list(read_documents(batch, lambda record: extract_text(record, "text")))
    except ValueError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
