"""Tests of the search for input: each file of a folder is read once or counted as left out."""

from pathlib import Path

import pytest

from megatron_cream.data.input_files import LeftOut, find_files
from megatron_cream.data.preprocess import preprocess
from tests.data.test_preprocess import ByteTokenizer, read_back, write_input, write_lines


def write(path: Path, text: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def names(folder: Path, glob: str | None = None, left_out: LeftOut | None = None) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in find_files([folder], glob, left_out=left_out)]


HIDDEN = [".a.txt", "._a.txt", ".git/a.txt", "b/.ipynb_checkpoints/a-checkpoint.txt", "b/__MACOSX/._a.txt"]


@pytest.mark.parametrize("glob", [None, "*", "*.txt", "**/*.txt"])
def test_hidden_files_are_not_data(tmp_path, glob):
    for name in ["a.txt", "b/a.txt", *HIDDEN]:
        write(tmp_path / ".folder" / name)  # the folder that is named may be hidden itself
    left_out = LeftOut()
    assert names(tmp_path / ".folder", glob, left_out) == ["a.txt", "b/a.txt"]
    assert left_out.counts == {"hidden files and folders": 5}
    assert left_out.first["hidden files and folders"] == f"{tmp_path}/.folder/._a.txt"


def test_a_glob_that_names_a_hidden_file_finds_it(tmp_path):
    for name in ["a.txt", *HIDDEN]:
        write(tmp_path / name)
    assert names(tmp_path, ".git/*") == [".git/a.txt"]
    assert names(tmp_path, "._*") == ["._a.txt", "b/__MACOSX/._a.txt"]


@pytest.mark.parametrize("glob", [None, "*.txt"])
def test_symlinked_folders_are_read_once(tmp_path, glob):
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    for place in (folder / "a" / "1.txt", elsewhere / "b" / "2.txt", folder / "z" / "3.txt"):
        write(place)
    (folder / "a" / "loop").symlink_to(folder)
    (folder / "again").symlink_to(folder / "z")
    (folder / "linked").symlink_to(elsewhere)
    (elsewhere / "b" / "loop").symlink_to(elsewhere)
    left_out = LeftOut()
    assert names(folder, glob, left_out) == ["a/1.txt", "linked/b/2.txt", "z/3.txt"]
    assert left_out.counts == {"links to folders that are read already": 3}


def test_files_that_are_passed_over_are_counted_by_kind(tmp_path):
    folder = tmp_path / "folder"
    read = write_upper_case(folder)
    for name in ["a.md", "b/B.MD", "c.json", "d.csv.gz", "README"]:
        write(folder / name)
    (folder / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    report = preprocess([folder], folder / "out", ByteTokenizer(), progress=False)
    assert report.documents == len(read) == len(read_back(folder / "out"))
    kinds = {".md files": 2, ".json files": 1, ".csv.gz files": 1, "files without a suffix": 1, "broken links": 1}
    assert report.left_out.counts == kinds
    assert report.left_out.first[".md files"] == f"{folder}/a.md"
    again = preprocess([folder], folder / "out", ByteTokenizer(), progress=False, overwrite=True)
    assert again.left_out.counts == kinds, "the output itself is not counted"


def write_upper_case(folder: Path) -> list[Path]:
    """Write one document in files of each format, with suffixes in upper case."""
    folder.mkdir()
    files = [write_input(folder / name, ["text"]) for name in ("a.jsonl", "c.parquet", "d.jsonl.gz", "e.ndjson.zst")]
    return [file.rename(file.with_name(file.name.upper())) for file in [*files, write(folder / "b.txt")]]


def test_a_folder_without_data_says_what_it_has(tmp_path):
    write(tmp_path / "a.csv")
    write_lines(tmp_path / ".b.jsonl", ["text"])
    with pytest.raises(
        ValueError, match=r"name others with --glob\. Left out: 1 hidden files and folders, 1 \.csv files$"
    ):
        find_files([tmp_path])
