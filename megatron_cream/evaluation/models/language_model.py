"""The one way in to a model that is evaluated: a folder becomes a LanguageModel, whichever engine runs it."""

import contextlib
import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_cream.checkpoint import hf_folder, output
from megatron_cream.checkpoint.carried import GENERATION_CONFIG
from megatron_cream.checkpoint.convert import DTYPES, export_hf
from megatron_cream.checkpoint.families import shape_from_config
from megatron_cream.checkpoint.hub import locate
from megatron_cream.checkpoint.megatron_folder import MegatronCheckpoint
from megatron_cream.checkpoint.output import TRACKER
from megatron_cream.common import devices
from megatron_cream.common.errors import UsageError
from megatron_cream.common.files import read_json
from megatron_cream.evaluation.models.generation import NonFiniteLogits
from megatron_cream.evaluation.models.tokenizer import ModelTokenizer, has_tokenizer, open_tokenizer
from megatron_cream.evaluation.models.vllm_model import VllmModel, import_vllm
from megatron_cream.model.rotary import FOLLOW_LENGTH
from megatron_cream.patches import platform

ENGINES = ("auto", "vllm")
"""auto: transformers for a Hugging Face folder, Megatron-Core for a Megatron checkpoint."""

_SAMPLE_BYTES = 1 << 20
_IGNORED_SUFFIXES = (".md", ".py", ".png", ".lock")  # files that are no part of the model


