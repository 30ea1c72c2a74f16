"""Tests of impossible outputs and flags of the tools: a one-line error before any work."""

import os
import re
import time

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_cream.patches import platform

platform.setup()

from megatron_cream.checkpoint import convert
from megatron_cream.checkpoint.convert import export_hf, import_hf
from megatron_cream.checkpoint.hf_folder import HfFolder
from megatron_cream.checkpoint.megatron_folder import MegatronCheckpoint
from megatron_cream.checkpoint.verify import _largest_difference, _verify_tensors
from megatron_cream.commands import preprocess as command
from megatron_cream.common.errors import UsageError
from megatron_cream.common.files import atomic_write
from megatron_cream.data import chat_records, documents, input_files
from megatron_cream.data.preprocess import PreprocessReport, preprocess
from tests import bad_inputs
from tests.checkpoint.test_convert_faults import Q_PROJ, config
from tests.data.test_preprocess import ByteTokenizer, read_back, write_lines, written
from tests.hf_models import save_model

LONG = "n" * 250


@pytest.fixture(scope="module")
def tools():
    return {tool: bad_inputs.load(f"tools/{tool}.py").main for tool in ("convert_hf", "plan", "plot_positions")}


@pytest.fixture
def hf(tmp_path):
    save_model(tmp_path / "hf", "llama-mha")
    return tmp_path / "hf"


# ---------------------------------------------------------------- files


def test_only_a_regular_file_is_replaced_and_a_link_stays_one(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to_pipe").symlink_to("pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "to_pipe", "folder"):
        with pytest.raises(UsageError, match=f"{name}: exists and is not a regular file"):
            with atomic_write(tmp_path / name) as file:
                file.write("new")
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "folder").is_dir()
    (tmp_path / "link").symlink_to("folder/target")
    for text in ("first", "second"):
        with atomic_write(tmp_path / "link") as file:
            file.write(text)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "folder" / "target").read_text() == text
    assert os.listdir(tmp_path / "folder") == ["target"]


PICTURES = {
    "pipe.png": "exists and is not a regular file",
    "folder.png": "exists and is not a regular file",
    "no/a.png": "does not exist",
    "a.txt": "must end in .png, .svg or .pdf",
    "": "must not be empty",
    f"{LONG}.png": "File name too long",
}


@pytest.mark.parametrize("tool, flag", [("plan", "--picture"), ("plot_positions", "--output")])
@pytest.mark.parametrize("name", PICTURES)
def test_pictures_that_cannot_be_written(tools, tmp_path, tool, flag, name):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    path = tmp_path / name if name else ""
    more = ["--gpus", "2"] if tool == "plan" else ["--samples", "10000000"]  # drawing these would take minutes
    begun = time.monotonic()
    ended = bad_inputs.start(tools[tool], f"tools/{tool}.py", flag, path, *more)()
    start = f"argument {flag}: " if name == "" else f"{flag} "
    assert ended.code == 2 and ended.error.startswith(f"{tool}.py: error: {start}"), ended.error
    assert PICTURES[name] in ended.error and len(ended.error.splitlines()) == 1
    assert time.monotonic() - begun < 30 and (tmp_path / "pipe.png").is_fifo()


def test_unbounded_sample_counts(tools, tmp_path):
    flags = ["--samples", 10**30, "--output", tmp_path / "a.png"]
    ended = bad_inputs.start(tools["plot_positions"], "tools/plot_positions.py", *flags)()
    assert ended.code == 2 and "error: --samples 1000" in ended.error and len(ended.error.splitlines()) == 1


# ---------------------------------------------------------------- conversions


def test_absurd_conversion_flags(tools, hf, tmp_path):
    import_hf(HfFolder(hf), tmp_path / "ckpt")
    import_, export = ["import", "--hf-path", hf, "--output"], ["export", "--checkpoint", tmp_path / "ckpt"]
    for flags, message in [
        ([*export, "--hf-path", tmp_path / "x", "--max-shard-size", "9" * 400], "--max-shard-size"),
        ([*export, "--hf-path", tmp_path / "x", "--max-shard-size", "9" * 30 + "TB"], "--max-shard-size"),
        ([*export, "--hf-path", tmp_path / LONG], "error: --hf-path"),
        ([*import_, tmp_path / LONG], "error: --output"),
        ([*import_, tmp_path / "x", "--make-vocab-size-divisible-by", 10**40], "--make-vocab-size-divisible-by"),
    ]:
        ended = bad_inputs.start(tools["convert_hf"], "tools/convert_hf.py", *flags)()
        assert ended.code == 2 and message in ended.error and len(ended.error.splitlines()) == 1, ended.error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "hf"]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 1")])
