"""Make a corpus of long documents that anyone can rebuild, from Debian packages: debian_text.py FOLDER

Writes FOLDER/train.jsonl, 98 MB, and FOLDER/held.jsonl, 21 MB; and of short documents FOLDER/short.jsonl, 34 MB, and
FOLDER/short_held.jsonl. First run, on a machine with access to Debian packages:

    cd FOLDER && apt-get download linux-source-6.1 debian-handbook linux-doc-6.1 postgresql-doc-15 octave-doc
    for d in debian-handbook* linux-doc* postgresql* octave*; do dpkg -x $d x; done
    mkdir -p ls && dpkg -x linux-source-6.1_*.deb ls
    (cd ls/usr/src && tar xf linux-source-6.1.tar.xz --wildcards '*.c' '*.rst' '*.txt')

Training: 1,043 documents of 36,000 characters or more (C sources of the kernel, its documentation, HTML books).
Held out: parts of the kernel that are not in the training text (kind `code`), and the PostgreSQL manual (`manual`).
Short documents are whole files of 800 to 9,000 characters, about 200 to 3,000 tokens, of the same packages and parts.
"""

import glob
import html
import json
import os
import random
import re
import sys
from pathlib import Path

ROOT = "ls/usr/src/linux-source-6.1/"
HELD = ("fs/", "mm/", "kernel/", "net/core", "net/ipv4", "crypto/")
WHOLE = ("fs/ext4", "fs/xfs/libxfs", "mm", "kernel/sched", "kernel/trace", "net/ipv4", "fs/btrfs", "net/core")
SHORTEST, LONGEST, PIECE = 36_000, 1_200_000, 400_000
MOST_CODE = 70_000_000
SHORT_LEAST, SHORT_MOST, MOST_SHORT_CODE, SHORT_HELD = 800, 9_000, 20_000_000, 200


def main() -> None:
    os.chdir(sys.argv[1])
    sources = [f for f in sorted(glob.glob(ROOT + "**/*.c", recursive=True)) if os.path.getsize(f) >= 45_000]
    held = [f for f in sources if f.removeprefix(ROOT).startswith(HELD)]
    _write("train.jsonl", _to_train([f for f in sources if f not in set(held)]))
    _write("held.jsonl", _to_hold(held))
    _write("short.jsonl", _short_to_train())
    _write("short_held.jsonl", _short_to_hold())


def _to_train(sources: list[str]):
    documents = [("code", _read(f)) for f in sources]
    for pattern in ("rst", "txt"):
        for f in sorted(glob.glob(f"{ROOT}Documentation/**/*.{pattern}", recursive=True)):
            if "translations" not in f and len(text := _read(f)) >= SHORTEST:
                documents.append(("doc", text))
    for f in sorted(glob.glob("x/**/*.html", recursive=True)):
        other = "postgresql" in f or "/translations/" in f or ("debian-handbook" in f and "/en-US/" not in f)
        if os.path.isfile(f) and not other and len(text := _plain(_read(f))) >= SHORTEST:
            documents.append(("html", text))
    random.Random(7).shuffle(documents)
    code = 0
    for kind, text in documents:
        if kind != "code" or code <= MOST_CODE:
            code += len(text) if kind == "code" else 0
            yield {"text": text}


def _to_hold(sources: list[str]):
    # The four largest are tables of character codes.
    for f in sorted(sources, key=os.path.getsize, reverse=True)[4:12]:
        yield {"text": _read(f)[:LONGEST], "kind": "code"}
    for part in WHOLE:
        text = "\n".join(_read(f) for f in sorted(glob.glob(f"{ROOT}{part}/*.c")))
        yield {"text": text[:LONGEST], "kind": "code"}
    pages = sorted(glob.glob("x/usr/share/doc/postgresql-doc-15/html/*.html"))
    manual = "\n\n".join(_plain(_read(f)) for f in pages)
    for start in range(0, len(manual) - PIECE, PIECE):
        yield {"text": manual[start : start + PIECE], "kind": "manual"}


def _short_to_train():
    code = [text for f, text in _short_files("**/*.c") if not f.removeprefix(ROOT).startswith(HELD)]
    random.Random(8).shuffle(code)
    documents = []
    while code and sum(map(len, documents)) < MOST_SHORT_CODE:
        documents += code[:100]
        code = code[100:]
    for pattern in ("rst", "txt"):
        documents += [text for f, text in _short_files(f"Documentation/**/*.{pattern}") if "translations" not in f]
    for part in ("octave/**/*.html", "debian-handbook/html/en-US/*.html"):
        documents += _short_pages(part)
    random.Random(9).shuffle(documents)
    return ({"text": text} for text in documents)


def _short_to_hold():
    code = [text for f, text in _short_files("**/*.c") if f.removeprefix(ROOT).startswith(HELD)]
    for kind, texts in (("code", code), ("manual", _short_pages("postgresql-doc-15/html/*.html"))):
        random.Random(10).shuffle(texts)
        yield from ({"text": text, "kind": kind} for text in texts[:SHORT_HELD])


def _short_files(pattern: str) -> list[tuple[str, str]]:
    """Return (path, text) of the kernel's files of the lengths of short documents."""
    files = sorted(glob.glob(ROOT + pattern, recursive=True))
    return [(f, _read(f)) for f in files if os.path.isfile(f) and SHORT_LEAST <= os.path.getsize(f) <= SHORT_MOST]


def _short_pages(pattern: str) -> list[str]:
    pages = sorted(glob.glob(f"x/usr/share/doc/{pattern}", recursive=True))
    texts = [_plain(_read(f)) for f in pages if os.path.isfile(f)]
    return [text for text in texts if SHORT_LEAST <= len(text) <= SHORT_MOST]


def _read(path: str) -> str:
    return Path(path).read_text(errors="replace")


def _plain(text: str) -> str:
    text = re.sub(r"(?is)<(script|style|head)\b.*?</\1>", " ", text)
    text = re.sub(r"(?s)<!--.*?-->", " ", text)
    text = re.sub(r"(?i)<(p|br|div|h\d|li|tr|pre)[^>]*>", "\n", text)
    text = html.unescape(re.sub(r"(?s)<[^>]+>", "", text))
    return re.sub(r"\n\s*\n+", "\n\n", re.sub(r"[ \t]+", " ", text)).strip()


def _write(name: str, documents) -> None:
    with open(name, "w", encoding="utf-8") as out:
        for document in documents:
            out.write(json.dumps(document) + "\n")


if __name__ == "__main__":
    main()
