"""Copy and check the files beside a model's weights.

These are the tokenizer, chat templates, generation config and license.
"""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from megatron_cream.checkpoint import output
from megatron_cream.common.errors import UsageError, one_line
from megatron_cream.common.files import read_json, read_text

GENERATION_CONFIG = "generation_config.json"
_TEMPLATES = "additional_chat_templates"
# An allowlist: an adapter_config.json would change what transformers loads, a params.json what vLLM loads, and
# code is never copied.
_NAMES = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "tekken.json",
    GENERATION_CONFIG,
    "chat_template.json",
    f"{_TEMPLATES}/*.jinja",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.tiktoken",
    "*.md",
    "LICENSE*",
    "NOTICE*",
)
_MAX_BYTES = 1 << 28
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# A key that only this file has, to recognise a file under the wrong name.
_MARKER_KEYS = {
    "config.json": "architectures",
    "tokenizer_config.json": "tokenizer_class",
    "tokenizer.json": "post_processor",
}
_SAMPLE = "The window of a language model, 4096 tokens."


def is_carried(name: str) -> bool:
    """Tell whether a file of this name, relative to its folder, is copied with the weights."""
    folder = f"{_TEMPLATES}/" if name.startswith(f"{_TEMPLATES}/") else ""
    return "/" not in name.removeprefix(folder) and any(fnmatch(name, pattern) for pattern in _NAMES)


def list_files(folder: Path) -> list[str]:
    """Return the relative names of the files in `folder` that are copied with the weights."""
    there = [file for place in (folder, folder / _TEMPLATES) if place.is_dir() for file in place.iterdir()]
    names = {file.relative_to(folder).as_posix(): file for file in there if file.is_file()}
    return sorted(name for name, file in names.items() if is_carried(name) and file.stat().st_size < _MAX_BYTES)


def copy_files(source: Path, target: Path, *last: str) -> None:
    """Copy the files that go with the weights, then those named `last`; each one atomically."""
    for name in (*list_files(source), *last):
        file = target / name
        file.parent.mkdir(exist_ok=True)
        partial = file.with_name(f".{file.name}.partial")
        shutil.copyfile(source / name, partial)
        os.replace(partial, file)


def check_files(folder: Path, *, vocabulary: int | None = None, warn: bool = True) -> None:
    """Check that transformers can read the files in `folder`, and compare known checksums.

    An edited file gets a warning on stderr. No content of a file is executed.

    Args:
        folder: folder of a Hugging Face model's tokenizer, configuration and chat template.
        vocabulary: vocabulary size of the model; token ids beyond it get a warning.
        warn: print warnings; False if another rank prints them.

    Raises:
        UsageError: a file is unreadable or missing; the message names it.
    """
    warnings = _find_edited(folder)
    for name in list_files(folder):
        file = folder / name
        if file.suffix == ".json":
            _check_json(file)
        elif file.suffix == ".jinja":
            _check_template(read_text(file, "a chat template"), str(file))
        elif file.suffix == ".model":
            _check_token_model(file)
    if (folder / GENERATION_CONFIG).is_file():
        _check_generation(folder)
    warnings += _check_tokenizer(folder, vocabulary)
    for warning in warnings if warn else []:
        print(f"warning: {warning}", file=sys.stderr, flush=True)


def _find_edited(folder: Path) -> list[str]:
    """Return a warning for each file that differs from the manifest of a run or a conversion.

    Users may edit these files, so a difference is no error.

    Raises:
        UsageError: a file that the manifest lists is missing.
    """
    sums, inside = output.read_manifest(folder), ""
    if not sums and folder.name == "hf":  # an import lists these files in the parent's manifest
        sums, inside = output.read_manifest(folder.parent), "hf/"
    edited = []
    for name in sorted(sums):
        own = name.removeprefix(inside)
        file = folder / own
        if not name.startswith(inside) or not (own == "config.json" or is_carried(own)) or file.suffix == ".md":
            continue
        if not file.is_file():
            raise UsageError(
                f"{file}: missing, but {output.MANIFEST} lists it. Put it back, or remove it from {output.MANIFEST}."
            )
        if output.hash_file(file) != sums[name]:
            edited.append(f"{file}: changed since it was written (SHA-256 differs)")
    return edited


