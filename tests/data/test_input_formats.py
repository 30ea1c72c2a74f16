"""Tests of .csv and .zip input, and of damaged compressed files: all is read, or one line says what is not."""

import bz2
import lzma
import zipfile
from pathlib import Path

import pytest

from megatron_cream.data import compressed
from megatron_cream.data.input_files import LeftOut, find_files
from megatron_cream.data.preprocess import PreprocessReport, preprocess
from tests.data.test_preprocess import ByteTokenizer, read_back, write_input


def texts_of(path: Path, **options: object) -> tuple[list[bytes], PreprocessReport]:
    """Preprocess `path`; return the documents and the report."""
    report = preprocess([path], path.parent / "x", ByteTokenizer(), progress=False, overwrite=True, **options)
    return [bytes(ids[1:-1]) for ids in read_back(path.parent / "x")], report


GOOD = {
    "lines": (b"text,id\r\none,1\r\ntwo,2\r\n", [b"one", b"two"]),
    "BOM and no newline at the end": (b"\xef\xbb\xbftext\none", [b"one"]),
    "quotes": (b'id,text\n1,"a ""b"",\n\nc"\n\n2,"d"\n', [b'a "b",\n\nc', b"d"]),
    "one column": (b"text\n a \nb", [b" a ", b"b"]),
}


@pytest.mark.parametrize("name", GOOD)
def test_csv_rows_are_documents(tmp_path, name):
    data, texts = GOOD[name]
    (tmp_path / "A.CSV").write_bytes(data)
    assert texts_of(tmp_path / "A.CSV")[0] == texts


def test_csv_rows_that_cannot_be_read_are_counted(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"id,text\n1,good\n2,un,quoted\n3,\n4,\xff\n5\n6,fine\n")
    texts, report = texts_of(path)
    assert texts == [b"good", b"fine"]
    assert report.dropped == {
        "row with another number of fields than the header": 2,
        "empty text": 1,
        "not UTF-8": 1,
    }
    assert report.first_dropped["row with another number of fields than the header"] == f"{path}:2"


BAD = {
    "no column": (b"a,b\n1,2\n", "no column 'text'; its columns are a, b; choose one with --json-key"),
    "empty": (b"", "no column 'text'; its columns are "),
    "two columns": (b"text,text\n1,2\n", "2 columns are named 'text'; there must be only one"),
    "open quote": (b'text\na\n"b\nc\n', r"not CSV in line 4 \(unexpected end of data\)"),
    "text after a quote": (b'text\na\n"b"c\n', "not CSV in line 3 "),
    "long row": (b'text\na\n"' + b"b\n" * (1 << 20) + b'"', "the row that ends in line .* is longer than 1 MiB"),
    "long line": (b"text\na\n" + b"b" * (1 << 20) + b"c\n", "line 3 is longer than 1 MiB"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_csv_is_one_line(tmp_path, monkeypatch, name):
    monkeypatch.setattr(compressed, "LONGEST_LINE", 1 << 20)
    data, message = BAD[name]
    path = tmp_path / "a.csv"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"^{path}: {message}") as caught:
        texts_of(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="a chat is a JSON object or a row, not a text file or CSV"):
        texts_of(path, chat_format="llama2")


@pytest.mark.parametrize("suffix", [".bz2", ".xz"])
@pytest.mark.parametrize("damage", ["empty", "other format", "second stream", "a flipped bit"])
def test_a_damaged_compressed_file_is_one_line(tmp_path, suffix, damage):
    pack, kind = {".bz2": (bz2.compress, "bzip2"), ".xz": (lzma.compress, "xz")}[suffix]
    good = pack(b'{"text": "good"}\n')
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 8
    damaged = {"empty": b"", "other format": b"PK text", "second stream": good + b"xx" + good, "a flipped bit": flipped}
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(damaged[damage])
    with pytest.raises(ValueError, match=f"^{path}: not a complete {kind} file") as caught:
        texts_of(path)
    assert "\n" not in str(caught.value)


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def names(path: Path, glob: str | None = None, left_out: LeftOut | None = None) -> list[str]:
    return [str(file).removeprefix(f"{path}/") for file in find_files([path], glob, left_out=left_out)]


def test_an_archive_is_read_like_a_folder(tmp_path):
    members = [
        "b/1.TXT",
        "a.jsonl",
        "b/0.txt.xz",
        "t.csv",
        "x.json",
        "y.parquet",
        "w.parquet.gz",
        "z.zip",
        "__MACOSX/._a.jsonl",
        ".git/a.txt",
    ]
    path = write_zip(tmp_path / "a.zip", dict.fromkeys(members, b"text"))
    with zipfile.ZipFile(path, "a") as archive:
        link = zipfile.ZipInfo("link.txt")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "b/1.TXT")
    left_out = LeftOut()
    assert names(path, None, left_out) == ["a.jsonl", "b/0.txt.xz", "b/1.TXT"]
    assert left_out.counts == {
        "hidden files and folders": 2,
        "links in archives": 1,
        ".csv files in archives": 1,
        ".json files in archives": 1,
        ".parquet files in archives": 1,
        ".parquet.gz files in archives": 1,
        ".zip files in archives": 1,
    }
    assert names(path, "*.csv") == ["t.csv"]
    with pytest.raises(ValueError, match=f"^{path}: no file in this archive matches '\\*.md'; give another --glob"):
        names(path, "*.md")


