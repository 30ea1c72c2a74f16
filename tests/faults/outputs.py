"""Every command with nowhere to write: a disk that is read-only, full, or has room for a part of the output.

    python tests/faults/outputs.py FOLDER        (as root: it mounts small file systems in FOLDER)

A command runs once with room, to see what it writes; then on each bad disk, into a new place and over what an earlier
run left there. It must end in one line and an exit code of its own, without a traceback; the earlier output must stay
as it was, and so must what is beside it; and the same command, with room again, must write what it wrote before.
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_cream import platform

platform.setup()

from tests.bad_inputs import MODEL, TRAINER, Ended, load, make_world, snapshot, start

PAGE = 4096
SHARES = (0.0, 0.3, 0.6, 0.9)


@dataclass(frozen=True)
class Command:
    """name: its script's; flags: with {world} for what is read, {disk} for the small file system.

    over: further flags with which it replaces what an earlier run wrote; None where it has none, and an earlier run's
        place is refused, or gone on with.
    exact: the same bytes at each run.
    goes_on: it can do without, and says so.
    """

    script: str
    flags: str
    over: str | None = None
    exact: bool = True
    goes_on: bool = False


TOKENIZER = "--tokenizer-type HuggingFaceTokenizer --tokenizer-model {world}/hf"
COMMANDS = {
    "import": Command("tools/convert_hf.py", "import --hf-path {world}/hf --output {disk}/out", exact=False),
    "import --format torch": Command("tools/convert_hf.py", "import --hf-path {world}/hf --output {disk}/out --format torch"),
    "export": Command("tools/convert_hf.py", "export --checkpoint {world}/ckpt --hf-path {disk}/out", "--overwrite"),
    "export, several shards": Command(
        "tools/convert_hf.py", "export --checkpoint {world}/ckpt --hf-path {disk}/out --max-shard-size 300KB", "--overwrite"
    ),
    "preprocess": Command(
        "tools/preprocess_data.py", "--input {world}/long.jsonl --output-prefix {disk}/data " + TOKENIZER, "--overwrite"
    ),
    "preprocess, two workers": Command(
        "tools/preprocess_data.py", "--input {world}/long.jsonl --output-prefix {disk}/data --workers 2 " + TOKENIZER,
        "--overwrite",
    ),
    "perplexity": Command(
        "tools/evaluate.py", "perplexity --model {world}/hf --dataset {world}/long.jsonl --lengths 64 128 --stride 32 --output {disk}/out",
        exact=False,
    ),
    "needle": Command(
        "tools/evaluate.py", "needle --model {world}/hf --min-length 256 --max-length 512 --length-steps 2 --depth-steps 2 "
        "--output {disk}/out", exact=False,
    ),
    "kv": Command("tools/evaluate.py", "kv --model {world}/hf --keys 5 --samples 2 --output {disk}/out", exact=False),
    "plan": Command(
        "tools/plan.py", "--config examples/llama2_7b_32k.yaml --gpus 2 --picture {disk}/plan.png", "", exact=False
    ),
    "plot_positions": Command("tools/plot_positions.py", "--samples 50 --output {disk}/positions.png", "", exact=False),
    "train --save": Command(
        TRAINER, "--load-hf {world}/hf --data-path {world}/data --save {disk}/out " + " ".join(MODEL), exact=False
    ),
    "train --save-hf": Command(
        TRAINER, "--load-hf {world}/hf --data-path {world}/data --save-hf {disk}/out " + " ".join(MODEL), exact=False
    ),
    "train --tensorboard-dir": Command(
        TRAINER, "--load-hf {world}/hf --data-path {world}/data --tensorboard-dir {disk}/out " + " ".join(MODEL), exact=False,
        goes_on=True,
    ),
    "train --data-cache-path": Command(
        TRAINER, "--load-hf {world}/hf --data-path 1 {world}/data 2 {world}/data --data-cache-path {disk}/out "
        + " ".join(MODEL), exact=False, goes_on=True,
    ),
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("commands", nargs="*", default=list(COMMANDS), metavar="COMMAND", help=", ".join(COMMANDS))
    args = parser.parse_args()
    world = args.folder.absolute() / "world"
    if not world.is_dir():
        world.mkdir(parents=True)
        make_world(world)
        (world / "long.jsonl").write_text('{"text": "%s"}\n' % ("a text of some words " * 60) * 200)
    wrong = 0
    for name in args.commands:
        for line in tried(COMMANDS[name], world, args.folder.absolute() / "disk"):
            wrong += line.startswith("WRONG")
            print(f"{name:26} {line}", flush=True)
    return 1 if wrong else 0


def tried(command: Command, world: Path, disk: Path) -> Iterator[str]:
    """A line for each disk."""
    with small_disk(disk):
        first = run(command, world, disk)
        if first.code:
            yield f"WRONG: with room it ended with {first.code}: {first.error[-500:]}"
            return
        written, needed = snapshot(disk), used(disk)
        beside = disk.parent / "earlier"
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(disk, beside)
    for fault in ["read-only", *SHARES]:
        for over in [False] + [True] * (command.over is not None):
            with small_disk(disk):
                (disk / "beside").write_text("what is here already")
                if over:
                    shutil.copytree(beside, disk, dirs_exist_ok=True)
                before = snapshot(disk)
                with taken_away(disk, fault, needed):
                    ended = run(command, world, disk, over)
                    after = snapshot(disk)
                label = (
                    f"{fault if fault == 'read-only' else f'{fault:.0%} of its room'}{', over an earlier one' * over}"
                )
                faults = list(found_wrong(ended, before, after, command.goes_on))
                again = run(command, world, disk, over)
                if again.code:
                    faults.append(f"with room again it ended with {again.code}: {again.error[-300:]}")
                elif (
                    command.exact and {k: v for k, v in snapshot(disk).items() if not k.endswith("/beside")} != written
                ):
                    faults.append(f"with room again it wrote something else: {differing(snapshot(disk), written)}")
                elif not command.exact and snapshot(disk).keys() - {str(disk / "beside")} < written.keys():
                    faults.append("with room again it wrote less")
                said = ended.error.strip().splitlines()[-1:] or ["nothing"]
                yield f"{'WRONG: ' + '; '.join(faults) if faults else 'ok'} | {label} | {ended.code} | {said[0][:200]}"


def found_wrong(ended: Ended, before: dict[str, str], after: dict[str, str], goes_on: bool) -> Iterator[str]:
    if "Traceback" in ended.error:
        yield "a traceback"
    if ended.code == 0 and not goes_on:
        yield "it ended well"
    elif ended.code < 0 or ended.code > 2:
        yield f"exit code {ended.code}"
    lines = ended.error.strip().splitlines()
    if len(lines) != 1 and ended.code:
        yield f"{len(lines)} lines: {lines[:6]}"
    changed = [path for path in before if after.get(path) != before[path]]
    if changed:
        yield f"changed: {changed}"


def differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    return sorted(path for path in one.keys() | other.keys() if one.get(path) != other.get(path))


def run(command: Command, world: Path, disk: Path, over: bool = False) -> Ended:
    words = f"{command.flags} {command.over or '' if over else ''}".format(world=world, disk=disk).split()
    return start(load(command.script).main, command.script, *words)()


def used(disk: Path) -> int:
    found = os.statvfs(disk)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


@contextlib.contextmanager
def taken_away(disk: Path, fault: str | float, needed: int) -> Iterator[None]:
    if fault == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        yield
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        return
    found = os.statvfs(disk)
    room = int(fault * needed) // PAGE * PAGE
    ballast = disk / ".ballast"
    ballast.write_bytes(bytes(max(found.f_bavail * found.f_frsize - room - PAGE, 0)))
    with contextlib.suppress(OSError), open(ballast, "ab", buffering=0) as file:
        while os.statvfs(disk).f_bavail * PAGE > room:
            file.write(bytes(PAGE))
    yield
    ballast.unlink()


@contextlib.contextmanager
def small_disk(path: Path, size: int = 512 << 20) -> Iterator[None]:
    path.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], check=True)
    try:
        yield
    finally:
        deadline = time.monotonic() + 10  # what a run has started ends shortly after it
        while subprocess.run(["umount", path], stderr=subprocess.DEVNULL).returncode:
            assert time.monotonic() < deadline, f"{path} is still in use"
            time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
