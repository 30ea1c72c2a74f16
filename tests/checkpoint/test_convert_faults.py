"""A conversion rejects bad inputs with one line, and writes a complete folder or nothing."""

import json
import pickle
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_cream.patches import platform

platform.setup()

from megatron_cream.checkpoint import output
from megatron_cream.checkpoint.convert import export_hf, import_hf
from megatron_cream.checkpoint.hf_folder import HfFolder
from megatron_cream.checkpoint.mapping import list_parameters
from megatron_cream.checkpoint.megatron_folder import MegatronCheckpoint
from megatron_cream.common.errors import UsageError
from tests import bad_inputs
from tests.checkpoint.test_convert import run_tool
from tests.hf_models import save_model
from tests.launch import ROOT

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "hf"
    save_model(folder, "llama-mha")
    return folder


@pytest.fixture
def hf(model, tmp_path):
    return shutil.copytree(model, tmp_path / "hf")


class Malice:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def config(**changes):
    def edit(hf):
        path = hf / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def tensors(change):
    def edit(hf):
        state = load_file(hf / "model.safetensors")
        change(state)
        save_file(state, hf / "model.safetensors", metadata={"format": "pt"})

    return edit


def index(weight_map, shard=None):
    def edit(hf):
        (hf / "model.safetensors").rename(hf / (shard or "a.safetensors"))
        (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return edit


def truncated(hf):
    path = hf / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def malicious_bin(hf):
    (hf / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Malice(hf / "pwned")}, hf / "pytorch_model.bin")


def old_pickle(hf):
    state = load_file(hf / "model.safetensors")
    (hf / "model.safetensors").unlink()
    torch.save(state, hf / "pytorch_model.bin", _use_new_zipfile_serialization=False)


BAD_FOLDERS = {
    "no config": (lambda hf: (hf / "config.json").unlink(), "has no config.json"),
    "config is no JSON": (
        lambda hf: (hf / "config.json").write_text("{"),
        "config.json: not a readable model configuration",
    ),
    "config is a list": (
        lambda hf: (hf / "config.json").write_text("[]"),
        "config.json: not a readable model configuration",
    ),
    "unknown family": (config(model_type="gemma"), "model_type 'gemma': only llama, mistral, qwen2, qwen3"),
    "another head": (
        config(architectures=["LlamaForSequenceClassification"]),
        "'LlamaForSequenceClassification': only",
    ),
    "biases": (config(attention_bias=True), "attention_bias true: not supported"),
    "another activation": (config(hidden_act="gelu"), 'hidden_act "gelu": not supported; only "silu" is'),
    "quantized": (config(quantization_config={"bits": 4}), "quantization_config: not supported"),
    "sliding window": (config(model_type="mistral", architectures=None, sliding_window=64), "sliding_window 64"),
    "dynamic rope without a factor": (
        config(rope_parameters=None, rope_scaling={"type": "dynamic"}),
        "'dynamic': {'factor'}",
    ),
    "heads and groups": (config(num_key_value_heads=3), "num_key_value_heads 3: must divide num_attention_heads 4"),
    "no layers": (config(num_hidden_layers=0), "num_hidden_layers 0: must be a whole number from 1"),
    "no weights": (lambda hf: (hf / "model.safetensors").unlink(), "has no weights; expected one of model.safetensors"),
    "truncated": (truncated, "model.safetensors: not a readable file of tensors"),
    "missing tensor": (tensors(lambda s: s.pop(Q_PROJ)), f"tensor {Q_PROJ} is missing"),
    "wrapped": (
        tensors(lambda s: [s.update({f"_orig_mod.{name}": s.pop(name)}) for name in list(s)]),
        "there is _orig_mod.model.embed_tokens.weight: save the model without its wrapper",
    ),
    "missing head": (tensors(lambda s: s.pop("lm_head.weight")), "config.json does not set tie_word_embeddings"),
    "extra tensor": (tensors(lambda s: s.update(extra=torch.ones(2))), "tensor extra is not part of a llama model"),
    "layer too many": (config(num_hidden_layers=2), "tensor model.layers.2.input_layernorm.weight is not part of"),
    "shape": (config(intermediate_size=180), "has shape [176, 64]; config.json requires [180, 64]"),
    "integers": (tensors(lambda s: s.update({Q_PROJ: s[Q_PROJ].to(torch.int8)})), "only float32, bfloat16 and float16"),
    "tied, yet two": (config(tie_word_embeddings=True), "lm_head.weight differs from model.embed_tokens.weight"),
    "index is no JSON": (
        lambda hf: ((hf / "model.safetensors").unlink(), (hf / "model.safetensors.index.json").write_text("nope")),
        "index.json: not a readable index of shards",
    ),
    "index is a list": (index([Q_PROJ]), "not a readable index of shards"),
    "shard out of the folder": (index({Q_PROJ: "../a.safetensors"}), "'../a.safetensors': must be the name of a file"),
    "absolute shard": (index({Q_PROJ: "/etc/passwd"}), "'/etc/passwd': must be the name of a file"),
    "shard missing": (index({Q_PROJ: "b.safetensors"}), f"tensor {Q_PROJ} is in b.safetensors, which does not exist"),
    "pickle with code": (malicious_bin, "pytorch_model.bin: not a readable file of tensors"),
    "pickle of before 2020": (old_pickle, "pytorch_model.bin: not a readable file of tensors"),
}


