"""Tests of the embedded corpus, on a small stand-in for the standard library."""

import multiprocessing
import os
import random
from pathlib import Path

import pytest
import sentencepiece
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_cream.data import embedded

VOCAB = 400


@pytest.fixture
def library(tmp_path) -> Path:
    """A folder of Python-like files: 12 long ones, short ones, and files that must be left out."""
    root = tmp_path / "lib"
    rng = random.Random(0)
    words = ["self", "return", "value", "index", "name", "print", "while", "result", "lambda", "naïve"]

    def source(lines: int) -> str:
        return "".join(
            f"{' ' * rng.randrange(0, 9, 4)}{rng.choice(words)} = {rng.choice(words)}({rng.randrange(99)})\n"
            for _ in range(lines)
        )

    sizes = {f"long_{i}.py": 900 for i in range(12)} | {f"package/short_{i}.py": 40 for i in range(8)}
    for name in ("test/test_x.py", "site-packages/y.py", "encodings/cp437.py", "_sysconfigdata_linux.py", "notes.txt"):
        sizes[name] = 40
    for name, lines in sizes.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source(lines))
    (root / "empty.py").touch()
    (root / "latin.py").write_bytes("# -*- coding: latin-1 -*-\n# é\n".encode("latin-1"))
    (root / "dangling.py").symlink_to(root / "nowhere.py")
    return root


def prepare(cache: Path, library: Path, **options) -> embedded.EmbeddedCorpus:
    return embedded.prepare(cache, vocab_size=VOCAB, source_root=library, progress=False, **options)


def all_bytes(corpus: embedded.EmbeddedCorpus) -> dict[str, bytes]:
    folder = corpus.tokenizer_model.parent
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_two_builds_give_the_same_bytes(tmp_path, library):
    first, second = prepare(tmp_path / "a", library), prepare(tmp_path / "b", library)
    assert all_bytes(first) == all_bytes(second)
    parts = {f"{split}.{kind}" for split in ("train", "valid") for kind in ("bin", "idx", "jsonl")}
    assert set(all_bytes(first)) == parts | {"tokenizer.model", "corpus.json"}


def test_documents_are_the_files_and_text_round_trips(tmp_path, library):
    corpus = prepare(tmp_path / "cache", library)
    files = embedded.source_files(library)
    assert len(files) == 21 and library / "latin.py" in files
    train, valid = embedded.split_files(library, files)
    assert not set(train) & set(valid) and sorted(train + valid) == files
    assert all(path.stat().st_size >= embedded.LONG_BYTES for path in valid)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(corpus.tokenizer_model))
    assert processor.vocab_size() == corpus.vocab_size == VOCAB
    for prefix, paths, documents, tokens, counts in [
        (corpus.train_prefix, train, corpus.train_documents, corpus.train_tokens, corpus.train_documents_of_at_least),
        (corpus.valid_prefix, valid, corpus.valid_documents, corpus.valid_tokens, corpus.valid_documents_of_at_least),
    ]:
        dataset = IndexedDataset(str(prefix))
        texts = [path.read_text() for path in paths if path.name != "latin.py"]
        assert len(dataset) == len(texts) == documents
        assert dataset.sequence_lengths.sum() == tokens
        assert counts == {n: int((dataset.sequence_lengths >= n).sum()) for n in (256, 512, 1024, 2048, 4096)}
        for i, text in enumerate(texts):
            ids = dataset[i].tolist()
            assert (ids[0], ids[-1]) == (1, 2)
            assert processor.decode(ids[1:-1]) == text


def test_any_text_round_trips(tmp_path, library):
    model = prepare(tmp_path / "cache", library).tokenizer_model
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for text in ["\tx\r\n\n    y  \n ", "  lead", "é ☃ 漢字 \U0001f600", "<s></s><unk>", "▁ \x0c\x00", ""]:
        # sentencepiece encodes a space as U+2581, so U+2581 itself decodes to a space.
        assert processor.decode(processor.encode(text)) == text.replace("▁", " ")


def test_held_out_files_do_not_depend_on_the_other_files(library):
    files = embedded.source_files(library)
    _, valid = embedded.split_files(library, files)
    _, again = embedded.split_files(library, sorted(set(files[5:]) | set(valid)))
    assert again == valid
    splits = {tuple(embedded.split_files(library, files, seed)[1]) for seed in range(8)}
    assert len(splits) > 1


