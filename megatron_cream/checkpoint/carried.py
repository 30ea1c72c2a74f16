"""What travels beside a model's weights: tokenizer, chat templates, generation config, license."""

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
# A list of what is known, and not of what is not: an adapter_config.json changes what transformers loads, a
# params.json what vLLM does, and code is never carried.
_NAMES = (
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "tekken.json",
    GENERATION_CONFIG, "chat_template.json", f"{_TEMPLATES}/*.jinja",
    "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.md", "LICENSE*", "NOTICE*",
)  # fmt: skip
_MAX_BYTES = 1 << 28
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# A key of each file by which it is known under another's name.
_MARKER_KEYS = {
    "config.json": "architectures",
    "tokenizer_config.json": "tokenizer_class",
    "tokenizer.json": "post_processor",
}
_SAMPLE = "The window of a language model, 4096 tokens."


def is_carried(name: str) -> bool:
    """Whether a file of this name, relative to its folder, travels with the weights."""
    folder = f"{_TEMPLATES}/" if name.startswith(f"{_TEMPLATES}/") else ""
    return "/" not in name.removeprefix(folder) and any(fnmatch(name, pattern) for pattern in _NAMES)


def list_files(folder: Path) -> list[str]:
    """The names, relative to `folder`, of what travels with the weights there."""
    there = [file for place in (folder, folder / _TEMPLATES) if place.is_dir() for file in place.iterdir()]
    names = {file.relative_to(folder).as_posix(): file for file in there if file.is_file()}
    return sorted(name for name, file in names.items() if is_carried(name) and file.stat().st_size < _MAX_BYTES)


def copy_files(source: Path, target: Path, *last: str) -> None:
    """Copy what travels with the weights, and then the files named `last`; each whole or not at all."""
    for name in (*list_files(source), *last):
        file = target / name
        file.parent.mkdir(exist_ok=True)
        partial = file.with_name(f".{file.name}.partial")
        shutil.copyfile(source / name, partial)
        os.replace(partial, file)


def check_files(folder: Path, *, vocabulary: int | None = None, warn: bool = True) -> None:
    """Read each file of `folder` as its readers will, and compare checksums where known.

    A file that was edited gets a warning on stderr. Nothing that a file holds is executed.

    Args:
        folder: of a Hugging Face model's tokenizer, configuration and chat template.
        vocabulary: the model's; token ids beyond it get a warning.
        warn: False where another rank warns.

    Raises:
        UsageError: a file cannot be read, or is missing; one line that names it.
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
    """Compare with the sums that a run or a conversion wrote: people may edit these files, but not lose them."""
    sums, inside = output.read_manifest(folder), ""
    if not sums and folder.name == "hf":  # imports listed it with the weights
        sums, inside = output.read_manifest(folder.parent), "hf/"
    edited = []
    for name in sorted(sums):
        own = name.removeprefix(inside)
        file = folder / own
        if not name.startswith(inside) or not (own == "config.json" or is_carried(own)) or file.suffix == ".md":
            continue
        if not file.is_file():
            raise UsageError(f"{file}: missing, and {output.MANIFEST} lists it; put it back, or take it out there")
        if output.hash_file(file) != sums[name]:
            edited.append(f"{file}: was changed after it was written (SHA-256 differs)")
    return edited


def _check_json(file: Path) -> None:
    content = read_json(file, "JSON that can be read")
    if not isinstance(content, dict):
        raise UsageError(f"{file}: must hold a JSON object")
    if file.name in (*_TOKENIZER, GENERATION_CONFIG, "special_tokens_map.json"):
        for other, mark in _MARKER_KEYS.items():
            if other != file.name and mark in content:
                raise UsageError(f"{file}: holds {mark}: it is a {other} under another name")
    for where, template in _list_templates(content.get("chat_template") if file.name != "vocab.json" else None):
        _check_template(template, f"{file}: chat_template{where}")


def _list_templates(value: Any) -> list[tuple[str, Any]]:
    """(place, template) of a tokenizer_config.json's chat_template: text, or a list of named ones."""
    if isinstance(value, list):
        return [(f"[{i}]", t.get("template") if isinstance(t, dict) else None) for i, t in enumerate(value)]
    return [] if value is None else [("", value)]