class LanguageModel(Protocol):
    """What evaluation needs of a model."""

    tokenizer: ModelTokenizer
    max_positions: int
    """Positions that its configuration names; it runs beyond them, as well as it can."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float,
        top_p: float,
        seeds: Sequence[int],
    ) -> list[list[int]]:
        """New tokens for each prompt, as `generation.generate` describes them."""

    def log_probs(self, tokens: Tensor, start: int) -> Tensor:
        """Natural logarithm of the probability of tokens[:, start:], each after all that stand before it.

        Args:
            tokens: int64 [b, s], without padding.
            start: 1 or more.

        Returns: float32 [b, s - start], on the CPU.
        """

    def weights(self) -> Iterable[tuple[str, Tensor]]:
        """Its parameters by name, as far as they can be reached."""


@dataclass(frozen=True)
class Source:
    """A model before it is loaded.

    path: its folder.
    checkpoint: read from `path`, if that is a Megatron checkpoint, else None.
    tokenizer: of the model, or what the user gave in its place.
    engine: transformers, megatron or vllm.
    dtype: in which it runs.
    flag: what the user gave `path` with, for messages.
    """

    path: Path
    checkpoint: MegatronCheckpoint | None
    tokenizer: ModelTokenizer
    engine: str
    dtype: torch.dtype
    flag: str = "--model"

    @property
    def max_positions(self) -> int:
        if self.checkpoint:
            return self.checkpoint.shape.max_position_embeddings
        file = self.path / "config.json"
        config = read_json(file, "a model's configuration that can be read")
        with contextlib.suppress(UsageError):  # of another family: transformers' to judge
            return shape_from_config(config, file).window
        positions = config.get("max_position_embeddings")
        if positions is not None and (type(positions) is not int or positions < 1):
            raise UsageError(f"{file}: max_position_embeddings {positions!r}: must be a whole number above 0")
        return positions or 1 << 40

    @property
    def vocab_size(self) -> int | None:
        """Token ids that the model takes, where its configuration says so."""
        if self.checkpoint:
            return self.checkpoint.shape.vocab_size
        size = read_json(self.path / "config.json", "a model's configuration that can be read").get("vocab_size")
        return size if type(size) is int else None

    def identity(self) -> dict[str, Any]:
        """What tells this model from another, and from itself after more training; no matter where it lies."""
        folders = [self.checkpoint.folder, self.checkpoint.hf_folder] if self.checkpoint else [self.path]
        return {
            "format": "megatron" if self.checkpoint else "huggingface",
            "step": self.checkpoint.step if self.checkpoint else None,
            "digest": _compute_digest([folder for folder in folders if folder]),
            "engine": self.engine,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def find_model(
    path: str,
    *,
    step: int | None = None,
    tokenizer: Path | None = None,
    engine: str = "auto",
    dtype: str | None = None,
    flag: str = "--model",
) -> Source:
    """Recognise a folder, and read what is small in it.

    Args:
        path: a Hugging Face folder or a name on its Hub, or a folder that `--save` or an import wrote.
        step: of a Megatron checkpoint; None is the newest.
        tokenizer: in place of the model's own.
        engine: of ENGINES.
        dtype: of convert.DTYPES; None is bfloat16 on a GPU and float32 on a CPU.
        flag: what the user gave `path` with, for messages.

    Raises:
        UsageError: neither kind of folder, a damaged one, no tokenizer, or no vLLM where that is asked for.
    """
    if engine == "vllm":
        import_vllm()
    kind = DTYPES[dtype] if dtype else torch.bfloat16 if devices.has_cuda() else torch.float32
    folder = Path(path)
    if (folder / TRACKER).is_file():
        checkpoint = MegatronCheckpoint(folder, step, flag=flag)
        output.check_unchanged(checkpoint.folder)
        words = open_tokenizer(tokenizer, flag="--tokenizer") if tokenizer else _open_own_tokenizer(checkpoint, flag)
        return Source(folder, checkpoint, words, "vllm" if engine == "vllm" else "megatron", kind, flag)
    if step is not None:
        raise UsageError(f"--ckpt-step {step}: only with a Megatron checkpoint, and {flag} {path} is none")
    folder = locate(path, flag=flag)
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"{flag} {path}: neither a Hugging Face folder (it has no config.json) nor a Megatron checkpoint "
            f"(it has no {TRACKER})"
        )
    hf_folder.check_model(folder)
    output.check_unchanged(folder)
    given = (tokenizer, "--tokenizer") if tokenizer else (folder, flag)
    words = open_tokenizer(given[0], flag=given[1])
    return Source(folder, None, words, "vllm" if engine == "vllm" else "transformers", kind, flag)


def load(source: Source, *, prefill_chunk: int) -> LanguageModel:
    """Load the model, on the GPU if there is one.

    It raises UsageError where its logits are not finite.

    Args:
        source: where the weights and the tokenizer are.
        prefill_chunk: tokens of a prompt that are read at once; memory grows with it, results do not change.

    Raises:
        UsageError: weights that cannot be read.
    """
    return _CheckedModel(_load(source, prefill_chunk), source)


def non_finite_error(source: Source, weights: Iterable[tuple[str, Tensor]]) -> UsageError:
    """The error for a model whose logits are NaN or infinite; names the first such tensor of `weights`."""
    bad = next((name for name, weight in weights if not weight.isfinite().all()), None)
    if bad:
        return UsageError(
            f"{source.flag} {source.path}: {bad} holds NaN or infinite numbers, and so do the logits. Train, export or "
            "download the model again."
        )
    return UsageError(
        f"{source.flag} {source.path}: its logits are NaN or infinite in {str(source.dtype).removeprefix('torch.')}. "
        "Try --dtype fp32; if they still are, train, export or download the model again."
    )


class _CheckedModel:
    """A LanguageModel that is only asked for tokens that it has, and whose logits are known to be finite."""

    def __init__(self, model: LanguageModel, source: Source):
        self._model, self._source = model, source
        self.tokenizer, self.max_positions = model.tokenizer, model.max_positions
        self._vocab_size = source.vocab_size

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, **sampling) -> list[list[int]]:
        self._check_ids(max(map(max, filter(None, prompts)), default=0))
        try:
            return self._model.generate(prompts, max_new_tokens, **sampling)
        except NonFiniteLogits:
            raise non_finite_error(self._source, self._model.weights()) from None

    def log_probs(self, tokens: Tensor, start: int) -> Tensor:
        self._check_ids(int(tokens.max()))
        found = self._model.log_probs(tokens, start)
        if not found.isfinite().all():
            raise non_finite_error(self._source, self._model.weights())
        return found

    def _check_ids(self, largest: int) -> None:
        """On a GPU an id without an embedding would end the process with a trace of the device's."""
        if self._vocab_size is not None and largest >= self._vocab_size:
            raise UsageError(
                f"{self._source.flag} {self._source.path}: the tokenizer gives token id {largest}, and the model has "
                f"{self._vocab_size} ids. Give --tokenizer, the one that it was trained with"
            )


