"""Take the disk away from a running training, give it back, and compare the result with an undisturbed run.

    python tests/faults/disk.py FOLDER [--steps 120]        (as root: it mounts small file systems in FOLDER)

Two ranks over gloo save a checkpoint every second step, synchronously and with --async-save. While the fault lasts, at
least two checkpoints must fail, each with one line. The tracker and its checkpoint must stay; partial checkpoints must
not. Afterwards the run must succeed and end bit-identical to the undisturbed run.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.faults.kill import TRACKER, compare, launch, newest, ranks, wait_for
from tests.launch import write_documents

_PAGE = 4096


@contextlib.contextmanager
def full(save: Path) -> Iterator[None]:
    """Fill the disk completely."""
    with ballast(save, leave=0):
        yield


@contextlib.contextmanager
def no_room_for_metadata(save: Path) -> Iterator[None]:
    """Leave room for the shards of all ranks, but not for the files that the first rank writes last."""
    step = save / f"iter_{newest(save):07d}"
    shards = sum(-(-path.stat().st_size // _PAGE) * _PAGE for path in step.glob("*.distcp"))
    with ballast(save, leave=shards + 4 * _PAGE):
        yield


@contextlib.contextmanager
def read_only(save: Path) -> Iterator[None]:
    """Make the disk read-only, as after a disk error.

    The kernel refuses to remount a file system read-only while the run has its lock file open for writing.
    """
    disk = save.parent
    subprocess.run(["mount", "--bind", disk, disk], check=True)  # covers the mount with the open file
    subprocess.run(["mount", "-o", "remount,bind,ro", disk], check=True)
    yield
    subprocess.run(["umount", "--lazy", disk], check=True)


@contextlib.contextmanager
def no_tracker(save: Path) -> Iterator[None]:
    """Block only the tracker, by a folder in place of its temporary file."""
    beside = save / f".{TRACKER}.partial"
    beside.mkdir()
    yield
    beside.rmdir()


@contextlib.contextmanager
def names_taken(save: Path) -> Iterator[None]:
    """Put files in place of the folders of the next checkpoints."""
    files = [save / f"iter_{newest(save) + step:07d}" for step in (4, 6, 8, 10)]
    for path in files:
        path.write_text("not a checkpoint")
    yield
    for path in files:
        path.unlink()


@contextlib.contextmanager
def ballast(save: Path, leave: int) -> Iterator[None]:
    """Fill the disk of `save` until `leave` bytes are left."""
    path = save.parent / "ballast"
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(_PAGE))
    os.truncate(path, max(0, path.stat().st_size - leave))
    yield
    path.unlink()


@contextlib.contextmanager
def unmounted(save: Path) -> Iterator[None]:
    """Unmount the disk and mount it again, with the same inode numbers, as for a real disk or NFS."""
    disk, kept = save.parent, save.parent.with_name("kept")
    kept.mkdir(exist_ok=True)
    subprocess.run(["mount", "--bind", disk, kept], check=True)
    subprocess.run(["umount", "--lazy", disk], check=True)
    yield
    assert not list(disk.iterdir()), "nothing is written into the bare mount point"
    subprocess.run(["mount", "--bind", kept, disk], check=True)
    subprocess.run(["umount", "--lazy", kept], check=True)


FAULTS = (full, no_room_for_metadata, read_only, no_tracker, names_taken, unmounted)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=120)
    args = parser.parse_args()
    folder, steps = args.folder.absolute(), args.steps
    folder.mkdir(parents=True, exist_ok=True)
    documents = write_documents(folder / "documents", documents=20)
    process = launch(documents, folder / "alone", steps, folder / "alone.log")
    assert process.wait() == 0, (folder / "alone.log").read_text()[-3000:]
    for fault in FAULTS:
        for extra in ([], ["--async-save"]):
            name = "-".join([fault.__name__, *(flag.strip("-") for flag in extra)])
            with small_disk(folder / "disk", 256 << 20) as disk:
                said = take_away(fault, documents, disk / "run", steps, folder / f"{name}.log", extra)
                compare(folder / "alone", disk / "run", steps)
            print(f"{name}: {said}; ended with the same bits", flush=True)
    return 0


def take_away(fault, documents: Path, save: Path, steps: int, log: Path, extra: list[str]) -> str:
    """Run one training with the fault, check it, and return a summary of its failed checkpoints."""
    flags = ["--save", save, "--load", save, "--save-interval", 2, *extra]
    process = launch(documents, save, steps, log, flags=flags)
    wait_for(lambda: newest(save) >= 4 and len(ranks(process)) == 2, process)
    with fault(save):
        wait_for(lambda: log.read_text().count("warning: no checkpoint of step") >= 2, process)
        assert process.poll() is None, log.read_text()[-3000:]
        lines = [line for line in log.read_text().splitlines() if line.startswith("warning: no checkpoint of step")]
        if fault is not unmounted:
            assert lines[-1].endswith(f"the newest checkpoint is that of step {newest(save)}"), lines[-1]
            assert (save / f"iter_{newest(save):07d}" / ".metadata").is_file()
    assert process.wait() == 0 and newest(save) == steps, log.read_text()[-3000:]
    found = {int(path.name.removeprefix("iter_")) for path in save.glob("iter_*")}
    lines = [line for line in log.read_text().splitlines() if line.startswith("warning: no checkpoint of step")]
    for line in lines:
        assert int(line.split()[5].rstrip(":")) not in found, line
    return f"{len(lines)} failed, {lines[0].split(': ', 2)[2].split(';')[0]}"


@contextlib.contextmanager
def small_disk(path: Path, size: int) -> Iterator[Path]:
    path.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], check=True)
    try:
        yield path
    finally:
        deadline = time.monotonic() + 10  # processes of the run end shortly after it
        while subprocess.run(["umount", path], stderr=subprocess.DEVNULL).returncode:
            assert time.monotonic() < deadline, f"{path} is still in use"
            time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
