"""Run every command on a disk that is read-only, full, or has room for only a part of the output.

    python tests/faults/outputs.py FOLDER        (as root: it mounts small file systems in FOLDER)

A command runs once with room, to record its output; then on each bad disk, into a new place and over earlier output. It
must fail with one line and exit code 1 or 2, or continue without an optional output, but never print a traceback.
Earlier output and the files beside it must stay unchanged. With room again, the command must write the recorded output.
"""

import argparse
import itertools
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_cream.patches import platform

platform.setup()

from tests.bad_inputs import MODEL, TRAINER, Ended, load, make_world, snapshot, start
from tests.faults.disk import ballast, read_only, small_disk

PAGE, SIZE = 4096, 512 << 20
SHARES = (0.0, 0.3, 0.6, 0.9)


@dataclass(frozen=True)
class Command:
    """A command that writes output.

    script: path in the repository.
    flags: with {world} for the folder of inputs and {disk} for the small file system.
    over: further flags to replace earlier output; None if the command rejects earlier output or resumes from it.
    exact: whether each run writes the same bytes.
    goes_on: whether the output is optional: the command prints a warning and exits with code 0.
    """

    script: str
    flags: str
    over: str | None = None
    exact: bool = True
    goes_on: bool = False


IMPORT = "import --hf-path {world}/hf --output {disk}/out"
EXPORT = "export --checkpoint {world}/ckpt --hf-path {disk}/out"
PREPARE = (
    "--input {world}/long.jsonl --output-prefix {disk}/data "
    "--tokenizer-type HuggingFaceTokenizer --tokenizer-model {world}/hf"
)
EVALUATE = "--model {world}/hf --output {disk}/out"
TRAIN = "--load-hf {world}/hf " + " ".join(MODEL)
DATA = " --data-path {world}/data"
convert, prepare, evaluate, train = (
    partial(Command, script)
    for script in ("tools/convert_hf.py", "tools/preprocess_data.py", "tools/evaluate.py", TRAINER)
)
COMMANDS = {
    "import": convert(IMPORT, exact=False),
    "import --format torch": convert(IMPORT + " --format torch"),
    "export": convert(EXPORT, "--overwrite"),
    "export, several shards": convert(EXPORT + " --max-shard-size 300KB", "--overwrite"),
    "preprocess": prepare(PREPARE, "--overwrite"),
    "preprocess, two workers": prepare(PREPARE + " --workers 2", "--overwrite"),
    "perplexity": evaluate(
        f"perplexity {EVALUATE} --dataset {{world}}/long.jsonl --lengths 64 128 --stride 32", exact=False
    ),
    "needle": evaluate(
        f"needle {EVALUATE} --min-length 256 --max-length 512 --length-steps 2 --depth-steps 2", exact=False
    ),
    "kv": evaluate(f"kv {EVALUATE} --keys 5 --samples 2", exact=False),
    "plan": Command("tools/plan.py", "--config llama2_7b_32k --gpus 2 --picture {disk}/plan.png", "", exact=False),
    "plot_positions": Command("tools/plot_positions.py", "--samples 50 --output {disk}/positions.png", "", exact=False),
    "train --save": train(TRAIN + DATA + " --save {disk}/out", exact=False),
    "train --save-hf": train(TRAIN + DATA + " --save-hf {disk}/out", exact=False),
    "train --tensorboard-dir": train(TRAIN + DATA + " --tensorboard-dir {disk}/out", exact=False, goes_on=True),
    "train --data-cache-path": train(
        TRAIN + " --data-path 1 {world}/data 2 {world}/data --data-cache-path {disk}/out", exact=False, goes_on=True
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("commands", nargs="*", default=list(COMMANDS), metavar="COMMAND", help=", ".join(COMMANDS))
    args = parser.parse_args()
    world = args.folder.absolute() / "world"
    if not world.is_dir():
        # In its own process: it starts threads, and later forks could wait for threads that they do not have.
        made = start(lambda: inputs(world), "inputs")()
        assert made.code == 0, made.error
    wrong = 0
    for name in args.commands:
        for line in tried(COMMANDS[name], world, args.folder.absolute() / "disk"):
            wrong += line.startswith("WRONG")
            print(f"{name:26} {line}", flush=True)
    return 1 if wrong else 0


def inputs(world: Path) -> None:
    world.mkdir(parents=True)
    make_world(world)
    (world / "long.jsonl").write_text('{"text": "%s"}\n' % ("a text of some words " * 60) * 200)


def tried(command: Command, world: Path, disk: Path) -> Iterator[str]:
    """Run the command on each bad disk, and yield one result line per disk."""
    earlier = disk.parent / "earlier"
    shutil.rmtree(earlier, ignore_errors=True)
    with small_disk(disk, SIZE):
        first = run(command, world, disk)
        if first.code:
            yield f"WRONG: with room it ended with {first.code}: {first.error[-500:]}"
            return
        written, needed = snapshot(disk), used(disk)
        shutil.copytree(disk, earlier)
    for fault, over in itertools.product(["read-only", *SHARES], [False] + [True] * (command.over is not None)):
        with small_disk(disk, SIZE):
            other = disk / "other"
            other.write_text("what is here already")
            if over:
                shutil.copytree(earlier, disk, dirs_exist_ok=True)
            before = snapshot(disk)
            with taken_away(disk, fault, needed):
                ended = run(command, world, disk, over)
                after = snapshot(disk)
            wrong = list(found_wrong(ended, before, after, command.goes_on))
            again = run(command, world, disk, over)
            other.unlink()
            if again.code:
                wrong.append(f"with room again it ended with {again.code}: {again.error[-300:]}")
            else:
                wrong += differing(written, snapshot(disk), command.exact)
        label = fault if fault == "read-only" else f"{fault:.0%} of its room"
        said = (ended.error.strip().splitlines() or ["nothing"])[-1][:200]
        result = "WRONG: " + "; ".join(wrong) if wrong else "ok"
        yield f"{result} | {label}{', over an earlier one' * over} | {ended.code} | {said}"


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


def differing(written: dict[str, str], again: dict[str, str], exact: bool) -> Iterator[str]:
    """Yield a message if the run with room again misses files or, if `exact`, wrote different ones."""
    # The names of TensorBoard's files contain a time and a process id.
    missing = [path for path in written.keys() - again.keys() if "tfevents" not in path and "/runs/" not in path]
    changed = [path for path in again if again[path] != written.get(path)] if exact else []
    if missing or changed:
        yield f"with room again it wrote something else: {sorted(missing + changed)[:6]}"


def run(command: Command, world: Path, disk: Path, over: bool = False) -> Ended:
    words = f"{command.flags} {command.over or '' if over else ''}".format(world=world, disk=disk).split()
    return start(load(command.script).main, command.script, *words)()


def used(disk: Path) -> int:
    found = os.statvfs(disk)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def taken_away(disk: Path, fault: str | float, needed: int):
    """Return a context manager that makes the disk read-only, or leaves a fraction of the needed room."""
    here = disk / "out"
    return read_only(here) if fault == "read-only" else ballast(here, leave=int(fault * needed) // PAGE * PAGE)


if __name__ == "__main__":
    sys.exit(main())
