"""Stream the rows of a dataset on the Hugging Face Hub with the package `datasets`."""

import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_cream.common.errors import one_line
from megatron_cream.data import columns, compressed

HUB_PREFIX = "hf://"

HUB_FORM = "hf://datasets/OWNER/NAME[@REVISION][:CONFIG[:SPLIT]]"

_FORM = re.compile(
    r"hf://datasets/(?P<name>([\w.-]+/)?[\w.-]+)(@(?P<revision>[^:@]+))?(:(?P<config>[^:]*))?(:(?P<split>[^:]+))?"
)


@dataclass(frozen=True)
class HubDataset:
    """One split of a dataset on the Hub."""

    name: str
    revision: str | None = None
    config: str | None = None
    split: str = "train"

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf://datasets/{self.name}{revision}:{self.config or ''}:{self.split}"


def parse_hub_dataset(text: str) -> HubDataset:
    """Parse HUB_FORM.

    Raises:
        ValueError: another form. The message is one line with the text.
    """
    match = _FORM.fullmatch(text)
    if match is None:
        raise ValueError(f"{text}: expected {HUB_FORM}")
    return HubDataset(match["name"], match["revision"], match["config"] or None, match["split"] or "train")


def check_datasets_package(dataset: HubDataset) -> None:
    """Raise ValueError, with one line, if the package `datasets` is not installed."""
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(f"{dataset}: reading it needs a package that is not installed: pip install datasets")


def read_hub_rows(
    dataset: HubDataset, keys: tuple[str, ...], chats: bool, first: int
) -> Iterator[tuple[int, bytes | str | None]]:
    """Yield (number, content) of each row after the first `first` ones; the number counts from 1.

    The content is a text in UTF-8 or, for a chat, a JSON object; None for null. It is a str, the
    reason, where a row cannot be read.

    Raises:
        ValueError: no column, or several, of these names. The message is one line with the dataset.
        ConnectionError: the dataset cannot be read, now or at all; so an unfinished run is kept.
    """
    number, key = first, ""
    try:
        for number, row in enumerate(_open(dataset, first), first + 1):
            key = key or _find_key(dataset, row, keys)
            yield number, _content(row, key, chats)
    except _WrongColumns:
        raise
    except Exception as error:  # of datasets, of its file systems and readers
        place = f"after row {number}" if number else "at the start"
        raise ConnectionError(
            f"{dataset}: cannot be read {place} ({one_line(error) or type(error).__name__})"
        ) from error


class _WrongColumns(ValueError):
    pass


def _open(dataset: HubDataset, first: int) -> Any:
    import datasets

    rows = datasets.load_dataset(
        dataset.name, dataset.config, split=dataset.split, revision=dataset.revision, streaming=True
    )
    return rows.skip(first) if first else rows


def _find_key(dataset: HubDataset, row: dict, keys: tuple[str, ...]) -> str:
    try:
        return columns.choose_column(dataset, [*map(str, row)], keys)
    except ValueError as error:
        raise _WrongColumns(str(error)) from None


def _content(row: dict, key: str, chats: bool) -> bytes | str | None:
    if chats:
        return json.dumps({name: row.get(name) for name in (key, *columns.CHAT_EXTRAS)}, default=str).encode()
    text = row.get(key)
    if text is None:
        return None
    if not isinstance(text, str):
        return f"key {key!r} is not a string"
    data = text.encode("utf-8", "surrogatepass")  # lone surrogates are reported later as not UTF-8
    limit = compressed.LONGEST_LINE
    return data if len(data) <= limit else f"text larger than {limit >> 20} MiB"
