"""Opens the model to evaluate: a folder becomes a LanguageModel, with one interface for every engine."""

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
from megatron_cream.checkpoint.adapter_checkpoint import open_checkpoint
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
from megatron_cream.evaluation.models.vllm_model import VllmModel, VllmSettings, import_vllm
from megatron_cream.evaluation.ranks import Ranks
from megatron_cream.model.rotary import LENGTH_DEPENDENT_TYPES
from megatron_cream.patches import platform

ENGINES = ("auto", "megatron", "vllm")
"""auto: Megatron-Core for a Megatron checkpoint, and for a model that several GPUs share; else transformers."""

_SAMPLE_BYTES = 1 << 20
_IGNORED_SUFFIXES = (".md", ".py", ".png", ".lock")  # files that do not belong to the model


class LanguageModel(Protocol):
    """The interface through which an evaluation uses a model."""

    tokenizer: ModelTokenizer
    max_positions: int
    """Positions in the model's configuration; longer inputs run, but the quality may drop."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float,
        top_p: float,
        seeds: Sequence[int],
    ) -> list[list[int]]:
        """Return the new tokens of each prompt; arguments as in `generation.generate`."""

    def log_probs(self, tokens: Tensor, start: int) -> Tensor:
        """Return the natural log-probabilities of tokens[:, start:], given all before each.

        Args:
            tokens: int64 [b, s], without padding.
            start: index of the first scored token, 1 or more.

        Returns: float32 [b, s - start], on the CPU.
        """

    def weights(self) -> Iterable[tuple[str, Tensor]]:
        """Return the parameters with their names; empty if the engine does not expose them."""


@dataclass(frozen=True)
class Source:
    """A model before it is loaded.

    path: the model's folder.
    checkpoint: the checkpoint in `path` if it is a Megatron checkpoint, else None.
    tokenizer: the model's tokenizer, or the one that the user gave instead.
    engine: transformers, megatron or vllm.
    dtype: dtype in which the model runs.
    flag: flag of `path`, for messages.
    kv_cache_dtype: one of KV_CACHE_DTYPES.
    """

    path: Path
    checkpoint: MegatronCheckpoint | None
    tokenizer: ModelTokenizer
    engine: str
    dtype: torch.dtype
    flag: str = "--model"
    kv_cache_dtype: str = "auto"

    @property
    def max_positions(self) -> int:
        """Positions in the model's configuration; 2**40 if it names none."""
        if self.checkpoint:
            return self.checkpoint.shape.max_position_embeddings
        file = self.path / "config.json"
        config = read_json(file, "a model configuration in JSON")
        with contextlib.suppress(UsageError):  # another family, which only transformers knows
            return shape_from_config(config, file).window
        positions = config.get("max_position_embeddings")
        if positions is not None and (type(positions) is not int or positions < 1):
            raise UsageError(f"{file}: max_position_embeddings {positions!r}: must be a whole number above 0")
        return positions or 1 << 40

    @property
    def vocab_size(self) -> int | None:
        """Number of token ids that the model accepts, or None if its configuration does not say."""
        if self.checkpoint:
            return self.checkpoint.shape.vocab_size
        size = read_json(self.path / "config.json", "a model configuration in JSON").get("vocab_size")
        return size if type(size) is int else None

    def identity(self) -> dict[str, Any]:
        """Return what identifies the model's weights and engine, whatever its path."""
        folders = [self.checkpoint.folder, self.checkpoint.hf_folder] if self.checkpoint else [self.path]
        return {
            "format": "megatron" if self.checkpoint else "huggingface",
            "step": self.checkpoint.step if self.checkpoint else None,
            "digest": compute_digest([folder for folder in folders if folder]),
            "engine": self.engine,
            "dtype": str(self.dtype).removeprefix("torch."),
            **({"kv_cache_dtype": self.kv_cache_dtype} if self.kv_cache_dtype != "auto" else {}),
        }