def test_silu_has_another_name(hf):
    config(hidden_act="swish")(hf)
    assert HfFolder(hf).shape.num_layers == 3


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folders(hf, case):
    edit, message = BAD_FOLDERS[case]
    edit(hf)
    with pytest.raises(UsageError) as error:
        HfFolder(hf)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (hf / "pwned").exists()


def test_the_command_prints_one_line(hf, tmp_path, model):
    tool = "tools/convert_hf.py"
    main = bad_inputs.load(tool).main
    config(model_type="gemma")(hf)
    result = run_tool("import", "--hf-path", hf, "--output", tmp_path / "ckpt")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("convert_hf.py: error: ") and len(result.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
    classic = ["--format", "torch", "--tensor-model-parallel-size"]
    for flags, message in [
        (["import", "--hf-path", tmp_path / "none", "--output", tmp_path / "x"], "none: no such folder"),
        (["import", "--output", tmp_path / "x"], "required: --hf-path"),
        (
            ["import", "--hf-path", hf, "--output", tmp_path / "x", "--tensor-model-parallel-size", "2"],
            "--format torch",
        ),
        (["export", "--checkpoint", tmp_path, "--hf-path", tmp_path / "x"], "not a Megatron checkpoint"),
        (["import", "--hf-path", model, "--output", tmp_path / "x", *classic, "3"], "num_attention_heads, 4"),
        (
            ["export", "--checkpoint", tmp_path, "--hf-path", tmp_path / "x", "--max-shard-size", "big"],
            "'big': must be",
        ),
        (["explode"], "invalid choice: 'explode'"),
    ]:
        ended = bad_inputs.start(main, tool, *flags)()
        assert ended.code == 2 and message in ended.error, ended.error
        assert len(ended.error.splitlines()) == 1 and not (tmp_path / "x").exists()


def test_a_folder_that_is_not_empty(hf, tmp_path):
    target = tmp_path / "ckpt"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    for overwrite, message in [(False, "is not empty"), (True, "thesis.txt is not")]:
        with pytest.raises(UsageError, match=message):
            import_hf(HfFolder(hf), target, overwrite=overwrite)
    assert (target / "thesis.txt").read_text() == "years of work"
    (target / "thesis.txt").unlink()
    import_hf(HfFolder(hf), target)  # an empty folder is accepted
    with pytest.raises(UsageError, match="or --overwrite"):
        import_hf(HfFolder(hf), target)
    import_hf(HfFolder(hf), target, dtype=torch.bfloat16, overwrite=True)
    checkpoint = MegatronCheckpoint(target)
    assert {checkpoint.dtype(row, layer) for row, layer in list_parameters(checkpoint.shape)} == {torch.bfloat16}
    (target / "iter_0000100").mkdir()  # from training in this folder
    with pytest.raises(UsageError, match="iter_0000100 is not"):
        import_hf(HfFolder(hf), target, overwrite=True)


def test_no_room(hf, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(UsageError, match=r"needs 0\.\d GB, but only 0\.0 GB are free"):
        import_hf(HfFolder(hf), tmp_path / "ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize("what", ["import-write", "import-read", "export-write"])
def test_an_error_halfway_leaves_no_output(hf, tmp_path, monkeypatch, what):
    """Errors of a full disk or an unreadable shard, at every 7th write or read in either thread, are raised."""
    source, ckpt, out = HfFolder(hf), tmp_path / "ckpt", tmp_path / "out"
    import_hf(source, ckpt)
    checkpoint = MegatronCheckpoint(ckpt)
    cls, name = (HfFolder, "get") if what == "import-read" else (output.HashingFile, "write")
    original = getattr(cls, name)
    for failing in range(1, 1000, 7):
        calls = []

        def method(*args, failing=failing, calls=calls):
            calls.append(args)
            if len(calls) == failing:
                raise OSError(28, "No space left on device")
            return original(*args)

        monkeypatch.setattr(cls, name, method)
        try:
            import_hf(source, tmp_path / "new") if "import" in what else export_hf(checkpoint, out)
        except OSError as error:
            assert error.errno == 28
            assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "hf"]
        else:
            assert len(calls) < failing, f"error {failing} was swallowed"
            break
    assert failing > 21


def test_killed_conversion(tmp_path):
    """After a SIGKILL no folder looks complete; the next conversion cleans up and succeeds."""
    state = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 32000}
    save_model(tmp_path / "hf", **state)
    command = [sys.executable, str(ROOT / "tools" / "convert_hf.py"), "import"]
    command += ["--hf-path", str(tmp_path / "hf"), "--output", str(tmp_path / "ckpt")]
    partial = tmp_path / ".ckpt.partial"
    process = subprocess.Popen(command)
    while process.poll() is None and not (partial.exists() and list(partial.rglob("*.distcp"))):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert partial.exists() and not (tmp_path / "ckpt").exists()
    with pytest.raises(UsageError):
        MegatronCheckpoint(partial)
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "hf"]
    assert run_tool("verify", "--checkpoint", tmp_path / "ckpt", "--hf-path", tmp_path / "hf").returncode == 0


