"""Find the files to read in input folders, and record what is left out.

A folder is read with all its subfolders and symlinked folders; each real folder is read once, so
links may form loops. A .zip archive is read like a folder. Hidden files and folders (`.git`,
`.ipynb_checkpoints`, `._*`) and `__MACOSX` are not data.
"""

import argparse
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from megatron_cream.common.cli import path as parse_path
from megatron_cream.common.errors import reason
from megatron_cream.data.archives import ARCHIVE_SUFFIX, ZipMember, is_link, list_members
from megatron_cream.data.columns import COLUMN_SUFFIXES, find_dataset_files
from megatron_cream.data.compressed import COMPRESSED_SUFFIXES, suffix
from megatron_cream.data.hub import HUB_PREFIX, HubDataset, parse_hub_dataset
from megatron_cream.data.indexed import loss_mask_prefix, paths

JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".json")
"""Files with one JSON object per line. Megatron's own recipes use `.json` for them too; a `.json`
file with one array is read element by element."""

TEXT_SUFFIXES = (".txt", ".text")
"""Files read as one document each; with a glob, so is any file with another suffix."""

CSV_SUFFIX = ".csv"

FOLDER_SUFFIXES = frozenset((*JSON_LINES_SUFFIXES, *TEXT_SUFFIXES, ".parquet")) - {".json"}
"""Files that are read in a folder without a glob. A `.json` or `.csv` file often is not data, and a `.zip` may hold the
same files again."""

Source = Path | ZipMember | HubDataset
"""What documents are read from."""


@dataclass
class LeftOut:
    """What the search passes over."""

    counts: dict[str, int] = field(default_factory=dict)
    """Kind, such as `.md files` -> how many."""

    first: dict[str, str] = field(default_factory=dict)
    """Kind -> the first one."""

    def add(self, kind: str, place: object, count: int = 1) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + count
        self.first.setdefault(kind, str(place))

    def __str__(self) -> str:
        return ", ".join(f"{count:,} {kind}" for kind, count in self.counts.items())


def find_files(
    inputs: Iterable[Path | HubDataset],
    glob: str | None = None,
    output: Path | None = None,
    left_out: LeftOut | None = None,
) -> list[Source]:
    """Return the files of `inputs` in reading order: files as named, folders and archives recursively.

    Args:
        inputs: files, folders and datasets on the Hub.
        glob: pattern of the files to read in a folder. None: files with a suffix of FOLDER_SUFFIXES;
            in a folder that `datasets` saved, its data files.
        output: prefix of the output, which is skipped if it lies in an input folder.
        left_out: receives what is passed over in folders. Files that `glob` does not match do not count.

    Raises:
        ValueError: an input does not exist or cannot be read, a folder has no matching file, or a
            file's format is unknown. The message is one line with the path.
    """
    files: list[Source] = []
    left_out = LeftOut() if left_out is None else left_out
    for path in inputs:
        if isinstance(path, HubDataset):
            files.append(path)
            continue
        try:
            files += _files_of(Path(path), glob, output, left_out)
        except OSError as error:
            raise ValueError(reason(error, path)) from error
    return files


