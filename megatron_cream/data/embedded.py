"""The embedded default corpus: the source files of the running Python's standard library.

Every machine with Python has these long documents, so a first run needs no download.
`prepare()` trains a sentencepiece tokenizer on them and writes training and held-out
.bin/.idx files once; later calls find them in the cache.

Excluded are tests, which minimal images lack, so that a Python version gives the same
corpus everywhere; the generated character tables of `encodings`, which are so similar
that the held-out loss would be too low; and files that are not library code.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import shutil
import sys
import sysconfig
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_cream.common.files import check_regular
from megatron_cream.data.preprocess import PreprocessReport, preprocess
from megatron_cream.data.tokenizers import load_tokenizer

FORMAT_VERSION = 1
"""Part of the cache key: increase it when the same sources give different files."""

EXCLUDED_FOLDERS = frozenset(
    "site-packages dist-packages __pycache__ test tests encodings idlelib lib2to3 ensurepip turtledemo".split()
)
EXCLUDED_PREFIXES = ("config-", "_sysconfigdata")
"""Folders and files that describe how this machine's Python was built."""

LONG_BYTES = 12 * 1024
"""Minimum size of a long file (about 4,000 tokens); only long files are held out."""

HELD_OUT = 0.08
"""Share of the long files in the validation set."""

THRESHOLDS = (256, 512, 1024, 2048, 4096)
"""Minimum document lengths, in tokens, in the statistics."""

CACHE_VARIABLE = "MEGATRON_CREAM_CACHE"
BUILDING = ".building-"
"""Name prefix of a folder whose corpus is incomplete."""


@dataclass(frozen=True)
class EmbeddedCorpus:
    """The files and the size of the corpus."""

    tokenizer_model: Path
    """For --tokenizer-type SentencePieceTokenizer."""

    train_prefix: Path
    valid_prefix: Path
    """For --train-data-path and --valid-data-path. PREFIX.jsonl contains the same text."""

    vocab_size: int
    train_documents: int
    train_tokens: int
    valid_documents: int
    valid_tokens: int

    train_documents_of_at_least: dict[int, int]
    valid_documents_of_at_least: dict[int, int]
    """Minimum length in tokens (THRESHOLDS) -> documents of that length or more."""


def default_cache_dir() -> Path:
    """Return $MEGATRON_CREAM_CACHE, or ~/.cache/megatron_cream."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "megatron_cream")


def prepare(
    cache_dir: Path | None = None,
    *,
    vocab_size: int = 512,
    seed: int = 0,
    source_root: Path | None = None,
    progress: bool = True,
) -> EmbeddedCorpus:
    """Return the embedded corpus; build it within seconds if `cache_dir` does not have it.

    Any number of processes may call this at once: one builds, the others wait for it. The
    folder is renamed when it is complete, so a killed build leaves no partial corpus.

    Args:
        cache_dir: None is `default_cache_dir()`.
        vocab_size: of the tokenizer, including 3 control and 256 byte tokens.
        seed: selects the held-out files.
        source_root: folder of Python files; None is the standard library.
        progress: print progress to stderr.

    Raises:
        ValueError: `source_root` has fewer than two files, or too little text for this vocabulary.
        OSError: the cache cannot be written.
    """
    source_root = Path(source_root or sysconfig.get_path("stdlib"))
    cache_dir = Path(cache_dir or default_cache_dir())
    files = source_files(source_root)
    if len(files) < 2:
        raise ValueError(f"{source_root}: the embedded corpus needs 2 or more Python source files, found {len(files)}")
    folder = cache_dir / f"stdlib-{platform.python_version()}-{_cache_key(source_root, files, vocab_size, seed)}"
    if (corpus := _load(folder)) is not None:
        return corpus
    cache_dir.mkdir(parents=True, exist_ok=True)
    with _lock(cache_dir / ".lock"):
        if (corpus := _load(folder)) is not None:
            return corpus
        _remove_leftovers(cache_dir)
        building = cache_dir / f"{BUILDING}{uuid.uuid4().hex}"
        building.mkdir()
        try:
            _build(building, source_root, files, vocab_size, seed, progress)
            # Fails if another process was faster (file systems without locks).
            with contextlib.suppress(OSError):
                os.rename(building, folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    if (corpus := _load(folder)) is None:
        raise OSError(f"{folder}: damaged or not writable. Delete it, or set {CACHE_VARIABLE} to another folder")
    return corpus


def source_files(root: Path) -> list[Path]:
    """Return the non-empty, not excluded Python files under `root`, sorted by path."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not _is_excluded(name)]
        found += [Path(folder, name) for name in names if name.endswith(".py") and not _is_excluded(name)]
    return sorted(path for path in found if path.is_file() and path.stat().st_size)


def split_files(root: Path, files: list[Path], seed: int = 0) -> tuple[list[Path], list[Path]]:
    """Split into (train, valid): hold out HELD_OUT of the long files, by a hash of their path.

    Whether a file is held out does not depend on the other files. But if none would be, the
    long file with the lowest hash is held out; without long files, any file may be.
    """

    def hash_unit(path: Path) -> float:
        name = f"{seed}:{path.relative_to(root).as_posix()}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64

    long = [path for path in files if path.stat().st_size >= LONG_BYTES]
    valid = [path for path in long if hash_unit(path) < HELD_OUT] or [min(long or files, key=hash_unit)]
    held_out = set(valid)
    return [path for path in files if path not in held_out], valid