def find_model(
    path: str,
    *,
    step: int | None = None,
    tokenizer: Path | None = None,
    engine: str = "auto",
    dtype: str | None = None,
    flag: str = "--model",
    split: bool = False,
    kv_cache_dtype: str = "auto",
) -> Source:
    """Find the kind of a model folder, and read its configuration and tokenizer.

    Args:
        path: a Hugging Face folder or a name on its Hub, or a folder that `--save` or an import wrote.
        step: step of a Megatron checkpoint; None takes the newest.
        tokenizer: path of a tokenizer that replaces the model's own.
        engine: one of ENGINES.
        dtype: one of convert.DTYPES; None is bfloat16 on a GPU and float32 on a CPU.
        flag: flag of `path`, for messages.
        split: whether several GPUs share the model.
        kv_cache_dtype: one of KV_CACHE_DTYPES.

    Raises:
        UsageError: the folder is of neither kind, is damaged or has no tokenizer, or `engine` is vllm and vLLM is not
            installed, or is megatron and this project does not know the model's family.
    """
    if engine == "vllm":
        import_vllm()
    torch_dtype = DTYPES[dtype] if dtype else torch.bfloat16 if devices.has_cuda() else torch.float32
    last = (torch_dtype, flag, kv_cache_dtype)
    folder = Path(path)
    if (folder / TRACKER).is_file():
        checkpoint = open_checkpoint(folder, step, flag=flag)
        output.check_unchanged(checkpoint.folder)
        opened = open_tokenizer(tokenizer, flag="--tokenizer") if tokenizer else _open_own_tokenizer(checkpoint, flag)
        return Source(folder, checkpoint, opened, "vllm" if engine == "vllm" else "megatron", *last)
    if step is not None:
        raise UsageError(f"--ckpt-step {step}: only with a Megatron checkpoint, but {flag} {path} is not one")
    folder = locate(path, flag=flag)
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"{flag} {path}: neither a Hugging Face folder (it has no config.json) nor a Megatron checkpoint "
            f"(it has no {TRACKER})"
        )
    hf_folder.check_model(folder)
    output.check_unchanged(folder)
    if engine == "auto":
        engine = "megatron" if split else "transformers"
    if engine == "megatron":
        hf_folder.HfFolder(folder)  # raises
    given = (tokenizer, "--tokenizer") if tokenizer else (folder, flag)
    opened = open_tokenizer(given[0], flag=given[1])
    return Source(folder, None, opened, engine, *last)


def load(
    source: Source,
    *,
    prefill_chunk: int,
    vllm: VllmSettings | None = None,
    ranks: Ranks | None = None,
    cuda_graphs: bool = True,
) -> LanguageModel:
    """Load the model, on the GPU if there is one.

    The loaded model raises UsageError if its logits are not finite.

    Args:
        source: the model, as `find_model` found it.
        prefill_chunk: tokens of a prompt that are read at once; a larger chunk takes more memory and does not
            change results.
        vllm: settings of the engine vllm; None is their default.
        ranks: this process's place among the ranks; None is a single rank.
        cuda_graphs: generate by CUDA graphs where the engine megatron can.

    Raises:
        UsageError: the weights cannot be read.
    """
    return _CheckedModel(_load(source, prefill_chunk, vllm or VllmSettings(), ranks or Ranks(), cuda_graphs), source)


def non_finite_error(source: Source, weights: Iterable[tuple[str, Tensor]]) -> UsageError:
    """Return the error for NaN or infinite logits; it names the first bad weight."""
    bad = next((name for name, weight in weights if not weight.isfinite().all()), None)
    if bad:
        return UsageError(
            f"{source.flag} {source.path}: {bad} holds NaN or infinite numbers, and so do the logits. Train, export or "
            "download the model again."
        )
    return UsageError(
        f"{source.flag} {source.path}: its logits are NaN or infinite in {str(source.dtype).removeprefix('torch.')}. "
        "Try --dtype fp32. If they still are, train, export or download the model again."
    )


class _CheckedModel:
    """A LanguageModel that rejects token ids outside its vocabulary, and raises UsageError at non-finite logits."""

    def __init__(self, model: LanguageModel, source: Source):
        self._model, self._source = model, source
        self.tokenizer, self.max_positions = model.tokenizer, model.max_positions
        self._vocab_size = source.vocab_size
        # vLLM chooses one set of frequencies for all prompts; elsewhere a batch has those of its longest text.
        self._one_by_one = source.engine != "vllm" and read_rope_type(source) in LENGTH_DEPENDENT_TYPES

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, **sampling) -> list[list[int]]:
        self._check_ids(max(map(max, filter(None, prompts)), default=0))
        try:
            if not self._one_by_one:
                return self._model.generate(prompts, max_new_tokens, **sampling)
            answers = []
            for prompt, seed in zip(prompts, sampling["seeds"], strict=True):
                answers += self._model.generate([prompt], max_new_tokens, **sampling | {"seeds": [seed]})
            return answers
        except NonFiniteLogits:
            raise non_finite_error(self._source, self._model.weights()) from None

    def log_probs(self, tokens: Tensor, start: int) -> Tensor:
        self._check_ids(int(tokens.max()))
        found = self._model.log_probs(tokens, start)
        if not found.isfinite().all():
            raise non_finite_error(self._source, self._model.weights())
        return found

    def _check_ids(self, largest: int) -> None:
        """Raise UsageError for an id without embedding, before it is a CUDA assertion."""
        if self._vocab_size is not None and largest >= self._vocab_size:
            raise UsageError(
                f"{self._source.flag} {self._source.path}: the tokenizer gives token id {largest}, but the model has "
                f"{self._vocab_size} ids. Give the model's own tokenizer with --tokenizer."
            )