def _load(source: Source, prefill_chunk: int) -> LanguageModel:
    stop_ids = source.tokenizer.stop_ids | _read_stop_ids(source)
    common = dict(tokenizer=source.tokenizer, stop_ids=stop_ids, max_positions=source.max_positions)
    if _read_rope_type(source) in FOLLOW_LENGTH:
        prefill_chunk = 1 << 40  # the frequencies of all tokens depend on the longest position: one piece
    if source.engine == "vllm":
        with provide_hf_folder(source) as folder:
            return VllmModel(folder, dtype=source.dtype, prefill_chunk=prefill_chunk, **common)
    if source.engine == "megatron":
        platform.setup()  # before anything of Megatron is imported
        from megatron_cream.evaluation.models.megatron_model import MegatronModel

        return MegatronModel(source.checkpoint, dtype=source.dtype, prefill_chunk=prefill_chunk, **common)
    from megatron_cream.evaluation.models.hf_model import HfModel

    return HfModel(source.path, dtype=source.dtype, prefill_chunk=prefill_chunk, **common)


def _read_rope_type(source: Source) -> str | None:
    if source.checkpoint:
        return (source.checkpoint.shape.rope_scaling or {}).get("rope_type")
    config = read_json(source.path / "config.json", "a model's configuration that can be read")
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return scaling.get("rope_type") or scaling.get("type") if isinstance(scaling, dict) else None


@contextlib.contextmanager
def provide_hf_folder(source: Source) -> Iterator[Path]:
    """The Hugging Face folder of a model: its own, or one that a Megatron checkpoint is exported to for the while."""
    if source.checkpoint is None:
        yield source.path
        return
    with tempfile.TemporaryDirectory(prefix="megatron_cream_") as folder:
        export_hf(source.checkpoint, Path(folder) / "hf", dtype=source.dtype)
        yield Path(folder) / "hf"


def _open_own_tokenizer(checkpoint: MegatronCheckpoint, flag: str) -> ModelTokenizer:
    """That of the Hugging Face model it came from, or else what it was trained with."""
    if checkpoint.hf_folder and has_tokenizer(checkpoint.hf_folder):
        return open_tokenizer(checkpoint.hf_folder, flag=flag)
    trained_with = getattr(checkpoint.args, "tokenizer_model", None)
    if trained_with is None or not Path(trained_with).exists():
        where = f"; {trained_with}, which it was trained with, is not there" if trained_with else ""
        raise UsageError(
            f"{flag} {checkpoint.path}: has no tokenizer{where}; give --tokenizer, a Hugging Face folder or a "
            "sentencepiece .model file"
        )
    return open_tokenizer(Path(trained_with), flag=f"{flag} {checkpoint.path}: its tokenizer")


def _read_stop_ids(source: Source) -> frozenset[int]:
    """eos_token_id of generation_config.json: chat models stop at more than the tokenizer's EOS."""
    folder = source.checkpoint.hf_folder if source.checkpoint else source.path
    file = folder / GENERATION_CONFIG if folder else None
    if file is None or not file.is_file():
        return frozenset()
    try:
        ids = read_json(file, "a configuration that can be read").get("eos_token_id")
        return frozenset(() if ids is None else [ids] if isinstance(ids, int) else map(int, ids))
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise UsageError(f"{file}: cannot be read: {error}") from error


def _compute_digest(folders: list[Path]) -> str:
    """SHA-256 over names and sizes of the files of a model, and what stands at the start and the end of each."""
    files = [file for folder in folders for file in sorted(folder.iterdir()) if file.suffix not in _IGNORED_SUFFIXES]
    digest = hashlib.sha256()
    for file in (file for file in files if file.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with open(file, "rb") as stream:
            digest.update(stream.read(_SAMPLE_BYTES))
            stream.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()
