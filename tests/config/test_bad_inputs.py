"""Tests of bad input to every command line: one clear line, exit code 2, nothing written, nothing executed.

Each case of bad_input_cases.py, bad_folder_cases.py and bad_setting_cases.py damages a copy of good files and runs
main() in a forked process; a few run as real processes.
"""

import io
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp

from megatron_cream.patches import platform

platform.setup()

from megatron_cream.checkpoint import start as checkpoint_start
from megatron_cream.common import files
from megatron_cream.common.errors import UsageError
from megatron_cream.config import parse
from megatron_cream.distributed import rendezvous
from megatron_cream.patches import safe_loading
from tests.bad_folder_cases import FOLDERS
from tests.bad_input_cases import (
    CHECKPOINTS,
    FROM_CKPT,
    FROM_CLASSIC,
    FROM_EXPORT,
    FROM_HF,
    IMPORT,
    NEW,
    PREPARE,
    RECIPE,
    RESUME,
    SHARD,
    START,
    STEP,
    VERIFY,
    evil,
)
from tests.bad_inputs import (
    TOOLS,
    TRAINER,
    config,
    entry,
    flip,
    free_port,
    load,
    make_world,
    metadata,
    put,
    snapshot,
    start,
)
from tests.bad_setting_cases import DATA, EMPTY_PATHS, FLAGS, RECIPES, TOOL_CASES
from tests.forked_commands import FRESH_TORCHRUN
from tests.launch import ROOT

CASES = {
    **{f"checkpoint: {name}": case for name, case in CHECKPOINTS.items()},
    **{f"hf: {name}": case for name, case in FOLDERS.items()},
    **{f"recipe: {name}": (put("recipe.yaml", text), RECIPE, words) for name, (text, words) in RECIPES.items()},
    **{f"data: {name}": case for name, case in DATA.items()},
    **TOOL_CASES,
    **EMPTY_PATHS,
}


@pytest.fixture(scope="module")
def mains():
    torch.set_num_threads(1)  # a fork does not inherit a pool's threads
    return {name: load(name).main for name in (TRAINER, *TOOLS)}