def parse_input(text: str) -> Path | HubDataset:
    """Parse a file, a folder or `hub.HUB_FORM`; a type for `add_argument`."""
    if not text.startswith(HUB_PREFIX):
        return parse_path(text)
    try:
        return parse_hub_dataset(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def disk_size(source: Source) -> int:
    """Return the bytes of a file on disk, or of an archive's member when unpacked; 0 for a dataset on the Hub."""
    if isinstance(source, HubDataset):
        return 0
    return source.stat().st_size if isinstance(source, Path) else source.size


def identify(source: Source) -> tuple[Any, ...]:
    """Return values that change if the content does: path, size and modification time."""
    if isinstance(source, ZipMember):
        return (*identify(source.archive), source.name)
    if isinstance(source, HubDataset):
        return (str(source),)
    return str(source.absolute()), source.stat().st_size, source.stat().st_mtime_ns


def kind_of(path: Source) -> Literal["lines", "columns", "csv", "text", "hub"] | None:
    """Return how a file is read, by its suffix; None if the suffix is unknown."""
    if isinstance(path, HubDataset):
        return "hub"
    if path.suffix.lower() in COLUMN_SUFFIXES:
        return "columns"
    if suffix(path) in JSON_LINES_SUFFIXES:
        return "lines"
    if suffix(path) == CSV_SUFFIX:
        return "csv"
    return "text" if suffix(path) in TEXT_SUFFIXES else None


def _files_of(path: Path, glob: str | None, output: Path | None, left_out: LeftOut) -> list[Source]:
    if path.is_dir():
        return _files_in(path, glob, output, left_out)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if not path.is_file():
        raise ValueError(f"{path}: not a file or a folder")  # a pipe can be read only once, and may never end
    if path.suffix.lower() == ARCHIVE_SUFFIX:
        return _members_of(path, glob, left_out)
    if kind_of(path) is None:
        known = ", ".join((*JSON_LINES_SUFFIXES, CSV_SUFFIX, *TEXT_SUFFIXES, *COLUMN_SUFFIXES, ARCHIVE_SUFFIX))
        packed = ", ".join(COMPRESSED_SUFFIXES)
        raise ValueError(f"{path}: expected a file that ends in {known} (text also in {packed}), or a folder")
    return [path]


def _files_in(folder: Path, glob: str | None, output: Path | None, left_out: LeftOut) -> list[Source]:
    if glob is None and (files := find_dataset_files(folder)) is not None:
        return [*files]
    here = LeftOut()
    found = _match(folder, glob, output, here) if glob is not None else _select(folder, output, here)
    _report(folder, "folder", glob, found, here, left_out)
    files = []
    for file in sorted(found):
        files += _members_of(file, None, left_out) if file.suffix.lower() == ARCHIVE_SUFFIX else [file]
    return files


def _members_of(archive: Path, glob: str | None, left_out: LeftOut) -> list[Source]:
    """Return the members of an archive by the rules of folders."""
    here, found = LeftOut(), []
    with_hidden = glob is not None and _names_hidden(glob)
    for info in list_members(archive):
        member, name = ZipMember(archive, info.filename, info.file_size), PurePosixPath(info.filename)
        if not with_hidden and any(map(_is_hidden, name.parts)):
            here.add("hidden files and folders", member)
        elif glob is not None and not name.match(glob):
            continue
        elif is_link(info):
            here.add("links in archives", member)
        elif kind_of(member) == "columns" or member.suffix.lower() == ARCHIVE_SUFFIX:  # needs random access
            here.add(f"{member.suffix.lower()} files in archives", member)
        elif glob is not None or (suffix(member) in FOLDER_SUFFIXES and kind_of(member)):
            found.append(member)
        else:
            here.add(f"{_full_suffix(member)} in archives", member)
    _report(archive, "archive", glob, found, here, left_out)
    return found


def _report(place: Path, kind: str, glob: str | None, found: list, here: LeftOut, left_out: LeftOut) -> None:
    """Add `here`, what is left out of a folder or archive, to `left_out`; raise ValueError if nothing was found."""
    for what, count in here.counts.items():
        left_out.add(what, here.first[what], count)
    if found:
        return
    rest = f". Left out: {here}" if here.counts else ""
    if glob is not None:
        raise ValueError(f"{place}: no file in this {kind} matches {glob!r}; give another --glob{rest}")
    suffixes = ", ".join(sorted(FOLDER_SUFFIXES))
    raise ValueError(f"{place}: no {suffixes} file in this {kind}; name others with --glob{rest}")


def _full_suffix(path: Path | ZipMember) -> str:
    name = path.suffix.lower()
    name = suffix(path) + name if name in COMPRESSED_SUFFIXES else name
    return f"{name} files" if name else "files without a suffix"


def _select(folder: Path, output: Path | None, left_out: LeftOut) -> list[Path]:
    """Return the files of `folder` whose suffix is known."""
    found = []
    for _, file in _walk(folder, False, left_out):
        if not file.is_file():
            left_out.add("broken links" if file.is_symlink() else "special files", file)
        elif suffix(file) in FOLDER_SUFFIXES and kind_of(file):
            found.append(file)
        elif not _is_output_file(output, file):
            left_out.add(_full_suffix(file), file)
    return found


def _match(folder: Path, glob: str, output: Path | None, left_out: LeftOut) -> list[Path]:
    """Return the files of `folder` that `glob` matches."""
    tops = {folder: set[Path]()}
    for top, file in _walk(folder, _names_hidden(glob), left_out):
        tops.setdefault(top, set()).add(file)
    try:
        # rglob enters no symlinked folders.
        matching = [file for top, files in tops.items() for file in set(top.rglob(glob)) & files]
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"--glob {glob!r}: expected a pattern such as '*.txt' ({error})") from error
    return [file for file in matching if file.is_file() and not _is_output_file(output, file)]


def _walk(folder: Path, with_hidden: bool, left_out: LeftOut) -> Iterator[tuple[Path, Path]]:
    """Yield (top, file) of the files below `folder`; top is `folder` or the last symlinked folder on the way.

    A symlinked folder comes after all that is reached without it.
    """
    seen: set[tuple[int, int]] = set()
    tops = [folder]
    while tops:
        links: list[Path] = []
        for top in tops:
            # rglob would silently skip unreadable folders.
            for place, subfolders, names in os.walk(top, onerror=_raise):
                status = os.stat(place)
                if (status.st_dev, status.st_ino) in seen:
                    left_out.add("links to folders that are read already", place)
                    subfolders.clear()
                    continue
                seen.add((status.st_dev, status.st_ino))
                if not with_hidden:
                    for name in sorted(filter(_is_hidden, subfolders + names)):
                        left_out.add("hidden files and folders", Path(place, name))
                    subfolders[:] = [name for name in subfolders if not _is_hidden(name)]
                links += (link for name in subfolders if (link := Path(place, name)).is_symlink())
                yield from ((top, Path(place, name)) for name in sorted(names) if with_hidden or not _is_hidden(name))
        tops = sorted(links)


def _is_hidden(name: str) -> bool:
    return (name.startswith(".") and name not in (".", "..")) or name == "__MACOSX"


def _names_hidden(glob: str) -> bool:
    return any(map(_is_hidden, PurePosixPath(glob).parts))


def _raise(error: OSError) -> None:
    raise error


def _is_output_file(output: Path | None, file: Path) -> bool:
    """Return whether a run that writes to the prefix `output` writes `file`."""
    if output is None:
        return False
    place = file.parent if file.parent.name == f"{output.name}.partial" else file
    names = {path.name for path in (*paths(output), *paths(loss_mask_prefix(output)))}
    return (place is not file or file.name in names) and place.parent.resolve() == output.parent.resolve()
