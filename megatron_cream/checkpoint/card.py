"""The model card of an exported model: README.md, with front matter that the Hugging Face Hub reads.

It says what the checkpoint, the run's records and the data files say, and nothing that was not measured.
`evaluate.py compare` fills in the results.
"""

import contextlib
import re
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from megatron_cream import __version__
from megatron_cream.checkpoint import output
from megatron_cream.checkpoint.megatron_folder import MegatronCheckpoint
from megatron_cream.common.cli import to_flag
from megatron_cream.common.errors import UsageError
from megatron_cream.common.files import atomic_write, read_text, read_yaml
from megatron_cream.common.markdown import escape_markdown, format_row

CARD = "README.md"
BEGIN = "<!-- results: `evaluate.py compare` writes between these two lines -->"
END = "<!-- end of results -->"
_CARRIED_KEYS = ("license", "license_name", "license_link", "language")
_MOST_HASHED = 8 << 30
"""Bytes of data in all, some seconds of reading."""
_SAMPLERS = {
    "cream": "CREAM ([Wu, Zhao, Zheng, NeurIPS 2024](https://arxiv.org/abs/2406.07138))",
    "pose": "PoSE ([Zhu et al., 2023](https://arxiv.org/abs/2309.10400))",
    "randpos": "sorted random positions",
    "pi": "positions 0 to N - 1, position interpolation",
    "full": "training at the full length",
    "mix": "a mixture of samplers",
}
_DATA_FLAGS = ("data_path", "train_data_path", "short_data_path")
_DATA_LISTS = ("data_args_path", "per_split_data_args_path")
_SETTINGS = (
    "position_sampler", "position_mix", "cream_sigma", "cream_variant", "cream_relativity", "cream_middle",
    "pose_chunks", "mask_segment_starts", "short_share", "long_min_tokens", "seq_length", "target_length",
    "rope_scaling_type", "rope_scaling_factor",
    "rotary_base", "train_iters", "train_samples", "global_batch_size", "micro_batch_size", "lr", "min_lr",
    "lr_decay_style", "lr_warmup_iters", "lr_warmup_fraction", "weight_decay", "clip_grad", "adam_beta1", "adam_beta2",
    "optimizer", "seed", "split", "tensor_model_parallel_size", "pipeline_model_parallel_size",
    "context_parallel_size", "data_parallel_size",
)  # fmt: skip
"""Flags that decide what was trained; the full command line follows them."""

_LORA = ("lora_rank", "lora_alpha", "lora_rslora", "lora_dropout", "lora_targets", "lora_train", "lora_plus_ratio")
"""The same, of runs with adapters."""


def is_trained(source: MegatronCheckpoint) -> bool:
    """Whether a run of this project saved it; an import is the model that it came from, with that model's card."""
    return source.step != "release" and hasattr(source.args, "position_sampler")