def _load(source: Source, prefill_chunk: int, vllm: VllmSettings, ranks: Ranks, cuda_graphs: bool) -> LanguageModel:
    stop_ids = source.tokenizer.stop_ids | _read_stop_ids(source)
    common = dict(tokenizer=source.tokenizer, stop_ids=stop_ids, max_positions=source.max_positions)
    if source.engine == "vllm":
        with provide_hf_folder(source) as folder:
            return VllmModel(folder, dtype=source.dtype, prefill_chunk=prefill_chunk, settings=vllm, **common)
    common["kv_cache_dtype"] = source.kv_cache_dtype  # vLLM's is in its settings
    if read_rope_type(source) in LENGTH_DEPENDENT_TYPES:
        prefill_chunk = 1 << 40  # one chunk: the frequencies of all tokens depend on the longest position
    if source.engine == "megatron":
        platform.setup()  # before anything of Megatron is imported
        from megatron_cream.checkpoint.base_weights import open_folder
        from megatron_cream.checkpoint.model import Group
        from megatron_cream.evaluation.models.megatron_model import MegatronModel

        weights = source.checkpoint or open_folder(source.path)
        group = Group(ranks.replica_store, ranks.rank % ranks.replica_size, ranks.tensor, ranks.context)
        options = dict(dtype=source.dtype, prefill_chunk=prefill_chunk, cuda_graphs=cuda_graphs, group=group)
        return MegatronModel(weights, **options, **common)
    from megatron_cream.evaluation.models.hf_model import HfModel

    return HfModel(source.path, dtype=source.dtype, prefill_chunk=prefill_chunk, **common)


def read_rope_type(source: Source) -> str | None:
    """Return the `rope_type` in the model's configuration, or None if it has none."""
    if source.checkpoint:
        return (source.checkpoint.shape.rope_scaling or {}).get("rope_type")
    config = read_json(source.path / "config.json", "a model configuration in JSON")
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return scaling.get("rope_type") or scaling.get("type") if isinstance(scaling, dict) else None


@contextlib.contextmanager
def provide_hf_folder(source: Source) -> Iterator[Path]:
    """Yield the model's Hugging Face folder; export a Megatron checkpoint to a temporary one."""
    if source.checkpoint is None:
        yield source.path
        return
    with tempfile.TemporaryDirectory(prefix="megatron_cream_") as folder:
        export_hf(source.checkpoint, Path(folder) / "hf", dtype=source.dtype)
        yield Path(folder) / "hf"


def _open_own_tokenizer(checkpoint: MegatronCheckpoint, flag: str) -> ModelTokenizer:
    """Open the tokenizer in the checkpoint, or else the one that it was trained with."""
    if checkpoint.hf_folder and has_tokenizer(checkpoint.hf_folder):
        return open_tokenizer(checkpoint.hf_folder, flag=flag)
    trained_with = getattr(checkpoint.args, "tokenizer_model", None)
    if trained_with is None or not Path(trained_with).exists():
        where = f", and its training's {trained_with} does not exist" if trained_with else ""
        raise UsageError(
            f"{flag} {checkpoint.path}: has no tokenizer{where}. Give --tokenizer, a Hugging Face folder or a "
            "sentencepiece .model file."
        )
    return open_tokenizer(Path(trained_with), flag=f"{flag} {checkpoint.path}: its tokenizer")


def _read_stop_ids(source: Source) -> frozenset[int]:
    """Return the eos_token_id values of generation_config.json.

    Chat models stop at more tokens than the tokenizer's EOS.
    """
    folder = source.checkpoint.hf_folder if source.checkpoint else source.path
    file = folder / GENERATION_CONFIG if folder else None
    if file is None or not file.is_file():
        return frozenset()
    try:
        ids = read_json(file, "a configuration in JSON").get("eos_token_id")
        return frozenset(() if ids is None else [ids] if isinstance(ids, int) else map(int, ids))
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise UsageError(f"{file}: cannot be read: {error}") from error


def compute_digest(folders: list[Path]) -> str:
    """Return a SHA-256 of the names, sizes, and first and last MiB of a model's files."""
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
