"""The embedded default corpus: the running Python's own standard library.

Real, long documents that are on every machine with Python, so that a first run needs no
download. `prepare()` trains a sentencepiece tokenizer on them and writes training and
held-out .bin/.idx, once; later calls find them in the cache.

Left out: tests, which minimal images lack, so that a Python version gives the same
corpus everywhere; the generated character tables of `encodings`, which resemble each
other so much that the held-out loss would flatter; and what is not library code.
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
"""Part of the cache key: raise it when the same sources would give other files."""

EXCLUDED_FOLDERS = frozenset(
    "site-packages dist-packages __pycache__ test tests encodings idlelib lib2to3 ensurepip turtledemo".split()
)
EXCLUDED_PREFIXES = ("config-", "_sysconfigdata")
"""Folders and files that describe how this machine's Python was built."""

LONG_BYTES = 12 * 1024
"""A file of this size is long (about 4,000 tokens); only long files are held out."""

HELD_OUT = 0.08
"""Share of the long files that goes to the validation set."""

THRESHOLDS = (256, 512, 1024, 2048, 4096)
"""Document lengths, in tokens, that the statistics count from."""

CACHE_VARIABLE = "MEGATRON_CREAM_CACHE"
BUILDING = ".building-"
"""Name, up to here, of a folder whose corpus is not complete."""


@dataclass(frozen=True)
class EmbeddedCorpus:
    """Where the corpus lies and how large it is."""

    tokenizer_model: Path
    """For --tokenizer-type SentencePieceTokenizer."""

    train_prefix: Path
    valid_prefix: Path
    """For --train-data-path and --valid-data-path. PREFIX.jsonl holds the same text."""

    vocab_size: int
    train_documents: int
    train_tokens: int
    valid_documents: int
    valid_tokens: int

    train_documents_of_at_least: dict[int, int]
    valid_documents_of_at_least: dict[int, int]
    """Length in tokens (THRESHOLDS) -> documents that long."""


def default_cache_dir() -> Path:
    """$MEGATRON_CREAM_CACHE, or ~/.cache/megatron_cream."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "megatron_cream")


def prepare(
    cache_dir: Path | None = None,
    *,
    vocab_size: int = 512,
    seed: int = 0,
    source_root: Path | None = None,
    progress: bool = True,
) -> EmbeddedCorpus:
    """Return the embedded corpus; build it, in seconds, where `cache_dir` lacks it.

    Any number of processes may call this at once: one builds, the others wait for it. A
    corpus takes its name in the cache when it is complete, so a killed build leaves none.

    Args:
        cache_dir: None is `default_cache_dir()`.
        vocab_size: of the tokenizer, its 3 control and 256 byte tokens included.
        seed: which long files are held out.
        source_root: folder of Python files; None is the standard library.
        progress: tell on stderr what is built.

    Raises:
        ValueError: `source_root` has too little text, or for this vocabulary.
        OSError: the cache cannot be written.
    """
    source_root = Path(source_root or sysconfig.get_path("stdlib"))
    cache_dir = Path(cache_dir or default_cache_dir())
    files = source_files(source_root)
    if len(files) < 2:
        raise ValueError(f"{source_root}: the embedded corpus needs Python source files, and there are {len(files)}")
    folder = cache_dir / f"stdlib-{platform.python_version()}-{_cache_key(source_root, files, vocab_size, seed)}"
    if (corpus := _load(folder)) is not None:
        return corpus
    cache_dir.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(cache_dir / ".lock"):
        if (corpus := _load(folder)) is not None:
            return corpus
        _remove_leftovers(cache_dir)
        building = cache_dir / f"{BUILDING}{uuid.uuid4().hex}"
        building.mkdir()
        try:
            _build(building, source_root, files, vocab_size, seed, progress)
            # Fails where another process was faster (file systems without locks).
            with contextlib.suppress(OSError):
                os.rename(building, folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    if (corpus := _load(folder)) is None:
        raise OSError(f"{folder} is damaged or cannot be written: delete it, or set {CACHE_VARIABLE} to another folder")
    return corpus


def source_files(root: Path) -> list[Path]:
    """The non-empty Python files under `root` that are documents, sorted by path."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not _excluded(name)]
        found += [Path(folder, name) for name in names if name.endswith(".py") and not _excluded(name)]
    return sorted(path for path in found if path.is_file() and path.stat().st_size)