def write_card(folder: Path, source: MegatronCheckpoint, name: str) -> None:
    """Write the card of an exported model; the base model's card, if it is there, keeps another name.

    Args:
        folder: of the export, with the files that came along with the base model.
        source: the checkpoint that was exported.
        name: of the model: what its folder will be called.
    """
    records, args = _read_records(source.path), source.args
    base, is_on_hub = _find_base(args, records)
    base_card, kept = folder / CARD, None
    carried = _read_front_matter(base_card)
    if base_card.is_file():
        kept = _choose_name(folder)
        base_card.rename(folder / kept)
    about = {key: carried[key] for key in _CARRIED_KEYS if _is_plain(carried.get(key))}
    if is_on_hub:
        about |= {"base_model": base, "base_model_relation": "finetune"}
    tags = ["megatron_cream", "long-context", "context-extension", args.position_sampler]
    about |= {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    front = yaml.safe_dump(about, sort_keys=False, allow_unicode=True)
    if base and not is_on_hub:
        plain = re.sub(r"[^\w.-]", " ", base)
        front += f"# base_model: OWNER/{plain}   (its name on the Hub, which this run was not given)\n"
    sections = _make_sections(source, records, base, kept, name)
    with atomic_write(folder / CARD) as file:
        file.write(f"---\n{front}---\n\n" + "\n\n".join(sections) + "\n")


def has_place_for_results(folder: Path) -> bool:
    """Whether the card in `folder` has the two lines between which results go. A link, as in a cache, has not."""
    if (folder / CARD).is_symlink():
        return False
    with contextlib.suppress(UsageError):
        text = read_text(folder / CARD, "a model card")
        return 0 <= text.find(BEGIN) < text.find(END)
    return False


def fill_in_results(folder: Path, text: str) -> None:
    """Replace what stands between the card's two lines; all else stays as it is.

    Args:
        folder: of the model; `has_place_for_results` is true.
        text: Markdown.
    """
    card = read_text(folder / CARD, "a model card")
    before, _, rest = card.partition(BEGIN)
    after = rest.partition(END)[2]
    with atomic_write(folder / CARD) as file:
        file.write(f"{before}{BEGIN}\n\n{text.strip()}\n\n{END}{after}")


def _make_sections(
    source: MegatronCheckpoint, records: list[dict[str, Any]], base: str | None, kept: str | None, name: str
) -> Iterator[str]:
    args, shape = source.args, source.shape
    window, target = args.seq_length, shape.max_position_embeddings
    yield f"# {escape_markdown(name)}"
    origin = "A model trained from random weights"
    if base or source.config:  # which comes along with a model that training started from
        origin = f"{escape_markdown(base) if base else 'A model whose name was not recorded'}, fine-tuned"
    yield (
        f"{origin} for a context window of {target:,} tokens on samples of {window:,} tokens, with "
        "megatron_cream. It loads in transformers and vLLM as it is."
    )
    if kept:
        yield f"The base model's card, with its uses, limits and license, is [{kept}]({kept})."
    scaling = shape.rope_scaling
    yield "## Window\n\n" + _format_table(
        {
            "base model": base or ("not recorded" if source.config else "none"),
            "positions": f"{target:,}",
            "RoPE scaling": _to_text(scaling) if scaling else "none",
            "RoPE theta": f"{shape.rope_theta:,.6g}",
            "architecture": shape.family.architecture,
        }
    )
    yield "## Training\n\n" + _format_table(_describe_training(source), markdown=("method",))
    yield "Flags that decide what was trained:\n\n" + _format_flags(args)
    if command := next((each["command"] for each in reversed(records) if _is_command(each.get("command"))), None):
        words = " ".join(" ".join(map(_cut_folders, command)).split())
        yield f"Command line of the last start, folders left out:\n\n```text\n{words.replace('`', ' ')}\n```"
    yield "## Data\n\n" + _describe_data(args)
    yield "## Versions\n\n" + _describe_versions(records)
    compare = "python tools/evaluate.py compare BASE EXTENDED"
    yield f"## Results\n\n{BEGIN}\n\nNot measured yet: `{compare}` fills this in.\n\n{END}"


def _describe_training(source: MegatronCheckpoint) -> dict[str, str]:
    args = source.args
    method = _SAMPLERS.get(args.position_sampler) or escape_markdown(str(args.position_sampler))
    found = {"method": method, "steps": f"{source.step:,}"}
    samples = getattr(args, "consumed_train_samples", 0) or 0
    if samples:
        found["samples"] = f"{samples:,}"
        found["tokens"] = f"{samples * args.seq_length:,}"
    precision = next((name for name in ("bf16", "fp16") if getattr(args, name, False)), "float32")
    return found | {"precision": f"{precision}{', FP8' if getattr(args, 'fp8', None) else ''}"}


def _format_flags(args: Namespace) -> str:
    names = _SETTINGS + _LORA if getattr(args, "lora_rank", 0) else _SETTINGS
    values = {name: getattr(args, name, None) for name in names}
    values = {name: value for name, value in values.items() if value is not None and value is not False}
    return _format_table({to_flag(name): _to_text(value) for name, value in values.items()})


def _describe_data(args: Namespace) -> str:
    prefixes = [word for flag in _DATA_FLAGS for word in _to_list(getattr(args, flag, None)) if not _is_number(word)]
    files = [Path(f"{prefix}{suffix}") for prefix in prefixes for suffix in (".idx", ".bin")]
    files += [Path(word) for flag in _DATA_LISTS for word in _to_list(getattr(args, flag, None))]
    if not files:
        return "The flags of the checkpoint name no data."
    lines, left = ["| file | bytes | SHA-256 |", "|---|---:|---|"], _MOST_HASHED
    for file in files:
        size, digest = "", "not there when this was written"
        with contextlib.suppress(OSError):
            count = file.stat().st_size
            size, digest = f"{count:,}", "not taken, too large"
            if count <= left:
                digest, left = f"`{output.hash_file(file)}`", left - count
        lines.append(format_row([escape_markdown(file.name), size, digest]))
    return "\n".join(lines) + "\n\nAn `.idx` file holds the lengths of all documents, its `.bin` file their tokens."


def _describe_versions(records: list[dict[str, Any]]) -> str:
    found: dict[str, Any] = {"megatron_cream": __version__}
    if records:
        last = records[-1]
        commit, machine = last.get("commit"), last.get("machine")
        if isinstance(commit, dict) and commit.get("id"):
            found["megatron_cream"] += f", commit {commit['id']}{' and changes' if commit.get('changed') else ''}"
        if isinstance(machine, dict):
            found |= {"GPU": machine.get("gpu") or "none", "ranks": machine.get("ranks")}
        if isinstance(last.get("versions"), dict):
            found |= last["versions"]
    return _format_table({name: str(value) for name, value in found.items()})


def _read_records(save: Path) -> list[dict[str, Any]]:
    """Read what each start of the run wrote into runs/, the first start first."""
    found = []
    run = save.parent if save.name == "best" else save  # the best checkpoint lies in its run's folder
    for file in sorted((run / "runs").glob("*.yaml")):
        with contextlib.suppress(UsageError):
            if isinstance(record := read_yaml(file, "a record of a run"), dict):
                found.append(record)
    return found


def _find_base(args: Namespace, records: list[dict[str, Any]]) -> tuple[str | None, bool]:
    """Return the model that the run started from, and whether that is a name on the Hub."""
    starts = [record["settings"] for record in records if isinstance(record.get("settings"), dict)]
    for settings in [*starts, vars(args)]:
        for flag in ("load_hf", "pretrained_checkpoint"):
            value = settings.get(flag)
            if isinstance(value, str) and value:
                # The hub's cache names its folders so; a folder of the user's own may look like a name on the hub.
                cached = f"models--{value.replace('/', '--')}"
                is_on_hub = flag == "load_hf" and cached in Path(str(settings.get("model_folder"))).parts
                return (value if is_on_hub else Path(value).absolute().name), is_on_hub
    record = getattr(args, "lora_base", None)  # a run with adapters clears --pretrained-checkpoint
    return (Path(record["name"]).absolute().name if record else None), False


def _read_front_matter(card: Path) -> dict[str, Any]:
    """Read the base model's own front matter; empty where there is none that can be read."""
    with contextlib.suppress(UsageError, yaml.YAMLError, ValueError, RecursionError, OverflowError):
        found = re.match(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", read_text(card, "a model card"), re.DOTALL)
        value = yaml.load(found[1], yaml.SafeLoader) if found and len(found[1]) < 1 << 16 else None
        return value if isinstance(value, dict) else {}
    return {}


def _is_plain(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return 0 < len(values) <= 100 and all(isinstance(each, str) and len(each) < 500 for each in values)


def _choose_name(folder: Path) -> str:
    names = ["README_BASE.md", *(f"README_BASE_{number}.md" for number in range(2, 1000))]
    return next(name for name in names if not (folder / name).exists())


def _is_command(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def _cut_folders(word: str) -> str:
    """Cut the folders off a path: they say where it lay on somebody's machine."""
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return f"{flag}{equals}{Path(value).name}" if value.startswith(("/", "~", "../")) else word


def _to_list(value: Any) -> list[str]:
    return [] if value is None else [str(each) for each in value] if isinstance(value, list | tuple) else [str(value)]


def _is_number(word: str) -> bool:
    with contextlib.suppress(ValueError):
        return float(word) >= 0  # a weight of --data-path
    return False


def _to_text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_to_text(item)}" for name, item in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def _format_table(values: dict[str, str], markdown: tuple[str, ...] = ()) -> str:
    """Return a table of two columns; the values of the names in `markdown` are Markdown already."""
    rows = [
        format_row([escape_markdown(name), value if name in markdown else escape_markdown(value)])
        for name, value in values.items()
    ]
    return "\n".join(["| | |", "|---|---|", *rows])