def _check_template(template: Any, where: str) -> None:
    """Compile it in a sandbox as transformers does, and do not run it."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """transformers' tag {% generation %}."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    if not isinstance(template, str):
        raise UsageError(f"{where}: must be text")
    if not template.strip():
        raise UsageError(f"{where}: an empty chat template")
    with contextlib.suppress(ValueError, RecursionError):
        json.loads(template)
        raise UsageError(f"{where}: JSON, and not a chat template")
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    try:
        environment.from_string(template)
    except Exception as error:  # jinja's, or Python's at a template nested too deep
        raise UsageError(f"{where}: not a chat template that can be read: {one_line(error, 200)}") from error


def _check_token_model(file: Path) -> None:
    """A sentencepiece model, or a list of tokens as tiktoken has it."""
    from sentencepiece import SentencePieceProcessor

    try:
        SentencePieceProcessor(model_file=str(file))
    except Exception as error:  # RuntimeError, OSError
        with open(file, "rb") as lines:
            first = lines.readline(1 << 16).split()
        if len(first) == 2 and first[1].isdigit():
            return
        raise UsageError(f"{file}: not a sentencepiece model that can be read: {one_line(error, 200)}") from error


def _check_generation(folder: Path) -> None:
    from transformers import GenerationConfig

    file = folder / GENERATION_CONFIG
    content = read_json(file, "a configuration that can be read")
    for key in _TOKEN_IDS:
        value = content.get(key)
        if not all(type(i) is int for i in (value if isinstance(value, list) else [] if value is None else [value])):
            raise UsageError(f"{file}: {key} {one_line(repr(value), 60)}: must be a token id, or a list of them")
    length = content.get("max_length")
    if length is not None and (type(length) is not int or length < 1):
        raise UsageError(f"{file}: max_length {one_line(repr(length), 60)}: must be a whole number above 0")
    try:
        with _silence_transformers():
            GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers' checks raise what they come upon
        raise UsageError(f"{file}: transformers cannot load it: {one_line(error, 200)}") from error


def _check_tokenizer(folder: Path, vocabulary: int | None) -> list[str]:
    """Load it as transformers does; returns warnings."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    present = [name for name in _TOKENIZER if (folder / name).is_file()]
    if "tokenizer.json" in present:
        from tokenizers import Tokenizer

        try:
            Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # its own kind, straight from Exception
            reason = one_line(error, 200)
            raise UsageError(f"{folder / 'tokenizer.json'}: not a tokenizer that can be read: {reason}") from error
    if not present:  # a sentencepiece model alone
        return []
    from transformers import AutoTokenizer

    try:
        with _silence_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            ids = tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"]
    except ImportError as error:  # a library that this kind of tokenizer needs
        return [f"{folder}: the tokenizer was not checked: {one_line(error, 200)}"]
    except Exception as error:  # of many kinds
        if "trust_remote_code" in str(error):  # a tokenizer that is code, which is neither run nor carried
            return [f"{folder}: the tokenizer comes with code, and was not checked"]
        reason = one_line(error, 200) or type(error).__name__
        raise UsageError(f"{folder}: transformers cannot load the tokenizer: {reason}") from error
    if set(ids) <= {tokenizer.unk_token_id}:
        raise UsageError(f"{folder}: the tokenizer has no tokens: a vocabulary file is missing or cut")
    if vocabulary is not None and (highest := max(tokenizer.get_vocab().values())) >= vocabulary:
        return [f"{folder}: the tokenizer has ids up to {highest}, the model a vocabulary of {vocabulary}"]
    return []


@contextlib.contextmanager
def _silence_transformers() -> Iterator[None]:
    """Hold back transformers' warnings: settings that it would ignore, files that it would rather have."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)