def _check_json(file: Path) -> None:
    content = read_json(file, "readable JSON")
    if not isinstance(content, dict):
        raise UsageError(f"{file}: must be a JSON object")
    if file.name in (*_TOKENIZER, GENERATION_CONFIG, "special_tokens_map.json"):
        for other, mark in _MARKER_KEYS.items():
            if other != file.name and mark in content:
                raise UsageError(f"{file}: has the key {mark}: it is a {other} under the wrong name")
    for where, template in _list_templates(content.get("chat_template") if file.name != "vocab.json" else None):
        _check_template(template, f"{file}: chat_template{where}")


def _list_templates(value: Any) -> list[tuple[str, Any]]:
    """Return (place, template) for each template in a chat_template, text or a list."""
    if isinstance(value, list):
        return [(f"[{i}]", t.get("template") if isinstance(t, dict) else None) for i, t in enumerate(value)]
    return [] if value is None else [("", value)]


def _check_template(template: Any, where: str) -> None:
    """Raise UsageError unless the template compiles as in transformers; it is not rendered."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag {% generation %} of transformers."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    if not isinstance(template, str):
        raise UsageError(f"{where}: must be text")
    if not template.strip():
        raise UsageError(f"{where}: chat template is empty")
    with contextlib.suppress(ValueError, RecursionError):
        json.loads(template)
        raise UsageError(f"{where}: is JSON, not a chat template")
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    try:
        environment.from_string(template)
    except Exception as error:  # from jinja, or a RecursionError for deeply nested templates
        raise UsageError(f"{where}: not a readable chat template: {one_line(error, 200)}") from error


def _check_token_model(file: Path) -> None:
    """Raise UsageError unless the file is a sentencepiece model or a tiktoken vocabulary."""
    from sentencepiece import SentencePieceProcessor

    try:
        SentencePieceProcessor(model_file=str(file))
    except Exception as error:  # RuntimeError, OSError
        with open(file, "rb") as lines:
            first = lines.readline(1 << 16).split()
        if len(first) == 2 and first[1].isdigit():
            return
        raise UsageError(f"{file}: not a readable sentencepiece model: {one_line(error, 200)}") from error


def _check_generation(folder: Path) -> None:
    """Raise UsageError unless transformers can load the generation config."""
    from transformers import GenerationConfig

    file = folder / GENERATION_CONFIG
    content = read_json(file, "a readable configuration")
    for key in _TOKEN_IDS:
        value = content.get(key)
        if not all(type(i) is int for i in (value if isinstance(value, list) else [] if value is None else [value])):
            raise UsageError(f"{file}: {key} {one_line(repr(value), 60)}: must be a token id or a list of token ids")
    length = content.get("max_length")
    if length is not None and (type(length) is not int or length < 1):
        raise UsageError(f"{file}: max_length {one_line(repr(length), 60)}: must be a whole number above 0")
    try:
        with _silence_transformers():
            GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises exceptions of many types
        raise UsageError(f"{file}: transformers cannot load it: {one_line(error, 200)}") from error


def _check_tokenizer(folder: Path, vocabulary: int | None) -> list[str]:
    """Load the tokenizer with transformers, and return warnings.

    Raises:
        UsageError: the tokenizer cannot be loaded, or has no tokens.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    present = [name for name in _TOKENIZER if (folder / name).is_file()]
    if "tokenizer.json" in present:
        from tokenizers import Tokenizer

        try:
            Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises bare Exception
            reason = one_line(error, 200)
            raise UsageError(f"{folder / 'tokenizer.json'}: not a readable tokenizer: {reason}") from error
    if not present:  # at most a sentencepiece model, which was checked already
        return []
    from transformers import AutoTokenizer

    try:
        with _silence_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            ids = tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"]
    except ImportError as error:  # this type of tokenizer needs a library that is not installed
        return [f"{folder}: the tokenizer was not checked: {one_line(error, 200)}"]
    except Exception as error:  # transformers raises exceptions of many types
        if "trust_remote_code" in str(error):  # custom code is neither run nor copied
            return [f"{folder}: the tokenizer needs custom code and was not checked"]
        reason = one_line(error, 200) or type(error).__name__
        raise UsageError(f"{folder}: transformers cannot load the tokenizer: {reason}") from error
    if set(ids) <= {tokenizer.unk_token_id}:
        raise UsageError(f"{folder}: the tokenizer has no tokens: a vocabulary file is missing or truncated")
    if vocabulary is not None and (highest := max(tokenizer.get_vocab().values())) >= vocabulary:
        return [f"{folder}: the tokenizer has token ids up to {highest}, but the model's vocabulary is {vocabulary}"]
    return []


@contextlib.contextmanager
def _silence_transformers() -> Iterator[None]:
    """Silence transformers' warnings about ignored settings and missing optional files."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)