def test_a_conversion_without_memory_is_one_line(tools, hf, tmp_path, monkeypatch, error):
    """As on a host with too little room for the largest tensor. Nothing is left."""
    import_hf(HfFolder(hf), tmp_path / "ckpt")

    def allocate(*_):
        raise error

    monkeypatch.setattr(convert._Scratch, "get", allocate)
    for flags in (
        ["import", "--hf-path", hf, "--output", tmp_path / "new"],
        ["export", "--checkpoint", tmp_path / "ckpt", "--hf-path", tmp_path / "new"],
    ):
        ended = bad_inputs.start(tools["convert_hf"], "tools/convert_hf.py", *flags)()
        assert ended.code == 1 and "Traceback" not in ended.error, ended.error
        said = ended.error.splitlines()[-1]
        assert re.match(r"convert_hf.py: error: out of memory: .*nothing was changed. Free memory", said), said
        assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "hf"]


@pytest.mark.parametrize("target", ["same", "link", "inside", "above"])
@pytest.mark.parametrize("command", ["import", "export"])
def test_a_conversion_does_not_remove_its_input(tools, hf, tmp_path, command, target):
    import_hf(HfFolder(hf), tmp_path / "ckpt")
    export_hf(MegatronCheckpoint(tmp_path / "ckpt"), tmp_path / "out")  # both have a manifest, for --overwrite
    source = tmp_path / ("out" if command == "import" else "ckpt")
    (tmp_path / "link").symlink_to(source)
    to = {"same": source, "link": tmp_path / "link" / ".", "inside": source / "hf", "above": tmp_path}[target]
    flags = ("--hf-path", "--output") if command == "import" else ("--checkpoint", "--hf-path")
    (source / "hf").mkdir(exist_ok=True)
    before = sorted(source.rglob("*"))
    arguments = [command, flags[0], source, flags[1], to, "--overwrite"]
    ended = bad_inputs.start(tools["convert_hf"], "tools/convert_hf.py", *arguments)()
    assert ended.code == 2 and f"error: {flags[1]} {to}: must not overlap the source folder" in ended.error, ended.error
    assert sorted(source.rglob("*")) == before


@pytest.mark.parametrize("checkpoint_format", ["torch_dist", "torch"])
def test_a_cast_that_overflows(hf, tmp_path, checkpoint_format):
    state = load_file(hf / "model.safetensors")
    state["model.norm.weight"][3] = float("inf")  # not caused by the cast
    state["model.norm.weight"][4] = float("nan")
    save_file(state, hf / "model.safetensors", metadata={"format": "pt"})
    import_hf(HfFolder(hf), tmp_path / "inf", dtype=torch.float16, checkpoint_format=checkpoint_format)
    state[Q_PROJ][0, 0] = -70000.0
    save_file(state, hf / "model.safetensors", metadata={"format": "pt"})
    message = f"--dtype fp16: {Q_PROJ} contains 7e[+]04, which fp16 cannot represent"
    with pytest.raises(UsageError, match=message):
        import_hf(HfFolder(hf), tmp_path / "ckpt", dtype=torch.float16, checkpoint_format=checkpoint_format)
    assert not (tmp_path / "ckpt").exists()
    if checkpoint_format == "torch_dist":
        import_hf(HfFolder(hf), tmp_path / "ckpt", dtype=torch.bfloat16)
        with pytest.raises(UsageError, match=f"--dtype fp16: {Q_PROJ} contains"):
            export_hf(MegatronCheckpoint(tmp_path / "ckpt"), tmp_path / "out", dtype=torch.float16)


def test_the_largest_difference_with_nan(hf, tmp_path, capsys):
    nan, inf = float("nan"), float("inf")
    for a, b, expected in [
        ([1.0, nan], [1.5, nan], 0.5),
        ([inf, 1.0], [inf, 2.0], 1.0),
        ([nan, 1.0], [0.0, 1.0], inf),
        ([inf, 1.0], [-inf, 1.0], inf),
    ]:
        assert _largest_difference(torch.tensor(a), torch.tensor(b)) == expected
    import_hf(HfFolder(hf), tmp_path / "ckpt")
    state = load_file(hf / "model.safetensors")
    state[Q_PROJ][0, 0] = nan
    save_file(state, hf / "model.safetensors", metadata={"format": "pt"})
    assert not _verify_tensors(MegatronCheckpoint(tmp_path / "ckpt"), HfFolder(hf))
    assert f"29 of 30 equal; largest difference inf, in {Q_PROJ}" in capsys.readouterr().out


def test_parameters_in_a_pytorch_model_bin(hf, tmp_path):
    state = load_file(hf / "model.safetensors")
    (hf / "model.safetensors").unlink()
    torch.save({name: torch.nn.Parameter(tensor) for name, tensor in state.items()}, hf / "pytorch_model.bin")
    import_hf(HfFolder(hf), tmp_path / "ckpt")
    export_hf(MegatronCheckpoint(tmp_path / "ckpt"), tmp_path / "out")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(layer_types=["sliding_attention"] * 3), "layer_types: only full_attention is supported"),
        (
            dict(
                rope_parameters={"rope_type": "default", "rope_theta": 1e4},
                rope_scaling={"rope_type": "default", "partial_rotary_factor": 0.5},
            ),
            "rope_scaling: partial_rotary_factor 0.5: only 1.0 is supported",
        ),
    ],
    ids=["layer_types", "rope_scaling"],
)
def test_foreign_configurations(hf, changes, message):
    config(**changes)(hf)
    with pytest.raises(UsageError, match=message):
        HfFolder(hf)