LIMITED = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], None, "__main__")
"""


@pytest.mark.parametrize("what", ["torch_dist", "torch", "export"])
def test_a_file_size_limit_prints_one_line(hf, tmp_path, what):
    if what == "export":
        import_hf(HfFolder(hf), tmp_path / "ckpt")
        flags = ["export", "--checkpoint", tmp_path / "ckpt", "--hf-path", tmp_path / "new"]
    else:
        flags = ["import", "--hf-path", hf, "--output", tmp_path / "new", "--format", what]
    before = sorted(tmp_path.rglob("*"))
    command = [sys.executable, "-c", LIMITED, ROOT / "tools" / "convert_hf.py", *flags]
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    line = ended.stderr.strip().splitlines()[-1]
    assert (
        ended.returncode in (1, 2) and line.startswith("convert_hf.py: error: ") and "Traceback" not in ended.stderr
    ), ended.stderr
    assert str(tmp_path / "new") in line.replace("/.new.partial", "/new") and "nothing was changed" in line
    assert sorted(tmp_path.rglob("*")) == before


def test_two_conversions_to_one_folder(hf, tmp_path):
    with output.new_folder(tmp_path / "ckpt", flag="--output", overwrite=False, needs_bytes=0) as folder:
        (folder / "half").write_text("done")
        with pytest.raises(UsageError, match="another conversion is writing there now"):
            import_hf(HfFolder(hf), tmp_path / "ckpt")
    assert (tmp_path / "ckpt" / "half").exists()


def test_verify_finds_what_changed(hf, tmp_path):
    ckpt, out = tmp_path / "ckpt", tmp_path / "out"
    import_hf(HfFolder(hf), ckpt)
    export_hf(MegatronCheckpoint(ckpt), out)
    flags = ["verify", "--checkpoint", ckpt, "--hf-path", out]
    result = run_tool(*flags)
    assert result.returncode == 0 and "30 of 30 equal; largest difference 0\n" in result.stdout, result.stdout
    assert "logits: " in result.stdout

    shard = ckpt / "release" / "__0_0.distcp"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-2000] + bytes([whole[-2000] ^ 1]) + whole[-1999:])
    result = run_tool(*flags)
    assert result.returncode == 2 and "__0_0.distcp: damaged or changed since it was written" in result.stderr
    shard.write_bytes(whole)

    (out / output.MANIFEST).unlink()  # its checksums would fail first
    state = load_file(out / "model.safetensors")
    state[Q_PROJ][0, 0] += 0.5
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    result = run_tool(*flags)
    assert result.returncode == 1
    assert "29 of 30 equal" in result.stdout and f"largest difference 0.5, in {Q_PROJ}" in result.stdout


BAD_CHECKPOINTS = {
    "no metadata": (lambda step: (step / ".metadata").unlink(), "it has no .metadata"),
    "metadata cut": (lambda step: (step / ".metadata").write_bytes(b"\x80\x04"), "cannot be read"),
    "shard missing": (lambda step: (step / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "step missing": (lambda step: shutil.rmtree(step), "has no release"),
    "tracker": (lambda step: (step.parent / output.TRACKER).write_text("../x"), "must be a number or release"),
    "code in the metadata": (
        lambda step: (step / ".metadata").write_bytes(pickle.dumps(Malice(step / "pwned"))),
        "open, which is not allowed there; none of it was run",
    ),
    "another model": (
        lambda step: config(vocab_size=900)(step.parent / "hf"),
        "parameter embedding.word_embeddings.weight has shape [576, 64]; its flags require [900, 64]",
    ),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_bad_checkpoints(hf, tmp_path, case):
    import_hf(HfFolder(hf), tmp_path / "ckpt", vocabulary_divisor=64)
    edit, message = BAD_CHECKPOINTS[case]
    (tmp_path / "ckpt" / "release" / output.MANIFEST).unlink()  # its checksums would fail first
    edit(tmp_path / "ckpt" / "release")
    with pytest.raises(UsageError) as error:
        export_hf(MegatronCheckpoint(tmp_path / "ckpt"), tmp_path / "out")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / "ckpt" / "release" / "pwned").exists()
