"""Tests of killed preprocessing: the next run resumes, and the output equals that of an uninterrupted run."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from megatron_cream.data import documents, partial
from megatron_cream.data.indexed import loss_mask_prefix, paths, read_index
from megatron_cream.data.preprocess import preprocess
from tests.data.test_preprocess import ByteTokenizer, some_texts, write_lines, written
from tests.launch import ROOT

TEXTS = some_texts(60, longest=400)


class CountingTokenizer(ByteTokenizer):
    calls = 0

    def tokenize(self, text):
        self.calls += 1
        return super().tokenize(text)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setattr(documents, "BATCH_BYTES", 3000)
    monkeypatch.setattr(partial, "CHECKPOINT_SECONDS", 0.0)


def write_input(folder: Path, chats: bool) -> list[Path]:
    folder.mkdir()
    if not chats:
        return [write_lines(folder / "a.jsonl", TEXTS[:40]), write_lines(folder / "b.jsonl.gz", [*TEXTS[40:], ""])]
    turns = [[{"from": "human", "value": "q"}, {"from": "gpt", "value": text + "."}] for text in TEXTS]
    path = folder / "a.json"
    path.write_text(json.dumps([{"conversations": chat} for chat in [*turns, []]]))
    return [path]


def run(inputs, prefix, tokenizer=None, workers=1, **options):
    options = dict(tokenizer_id="bytes", progress=False) | options
    return preprocess(inputs, prefix, tokenizer or ByteTokenizer(), workers=workers, **options)


def everything(prefix: Path) -> list[bytes | None]:
    files = [*paths(prefix), *paths(loss_mask_prefix(prefix))]
    return [path.read_bytes() if path.exists() else None for path in files]


def dies_at(moment: int | None, inputs, prefix, **options) -> int:
    """Run preprocessing in a fork that SIGKILLs itself before file operation number `moment`.

    With None it runs to its end. Returns the number of file operations done.
    """
    steps = multiprocessing.get_context("fork").Value("i", 0)

    def counted(function):
        def step(*args, **kwargs):
            if steps.value == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            steps.value += 1
            return function(*args, **kwargs)

        return step

    def child():
        os.fsync, os.replace, partial.write_index = map(counted, (os.fsync, os.replace, partial.write_index))
        Path.unlink, Path.rmdir = counted(Path.unlink), counted(Path.rmdir)
        partial.PartialOutput.append = counted(partial.PartialOutput.append)
        run(inputs, prefix, **options)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == (0 if moment is None else -signal.SIGKILL)
    return steps.value


@pytest.mark.slow
@pytest.mark.parametrize("chats, overwrite", [(False, True), (True, False), (True, True)])
def test_a_run_killed_at_any_step_resumes(tmp_path, chats, overwrite):
    inputs = write_input(tmp_path / "in", chats)
    options = dict(chat_format="llama2" if chats else None, overwrite=overwrite)

    def prepared(name: str) -> Path:
        prefix = tmp_path / name / "x"
        prefix.parent.mkdir()
        if overwrite:  # earlier output with a loss mask, to be replaced only at the end
            run(write_input(tmp_path / f"{name}-in", True), prefix, chat_format="llama2")
        return prefix

    steps = dies_at(None, inputs, prepared("whole"), **options)
    expected = everything(tmp_path / "whole" / "x")
    assert sorted(os.listdir(tmp_path / "whole")) == ["x.bin", "x.idx", *["x_loss_mask.bin", "x_loss_mask.idx"] * chats]
    assert steps > 60 and (expected[2] is not None) == chats
    resumed = 0
    for moment in range(steps):
        prefix = prepared(f"{moment}")
        before = everything(prefix)
        dies_at(moment, inputs, prefix, **options)
        if prefix.with_name("x.idx").exists():
            assert everything(prefix) in (before, expected)  # never a readable mixture
        for name in ("tokens.bin", "lengths"):  # as an interrupted write leaves them
            path = Path(f"{prefix}.partial") / name
            if path.exists() and not partial._read_state(path.parent)[1].complete:
                path.write_bytes(path.read_bytes() + b"cut")
        tokenizer = CountingTokenizer()
        try:
            report = run(inputs, prefix, tokenizer, workers=1 if chats else 1 + moment % 2, **options)
        except FileExistsError:  # killed when only an empty folder was left to remove
            assert not overwrite and moment >= steps - 2
        else:
            assert report.documents == 60 and sum(report.dropped.values()) == 1
            assert report.lengths.tolist() == read_index(prefix).lengths.tolist()
            assert sorted(os.listdir(prefix.parent)) == sorted(os.listdir(tmp_path / "whole"))
        assert everything(prefix) == expected, moment
        resumed += tokenizer.calls < 60 * (1 + chats)
    assert resumed > 0.7 * steps


def test_a_run_with_other_settings_is_not_resumed(tmp_path):
    inputs, prefix = write_input(tmp_path / "in", False), tmp_path / "x"
    run(inputs, tmp_path / "other", json_key="text", append_eod=False)
    dies_at(40, inputs, prefix)
    state = (tmp_path / "x.partial" / "state.json").read_bytes()
    changed = {
        "append-eod": dict(append_eod=False),
        "tokenizer": dict(tokenizer_id="other bytes"),
        "min-document-tokens": dict(min_document_tokens=2),
        "strict": dict(strict=True),
    }
    for name, options in changed.items():
        with pytest.raises(
            ValueError, match=f"x.partial contains an unfinished run with another {name}; .*--overwrite"
        ) as caught:
            run(inputs, prefix, **options)
        assert "\n" not in str(caught.value)
    inputs[1].write_bytes(inputs[1].read_bytes())
    os.utime(inputs[1], (1, 1))
    with pytest.raises(ValueError, match="unfinished run with another input"):
        run(inputs, prefix)
    assert (tmp_path / "x.partial" / "state.json").read_bytes() == state
    assert not any(path.exists() for path in paths(prefix))

    run(inputs, prefix, append_eod=False, overwrite=True)
    assert written(prefix) == written(tmp_path / "other")
    assert not (tmp_path / "x.partial").exists()


@pytest.mark.parametrize("damage", ["state", "tokens", "lengths"])
def test_damaged_partial_output_is_rebuilt(tmp_path, damage):
    inputs, prefix = write_input(tmp_path / "in", False), tmp_path / "x"
    run(inputs, tmp_path / "whole")
    dies_at(40, inputs, prefix)
    path = tmp_path / "x.partial" / {"state": "state.json", "tokens": "tokens.bin", "lengths": "lengths"}[damage]
    path.write_bytes(path.read_bytes()[:-5] if damage == "state" else b"")
    tokenizer = CountingTokenizer()
    run(inputs, prefix, tokenizer)
    assert tokenizer.calls == 60 and written(prefix) == written(tmp_path / "whole")


def zero_a_block(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:100] + bytes(64) + data[164:])


@pytest.mark.parametrize("name", ["tokens.bin", "lengths", "loss_mask.bin"])
def test_a_zeroed_block_never_reaches_the_data(tmp_path, capsys, name):
    """Damage is found when a run resumes, and before the files get their final names."""
    inputs, prefix = write_input(tmp_path / "in", True), tmp_path / "x"
    run(inputs, tmp_path / "whole", chat_format="llama2")
    dies_at(60, inputs, prefix, chat_format="llama2")
    zero_a_block(tmp_path / "x.partial" / name)
    run(inputs, prefix, chat_format="llama2")
    assert (
        capsys.readouterr().err
        == f"preprocess: {prefix}.partial/{name} is damaged (CRC-32 mismatch): starting from the beginning\n"
    )
    assert everything(prefix) == everything(tmp_path / "whole")

    class Faulty(ByteTokenizer):
        def tokenize(self, text):
            if text.endswith(TEXTS[-1] + ". "):
                zero_a_block(tmp_path / "y.partial" / name)
            return super().tokenize(text)

    with pytest.raises(ValueError, match=f"y.partial/{name}: differs from what was written"):
        run(inputs, tmp_path / "y", Faulty(), chat_format="llama2")
    assert not list(tmp_path.glob("y*"))


def test_a_tokenizer_without_a_name_is_never_resumed(tmp_path):
    """Leftovers of the killed run do not block the next run."""
    inputs, prefix = write_input(tmp_path / "in", False), tmp_path / "x"
    dies_at(12, inputs, prefix, tokenizer_id=None)
    assert (tmp_path / "x.partial" / "tokens.bin").exists()

    class Upper(CountingTokenizer):
        def tokenize(self, text):
            return super().tokenize(text.upper())

    run(inputs, tmp_path / "whole", Upper())
    tokenizer = Upper()
    run(inputs, prefix, tokenizer, tokenizer_id=None)
    assert tokenizer.calls == 60 and written(prefix) == written(tmp_path / "whole")
    assert not (tmp_path / "x.partial").exists()


def test_other_files_in_the_folder_stay(tmp_path):
    inputs, prefix = write_input(tmp_path / "in", False), tmp_path / "x"
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial" / "mine").write_text("mine")
    run(inputs, prefix)
    assert os.listdir(tmp_path / "x.partial") == ["mine"]


@pytest.mark.parametrize(
    "error, kept", [(KeyboardInterrupt, True), (OSError("disk full"), True), (ValueError("bad"), False)], ids=str
)
def test_partial_output_is_kept_depending_on_the_error(tmp_path, monkeypatch, error, kept):
    inputs, prefix = write_input(tmp_path / "in", False), tmp_path / "x"
    run(inputs, tmp_path / "whole")

    class Failing(ByteTokenizer):
        def tokenize(self, text):
            if text == TEXTS[30]:
                raise error
            return super().tokenize(text)

    with pytest.raises(error if isinstance(error, type) else type(error)):
        run(inputs, prefix, Failing())
    assert (tmp_path / "x.partial").exists() == kept
    tokenizer = CountingTokenizer()
    run(inputs, prefix, tokenizer)
    assert (tokenizer.calls < 60) == kept and written(prefix) == written(tmp_path / "whole")


def test_two_runs_do_not_write_one_output(tmp_path):
    inputs, prefix = write_input(tmp_path / "in", False), tmp_path / "x"
    context = multiprocessing.get_context("fork")
    reached = context.Event()

    class Waiting(ByteTokenizer):
        def tokenize(self, text):
            if text == TEXTS[30]:
                reached.set()
                time.sleep(60)
            return super().tokenize(text)

    process = context.Process(target=run, args=(inputs, prefix, Waiting()))
    process.start()
    assert reached.wait(300)
    with pytest.raises(BlockingIOError, match="x.partial: another process is writing this output"):
        run(inputs, prefix)
    process.kill()
    process.join()
    tokenizer = CountingTokenizer()
    run(inputs, prefix, tokenizer)
    assert tokenizer.calls < 60
    assert not (tmp_path / "x.partial").exists()


def test_repeated_kills_with_workers(tmp_path):
    """Send SIGKILL from outside after some seconds; the workers end too, and release the output."""
    inputs, prefix = write_input(tmp_path / "in", False), tmp_path / "x"
    run(inputs, tmp_path / "whole")
    program = textwrap.dedent(
        f"""
        import sys, time
        sys.path.insert(0, {str(ROOT)!r})
        from pathlib import Path
        from megatron_cream.data import documents, partial
        from megatron_cream.data.preprocess import preprocess
        documents.BATCH_BYTES, partial.CHECKPOINT_SECONDS = 2000, 0.0

        class Slow:
            bos, eod, vocab_size = 256, 257, 258
            def tokenize(self, text):
                time.sleep(0.1)
                return list(text.encode())

        inputs = [Path(path) for path in {list(map(str, inputs))}]
        preprocess(inputs, {str(prefix)!r}, Slow(), workers=2, tokenizer_id="bytes")
        """
    )
    kills, partial_folder = 0, Path(f"{prefix}.partial")
    while not read_complete(prefix) or (partial_folder / "state.json").exists():  # killed after the renames
        process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
        try:
            _, errors = process.communicate(timeout=0.7 + 0.13 * kills)
            assert process.returncode == 0, errors
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()  # returns when the workers, which share stderr, have ended
            kills += 1
            assert kills < 30
    assert kills >= 2
    assert written(prefix) == written(tmp_path / "whole")
    assert not partial_folder.exists()


def read_complete(prefix: Path) -> bool:
    return all(path.exists() for path in paths(prefix)) and len(read_index(prefix).lengths) == 60


def test_the_resumed_run_says_so(tmp_path, capfd):
    inputs, prefix = write_input(tmp_path / "in", True), tmp_path / "x"
    dies_at(40, inputs, prefix, chat_format="llama2")
    run(inputs, prefix, chat_format="llama2", progress=True)
    assert "resuming after" in capfd.readouterr().err.splitlines()[0]
    assert len(read_index(prefix).lengths) == 60