def train_tokenizer(texts: list[str], vocab_size: int, symbols: Sequence[str] = ()) -> bytes:
    """Train a sentencepiece BPE model on `texts`; decode(encode(text)) returns the text.

    That holds for any text without U+2581, which sentencepiece uses for a space.

    Deterministic: equal texts give equal bytes. Ids 0 to 2 are unk, BOS and EOS, as in
    Llama's own model; then come `symbols`, and 256 byte tokens, which encode newlines and tabs.

    Raises:
        ValueError: the texts are too small for `vocab_size` tokens.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.split("\n") if line),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            user_defined_symbols=list(symbols),
            byte_fallback=True,
            # Keep every character and the indentation of code.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            num_threads=1,  # more are not faster, and the count is written into the model
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"cannot train a tokenizer of vocab_size {vocab_size}: {error}") from error
    return model.getvalue()


def _build(folder: Path, root: Path, files: list[Path], vocab_size: int, seed: int, progress: bool) -> None:
    log = _make_printer(progress)
    log(f"{len(files)} source files of Python {platform.python_version()} in {root}")
    train_files, valid_files = split_files(root, files, seed)
    train = _write_documents(folder / "train.jsonl", root, train_files)
    _write_documents(folder / "valid.jsonl", root, valid_files)
    log(f"training a tokenizer of {vocab_size} tokens on {sum(map(len, train)) / 1e6:.1f}M characters")
    model = folder / "tokenizer.model"
    model.write_bytes(train_tokenizer(train, vocab_size))
    log("tokenizer trained; loading it")
    tokenizer = load_tokenizer("SentencePieceTokenizer", model)
    numbers: dict[str, object] = {"vocab_size": tokenizer.vocab_size}
    for split in ("train", "valid"):
        log(f"tokenizing {split}.jsonl")
        report = preprocess([folder / f"{split}.jsonl"], folder / split, tokenizer, progress=False)
        numbers |= _numbers(split, report)
    # Written last: it marks the corpus as complete.
    (folder / "corpus.json").write_text(json.dumps(numbers, indent=1))
    log(
        f"done: {numbers['train_documents']} documents, {numbers['train_tokens']:,} tokens to train on; "
        f"{numbers['valid_documents']} documents, {numbers['valid_tokens']:,} tokens held out"
    )


def _write_documents(path: Path, root: Path, files: list[Path]) -> list[str]:
    """Write the files as JSON lines {"name", "text"}; return their texts."""
    texts = []
    with path.open("w", encoding="utf-8") as lines:
        for file in files:
            with contextlib.suppress(UnicodeDecodeError):  # a few sources are Latin-1
                texts.append(file.read_bytes().decode("utf-8"))
                record = {"name": file.relative_to(root).as_posix(), "text": texts[-1]}
                lines.write(json.dumps(record, ensure_ascii=False) + "\n")
    return texts


def _numbers(split: str, report: PreprocessReport) -> dict[str, object]:
    return {
        f"{split}_documents": report.documents,
        f"{split}_tokens": report.tokens,
        f"{split}_documents_of_at_least": {n: report.documents_of_at_least(n) for n in THRESHOLDS},
    }


def _load(folder: Path) -> EmbeddedCorpus | None:
    """Return the corpus in `folder`; None if there is none or a part of it is missing."""
    model, prefixes = folder / "tokenizer.model", [folder / "train", folder / "valid"]
    parts = [model, *(Path(f"{prefix}{suffix}") for prefix in prefixes for suffix in (".bin", ".idx"))]
    try:
        numbers = json.loads((folder / "corpus.json").read_text())
    except (OSError, ValueError):
        return None
    if not all(part.is_file() for part in parts):
        return None
    for name, value in numbers.items():
        if isinstance(value, dict):  # JSON turned the lengths into strings
            numbers[name] = {int(length): count for length, count in value.items()}
    return EmbeddedCorpus(model, *prefixes, **numbers)


def _cache_key(root: Path, files: list[Path], vocab_size: int, seed: int) -> str:
    listing = [(path.relative_to(root).as_posix(), path.stat().st_size) for path in files]
    trainer = importlib.metadata.version("sentencepiece")
    parts = [FORMAT_VERSION, platform.python_version(), trainer, vocab_size, seed, listing]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _is_excluded(name: str) -> bool:
    return name in EXCLUDED_FOLDERS or name.startswith(EXCLUDED_PREFIXES)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a file lock in the block; the lock ends with the process."""
    check_regular(path, "--embedded-data")
    with path.open("w") as lock:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove_leftovers(cache_dir: Path) -> None:
    """Delete folders of killed builds after a day; another node may still be building."""
    for folder in cache_dir.glob(f"{BUILDING}*"):
        if time.time() - folder.stat().st_mtime > 24 * 3600:
            shutil.rmtree(folder, ignore_errors=True)


def _make_printer(enabled: bool) -> Callable[[str], None]:
    started = time.perf_counter()

    def log(text: str) -> None:
        if enabled:
            print(f"embedded corpus [{time.perf_counter() - started:4.1f} s]: {text}", file=sys.stderr, flush=True)

    return log