def test_a_second_call_builds_nothing(tmp_path, library, monkeypatch):
    first = prepare(tmp_path, library)
    monkeypatch.setattr(embedded, "_build", lambda *_: pytest.fail("built again"))
    assert prepare(tmp_path, library) == first
    monkeypatch.setenv(embedded.CACHE_VARIABLE, str(tmp_path))
    assert embedded.prepare(vocab_size=VOCAB, source_root=library) == first


def test_other_sources_or_settings_build_another_corpus(tmp_path, library):
    folders = {
        prepare(tmp_path, library).tokenizer_model.parent,
        prepare(tmp_path, library, seed=1).tokenizer_model.parent,
    }
    (library / "long_0.py").write_text("changed = 1\n" * 3000)
    folders.add(prepare(tmp_path, library).tokenizer_model.parent)
    assert len(folders) == 3


@pytest.mark.parametrize("moment", ["train_tokenizer", "preprocess", "_numbers"])
def test_a_killed_build_leaves_no_corpus(tmp_path, library, monkeypatch, moment):
    cache = tmp_path / "cache"

    def build_and_die() -> None:
        monkeypatch.setattr(embedded, moment, lambda *_, **__: os._exit(9))
        prepare(cache, library)

    child = multiprocessing.get_context("fork").Process(target=build_and_die)
    child.start()
    child.join()
    assert child.exitcode == 9
    leftover = [path for path in cache.iterdir() if path.name != ".lock"]
    assert [path.name.startswith(embedded.BUILDING) for path in leftover] == [True]
    corpus = prepare(cache, library)
    assert corpus.train_documents > 10 and leftover[0].exists()

    os.utime(leftover[0], (0, 0))  # an old leftover: the next build removes it
    prepare(cache, library, seed=1)
    assert not leftover[0].exists()


def test_an_exception_leaves_no_folder(tmp_path, library, monkeypatch):
    monkeypatch.setattr(embedded, "preprocess", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(tmp_path / "cache", library)
    assert os.listdir(tmp_path / "cache") == [".lock"]


@pytest.mark.parametrize("locks", [True, False])
def test_processes_that_call_at_once_get_one_corpus(tmp_path, library, monkeypatch, locks):
    if not locks:  # as on some network file systems: both build, and the first result is used

        def refuse(*_):
            raise OSError("no locks")

        monkeypatch.setattr(embedded.fcntl, "flock", refuse)
    context = multiprocessing.get_context("fork")
    results, barrier = context.Queue(), context.Barrier(2)

    def call() -> None:
        barrier.wait()
        results.put(prepare(tmp_path / "cache", library))

    children = [context.Process(target=call) for _ in range(2)]
    for child in children:
        child.start()
    corpora = [results.get(timeout=300) for _ in children]
    for child in children:
        child.join()
    assert corpora[0] == corpora[1]
    assert len([path for path in (tmp_path / "cache").iterdir() if path.name != ".lock"]) == 1
    assert IndexedDataset(str(corpora[0].train_prefix))[0].size > 0


def test_progress_is_printed_in_lines(tmp_path, library, capfd):
    embedded.prepare(tmp_path, vocab_size=VOCAB, source_root=library)
    lines = capfd.readouterr().err.splitlines()
    assert any("training a tokenizer of 400 tokens" in line for line in lines)
    assert "held out" in lines[-1]


def test_too_little_text_is_reported(tmp_path, library):
    with pytest.raises(ValueError, match="vocab_size 60000"):
        embedded.prepare(tmp_path, vocab_size=60000, source_root=library, progress=False)
    with pytest.raises(ValueError, match="needs 2 or more Python source files, found 0"):
        embedded.prepare(tmp_path, source_root=tmp_path / "nowhere")


def test_the_standard_library_has_long_documents_without_its_tests():
    root = Path(os.__file__).parent
    files = embedded.source_files(root)
    names = {path.relative_to(root).as_posix() for path in files}
    assert "argparse.py" in names and not any(
        name.startswith(("test/", "encodings/", "site-packages/")) for name in names
    )
    assert sum(path.stat().st_size >= embedded.LONG_BYTES for path in files) > 100