def split_files(root: Path, files: list[Path], seed: int = 0) -> tuple[list[Path], list[Path]]:
    """(train, valid): HELD_OUT of the long files, by a hash of their path under `root`.

    A file keeps its side whatever other files there are. Only where that would leave
    nothing to validate on is the file of the lowest hash, of the longest kind, held out.
    """

    def place(path: Path) -> float:
        name = f"{seed}:{path.relative_to(root).as_posix()}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64

    long = [path for path in files if path.stat().st_size >= LONG_BYTES]
    valid = [path for path in long if place(path) < HELD_OUT] or [min(long or files, key=place)]
    held_out = set(valid)
    return [path for path in files if path not in held_out], valid


def train_tokenizer(texts: list[str], vocab_size: int, symbols: Sequence[str] = ()) -> bytes:
    """A sentencepiece BPE model of `texts`; decode(encode(text)) gives back the text.

    (Any text, but for U+2581, which is sentencepiece's own sign for a space.)

    Deterministic: equal texts give equal bytes. Ids 0 to 2 are unk, BOS and EOS, as in
    Llama's own model; then `symbols`, and 256 bytes, which newlines and tabs are spelled with.

    Raises:
        ValueError: the texts do not hold `vocab_size` tokens.
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
            # Code is not prose: what follows keeps every character and its indentation.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            num_threads=1,  # more do not help; the count is written into the model
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"cannot train a tokenizer of vocab_size {vocab_size}: {error}") from error
    return model.getvalue()


def _build(folder: Path, root: Path, files: list[Path], vocab_size: int, seed: int, progress: bool) -> None:
    say = _teller(progress)
    say(f"{len(files)} source files of Python {platform.python_version()} in {root}")
    train_files, valid_files = split_files(root, files, seed)
    train = _write_documents(folder / "train.jsonl", root, train_files)
    _write_documents(folder / "valid.jsonl", root, valid_files)
    say(f"training a tokenizer of {vocab_size} tokens on {sum(map(len, train)) / 1e6:.1f}M characters")
    model = folder / "tokenizer.model"
    model.write_bytes(train_tokenizer(train, vocab_size))
    say("tokenizer trained; loading it")
    tokenizer = load_tokenizer("SentencePieceTokenizer", model)
    numbers: dict[str, object] = {"vocab_size": tokenizer.vocab_size}
    for split in ("train", "valid"):
        say(f"tokenizing {split}.jsonl")
        report = preprocess([folder / f"{split}.jsonl"], folder / split, tokenizer, progress=False)
        numbers |= _numbers(split, report)
    # Last: its presence says that the rest is there.
    (folder / "corpus.json").write_text(json.dumps(numbers, indent=1))
    say(
        f"done: {numbers['train_documents']} documents, {numbers['train_tokens']:,} tokens to train on; "
        f"{numbers['valid_documents']} documents, {numbers['valid_tokens']:,} tokens held out"
    )


def _write_documents(path: Path, root: Path, files: list[Path]) -> list[str]:
    """Write the files as JSON lines {"name", "text"}; give back their texts."""
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
    """The corpus in `folder`, or None where there is none or a part of it is missing."""
    model, prefixes = folder / "tokenizer.model", [folder / "train", folder / "valid"]
    parts = [model, *(Path(f"{prefix}{suffix}") for prefix in prefixes for suffix in (".bin", ".idx"))]
    try:
        numbers = json.loads((folder / "corpus.json").read_text())
    except (OSError, ValueError):
        return None
    if not all(part.is_file() for part in parts):
        return None
    for name, value in numbers.items():
        if isinstance(value, dict):  # JSON made strings of the lengths
            numbers[name] = {int(length): count for length, count in value.items()}
    return EmbeddedCorpus(model, *prefixes, **numbers)


def _cache_key(root: Path, files: list[Path], vocab_size: int, seed: int) -> str:
    listing = [(path.relative_to(root).as_posix(), path.stat().st_size) for path in files]
    trainer = importlib.metadata.version("sentencepiece")
    parts = [FORMAT_VERSION, platform.python_version(), trainer, vocab_size, seed, listing]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _excluded(name: str) -> bool:
    return name in EXCLUDED_FOLDERS or name.startswith(EXCLUDED_PREFIXES)


@contextlib.contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Hold a lock file, so that the ranks of a run do not all build; dies with its holder."""
    check_regular(path, "--embedded-data")
    with path.open("w") as lock:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove_leftovers(cache_dir: Path) -> None:
    """Delete what killed builds left; a day, as a build elsewhere may still be going on."""
    for folder in cache_dir.glob(f"{BUILDING}*"):
        if time.time() - folder.stat().st_mtime > 24 * 3600:
            shutil.rmtree(folder, ignore_errors=True)


def _teller(enabled: bool) -> Callable[[str], None]:
    started = time.perf_counter()

    def say(text: str) -> None:
        if enabled:
            print(f"embedded corpus [{time.perf_counter() - started:4.1f} s]: {text}", file=sys.stderr, flush=True)

    return say