@pytest.fixture(scope="module")
def good(mains, tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "world"
    folder.mkdir()
    make_world(folder)
    return folder


@pytest.fixture
def world(good, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(good, tmp_path / "world", symlinks=True)


def fails_in_one_line(mains, world: Path, command, words: list[str], ranks: int = 1) -> None:
    before = snapshot(world.parent)
    name, *flags = [part.replace("{0}", str(world)) for part in command]
    port = free_port()
    waits = [start(mains[name], name, *flags, rank=rank, ranks=ranks, port=port) for rank in range(ranks)]
    ended, *others = (wait() for wait in waits)
    assert all((other.code, other.error) == (2, "") for other in others), others
    assert not (world / "pwned").exists() and not (world.parent / "pwned").exists(), "code of the input was run"
    lines = [line for line in ended.error.splitlines() if line.strip()]
    assert ended.code == 2, ended.error[-3000:]
    assert len(lines) == 1 and lines[0].startswith(f"{Path(name).name}: error: "), ended.error[-3000:]
    assert not [word for word in words if word not in lines[0]], lines[0]
    assert len(lines[0]) < 900, lines[0]
    assert snapshot(world.parent) == before


@pytest.mark.parametrize("case", CASES)
def test_bad_input_exits_with_code_2_and_writes_nothing(mains, world, case):
    damage, command, words = CASES[case]
    damage(world)
    fails_in_one_line(mains, world, command, words)


@pytest.mark.parametrize("case", FLAGS)
def test_flags_that_cannot_run(mains, world, case):
    flags, ranks, words = FLAGS[case]
    fails_in_one_line(mains, world, (*NEW, *flags.split()), words, ranks)


def test_checkpoints_saved_by_another_run_are_not_overwritten(tmp_path):
    """The check is repeated once --save is locked: a 30 s run fits between the first check and the lock."""
    flags = checkpoint_start.StartFlags(save=str(tmp_path))
    checkpoint_start.reject_other_run(flags)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    with pytest.raises(UsageError, match=f"--save {tmp_path}: contains the checkpoints of an earlier run"):
        checkpoint_start.reject_other_run(flags)
    checkpoint_start.reject_other_run(replace(flags, load=f"{tmp_path}/."))


def test_intact_input_passes_every_check(mains, world):
    """The cases above would also pass in a project that rejects everything."""
    for command in (RESUME, FROM_CKPT, FROM_EXPORT, FROM_CLASSIC, FROM_HF):
        flags = [part.replace("{0}", str(world)) for part in command]
        ended = start(lambda: parse.parse(flags[1:]) and 7, TRAINER)()
        assert ended.code == 7, ended.error[-2000:]
    for command in (IMPORT, VERIFY, PREPARE):
        flags = [part.replace("{0}", str(world)) for part in command]
        ended = start(mains[flags[0]], *flags)()
        assert ended.code == 0, ended.error[-2000:]
        shutil.rmtree(world / "new", ignore_errors=True)


def test_an_older_checkpoint_without_checksums_is_loaded(world):
    (world / STEP / "integrity.json").unlink()
    flags = [part.replace("{0}", str(world)) for part in RESUME[1:]]
    assert start(lambda: parse.parse(flags) and 7, TRAINER)().code == 7


def test_disabled_checksums_are_not_compared(world):
    flip(SHARD)(world)
    flags = [part.replace("{0}", str(world)) for part in RESUME[1:]]
    assert start(lambda: parse.parse([*flags, "--no-checkpoint-checksums"]) and 7, TRAINER)().code == 7


def test_an_error_on_one_rank_ends_both_with_one_line(mains, world):
    """Only one rank checks the damaged shard; the other rank waits for its result."""
    before = snapshot(world)
    for shard in ("__0_0", "__1_0"):
        whole = (world / STEP / f"{shard}.distcp").read_bytes()
        flip(f"{STEP}/{shard}.distcp")(world)
        flags, port = [part.replace("{0}", str(world)) for part in RESUME[1:]], free_port()
        ranks = [start(mains[TRAINER], TRAINER, *flags, rank=rank, ranks=2, port=port) for rank in range(2)]
        first, second = (wait() for wait in ranks)
        assert (first.code, second.code) == (2, 2), first.error + second.error
        assert len(first.error.splitlines()) == 1 and f"{shard}.distcp" in first.error and not second.error
        (world / STEP / f"{shard}.distcp").write_bytes(whole)
    assert snapshot(world) == before


def test_no_rank_exits_before_the_error_is_printed(mains, world):
    """torchrun would kill rank 0, which may find the fault later, before it prints the error."""
    config(num_hidden_layers="two")(world)
    flags, port = [part.replace("{0}", str(world)) for part in (*START[1:], "--load-hf", "{0}/hf")], free_port()
    ended, waits = [], {}
    for rank in (1, 0):
        waits[rank] = start(mains[TRAINER], TRAINER, *flags, rank=rank, ranks=2, port=port)
        threading.Thread(target=lambda wait=waits[rank], rank=rank: ended.append((rank, wait()))).start()
        time.sleep(3 * rank)
        assert not ended
    deadline = time.monotonic() + 60
    while len(ended) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    said = dict(ended)
    assert "num_hidden_layers 'two'" in said[0].error and not said[1].error
    assert (said[0].code, said[1].code) == (2, 2)


def test_an_error_found_only_by_rank_1_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(rendezvous, "_PRINT_TIMEOUT", timedelta(seconds=0.3))
    store = torch.distributed.TCPStore("localhost", 0, is_master=True)
    monkeypatch.setattr(rendezvous, "_store", store)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, line in ((1, "from rank 1"), (0, "from rank 0"), (1, "again")):
        monkeypatch.setenv("RANK", str(rank))
        rendezvous.print_once(line)
    assert capsys.readouterr().err.split("\n") == ["from rank 1", "from rank 0", ""]


def test_bad_input_under_torchrun(world):
    """Run a tool in a real process, and the trainer under torchrun with two ranks."""
    config(num_hidden_layers="two")(world)
    before = snapshot(world)
    one, two = (
        [str(ROOT / command[0]), *(part.replace("{0}", str(world)) for part in command[1:])]
        for command in (IMPORT, (*START, "--load-hf", "{0}/hf"))
    )
    ended = subprocess.run([sys.executable, *one], capture_output=True, text=True, cwd=world)
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1, ended.stderr
    command = [*FRESH_TORCHRUN, "--nproc_per_node=2", *two]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=world)
    assert ended.returncode != 0 and "exitcode  : 2" in ended.stderr
    assert ended.stderr.count("num_hidden_layers 'two'") == 1
    assert snapshot(world) == before


def test_readers_reject_bad_files_without_earlier_checks(world):
    """torch's own reader, as Megatron calls it, executes nothing either."""
    safe_loading.install()
    reader = dcp.FileSystemReader(world / STEP)
    assert reader.read_metadata().state_dict_metadata
    entry(STEP, "rng_state", lambda w: [evil(w)])(world)
    found = dcp.FileSystemReader(world / STEP).read_metadata()
    key = next(key for key in found.state_dict_metadata if key.startswith("rng_state"))
    with pytest.raises(BaseException, match="open, which is not allowed there"):  # torch's error is not an Exception
        dcp.load({key: io.BytesIO()}, checkpoint_id=world / STEP, no_dist=True)
    metadata(STEP, lambda w, m: evil(w))(world)
    with pytest.raises(Exception, match="none of it was run"):
        dcp.FileSystemReader(world / STEP).read_metadata()
    assert not (world / "pwned").exists()


LONGER = ("--train-iters", "9", "--override-opt-param-scheduler")  # steps are left to train


def test_one_run_at_a_time_in_a_folder(mains, world, monkeypatch):
    """The second run waits for the lock for a while, fails with one line and leaves the first run's files unchanged."""
    monkeypatch.setattr(files, "LOCK_WAIT_SECONDS", 0.6)
    monkeypatch.setattr(files, "_locks", {})
    files.lock_folder(world / "run", "--save")
    before = snapshot(world / "run")
    files.lock_folder(world / "run", "--save")  # reading and closing .lock has released the lock
    flags = [part.replace("{0}", str(world)) for part in (*RESUME, "--save", "{0}/run", *LONGER)]
    ended = start(mains[TRAINER], *flags)()
    assert (ended.code, len(ended.error.splitlines())) == (2, 1), ended.error
    assert f"--save {world / 'run'}: another run is writing there now" in ended.error
    assert snapshot(world / "run") == before
    files._locks.popitem()[1].close()


def test_a_named_pipe_as_lock_file_does_not_block(tmp_path):
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(UsageError, match=r"--save .*\.lock is not a file"):
        files.lock_folder(tmp_path, "--save")


@pytest.mark.parametrize("checksums", [True, False])
def test_the_only_checkpoint_is_found_without_its_tracker(world, checksums):
    """It needs its checksums, which are written last: without them it may be an interrupted first save."""
    (world / "run" / "latest_checkpointed_iteration.txt").unlink()
    if not checksums:
        (world / STEP / "integrity.json").unlink()
    flags = [part.replace("{0}", str(world)) for part in (*RESUME, "--save", "{0}/run", *LONGER)][1:]
    step = 2 if checksums else None
    assert start(lambda: 7 if parse.parse(flags).args.ckpt_step == step else 8, TRAINER)().code == 7


@pytest.mark.parametrize(
    "flags, words",
    [
        ("", ""),
        ("--seed 99", ", now 99: the order"),
        ("--position-sampler pose", "--position-sampler cream, now pose; "),
    ],
)
def test_resuming_with_other_samples_prints_a_warning(world, flags, words):
    given = [part.replace("{0}", str(world)) for part in (*RESUME, *LONGER)][1:]
    ended = start(lambda: parse.parse([*given, *flags.split()]) and 7, TRAINER)()
    said = [line for line in ended.error.splitlines() if line.startswith("note:")]
    assert ended.code == 7 and len(said) == bool(words) and words in "".join(said), ended.error


def test_a_configuration_may_be_edited(world):
    """Only `verify` compares the files beside the weights with their checksums; a missing one is rejected."""
    config("exported", use_cache=False)(world)
    edited = world / "exported" / "tokenizer_config.json"
    edited.write_text(edited.read_text() + "\n")
    flags = [part.replace("{0}", str(world)) for part in FROM_EXPORT[1:]]
    assert start(lambda: parse.parse(flags) and 7, TRAINER)().code == 7
    edited.unlink()
    missing = "tokenizer_config.json: missing, but integrity.json lists it"
    assert missing in start(lambda: parse.parse(flags) and 7, TRAINER)().error