def test_a_folder_reads_archives_and_csv_only_if_named(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    write_input(folder / "a.jsonl", ["text"])
    write_zip(folder / "b.zip", {"b.txt": b"zipped"})
    (folder / "c.csv").write_text("text\nrow\n")
    left_out = LeftOut()
    assert names(folder, None, left_out) == ["a.jsonl"]
    assert left_out.counts == {".zip files": 1, ".csv files": 1}
    assert names(folder, "*.zip") == ["b.zip/b.txt"] and names(folder, "*.csv") == ["c.csv"]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_damaged_file_in_an_archive_is_named(tmp_path, name, method):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(name, b'{"text": "some text"}\n' * 50)
    data = bytearray(path.read_bytes())
    data[30 + len(name) + 25] ^= 4  # in the content, after the local header
    path.write_bytes(data)
    if name == "a.txt":
        write_input(tmp_path / "b.jsonl", ["good"])
        report = preprocess([path, tmp_path / "b.jsonl"], tmp_path / "x", ByteTokenizer(), progress=False)
        assert report.documents == 1 and list(report.first_dropped.values()) == [f"{path}/a.txt"]
        assert "a damaged file in a zip archive" in next(iter(report.dropped))
    else:
        with pytest.raises(ValueError, match=f"^{path}/{name}: a damaged file in a zip archive") as caught:
            texts_of(path)
        assert "\n" not in str(caught.value)


def test_unreadable_archives_are_one_line(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"a.txt": b"text"})
    whole = bytearray(path.read_bytes())
    path.write_bytes(whole[:-30])
    with pytest.raises(ValueError, match=f"^{path}: not a complete zip archive .File is not a zip file.$"):
        find_files([path])
    whole[whole.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=f"^{path}/a.txt: encrypted. Unpack the archive first$"):
        find_files([path])


@pytest.mark.parametrize("method, name", [(zipfile.ZIP_BZIP2, "bzip2"), (zipfile.ZIP_LZMA, "lzma")])
def test_archives_of_other_compression_are_rejected(tmp_path, method, name):
    """zipfile decompresses these without a limit on memory."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive:
        archive.writestr("a.txt", "text")
    with pytest.raises(
        ValueError, match=f"a.zip/a.txt: compressed by {name}, not by deflate. Unpack the archive first$"
    ):
        find_files([tmp_path / "a.zip"])


def test_an_archive_that_changed_is_opened_again(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"a.txt": b"old"})
    assert texts_of(path)[0] == [b"old"]
    write_zip(path, {"a.txt": b"newer"})
    assert texts_of(path, workers=2)[0] == [b"newer"]