# ---------------------------------------------------------------- preprocessing


def test_white_space_in_a_column_is_text_as_in_json(tmp_path):
    texts = ["good", " ", "\n\n", "\t", "fine"]
    write_lines(tmp_path / "a.jsonl", texts)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved")
    for name in ("a.jsonl", "a.parquet", "saved"):
        report = preprocess([tmp_path / name], tmp_path / "out" / name, ByteTokenizer(), progress=False)
        assert report.documents == 5 and not report.dropped
        assert written(tmp_path / "out" / name) == written(tmp_path / "out" / "a.jsonl")


@pytest.mark.parametrize("name, kind", [("a.jsonl.gz", "gzip"), ("a.json.zst", "zstd")])
def test_an_empty_compressed_file_is_truncated(tmp_path, name, kind):
    (tmp_path / name).write_bytes(b"")
    good = write_lines(tmp_path / "good.jsonl", ["good"])
    with pytest.raises(ValueError, match=f"{name}: not a complete {kind} file"):
        preprocess([good, tmp_path / name], tmp_path / "x", ByteTokenizer(), progress=False)
    write_lines(tmp_path / f"none.jsonl.{name.split('.')[-1]}", [])  # complete, without lines
    inputs = [good, tmp_path / f"none.jsonl.{name.split('.')[-1]}"]
    assert preprocess(inputs, tmp_path / "x", ByteTokenizer(), progress=False).documents == 1


def test_two_columns_of_one_name(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet: 2 columns are named 'text'; there must be only one"):
        preprocess([tmp_path / "a.parquet"], tmp_path / "x", ByteTokenizer(), progress=False)


@pytest.mark.parametrize("closed", [".", "part"])
@pytest.mark.parametrize("glob", [None, "*.txt"])
def test_an_unreadable_folder_is_not_skipped(tmp_path, monkeypatch, closed, glob):
    (tmp_path / "part").mkdir()
    (tmp_path / "a.txt").write_text("text")
    scandir = os.scandir

    def refusing(path="."):  # for every user, also root
        if str(path) == str(tmp_path / closed):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(ValueError, match=f"^{tmp_path / closed}: Permission denied$"):
        input_files.find_files([tmp_path], glob)


def test_the_output_is_not_read_as_input(tmp_path):
    (tmp_path / "a.md").write_text("text")
    (tmp_path / "out.bin.md").write_text("more")  # not an output of the run
    first = [path.name for path in input_files.find_files([tmp_path], "*", tmp_path / "out")]
    preprocess([tmp_path], tmp_path / "out", ByteTokenizer(), glob="*", progress=False)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "tokens.bin").write_bytes(b"half")
    (tmp_path / "out_loss_mask.idx").write_bytes(b"")
    assert [path.name for path in input_files.find_files([tmp_path], "*", tmp_path / "out")] == first
    assert first == ["a.md", "out.bin.md"] and len(read_back(tmp_path / "out")) == 2


@pytest.mark.parametrize("there", ["x.bin", "x.idx", "x_loss_mask.idx", "x.partial", LONG])
def test_an_output_with_impossible_file_names(tmp_path, monkeypatch, there):
    if there == "x.partial":
        (tmp_path / there).write_text("")
    elif there != LONG:
        (tmp_path / there).mkdir()
    path = write_lines(tmp_path / "a.jsonl", ["text"])
    prefix = tmp_path / (LONG if there == LONG else "x")
    monkeypatch.setattr(command, "check_tokenizer_files", lambda *_: None)
    flags = ["--input", path, "--output-prefix", prefix, "--overwrite"]
    flags += ["--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", path]
    ended = bad_inputs.start(command.main, "tools/preprocess_data.py", *flags)()
    assert ended.code == 2 and f"error: --output-prefix {prefix}: " in ended.error, ended.error
    assert len(ended.error.splitlines()) == 1
    assert ("File name too long" if there == LONG else f"{there} exists and is not a f") in ended.error


def test_the_report_prints_names_unchanged(tmp_path):
    prefix = tmp_path / os.fsdecode(b"x[/b]\xff")
    report = PreprocessReport(np.array([3]), {"no key 't[/b][red]'": 1}, {"no key 't[/b][red]'": f"{prefix}:1"})
    shown = bad_inputs.start(lambda: command.print_report(report, prefix), "tools/preprocess_data.py")()
    assert not shown.error, shown.error
    assert "dropped: no key 't[/b][red]'" in shown.out and "x[/b]?" in "".join(shown.out.split())


def test_a_chat_under_the_key_that_is_not_null():
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert chat_records.extract_chat({"conversations": None, "messages": turns}).messages == turns
    with pytest.raises(documents.BadDocument, match="no key"):
        chat_records.extract_chat({"conversations": None})
