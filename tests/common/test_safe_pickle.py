"""Tests that another process, Python version or numpy version can read saved values."""

import enum
import io
import pathlib
import pickle
import pickletools
import sys
import warnings
import zipfile
from argparse import Namespace
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from megatron_cream.checkpoint.opening import open_step
from megatron_cream.common.safe_pickle import check_pickled_names, load_metadata, load_plain, to_plain
from megatron_cream.patches import safe_loading
from tests.bad_inputs import saved
from tests.checkpoint.test_convert import run_tool
from tests.hf_models import save_model
from tests.launch import TINY, train, write_documents


class Colour(enum.Enum):
    RED = 1


@dataclass
class Point:
    place: pathlib.Path


VALUES = {
    "path": (pathlib.Path("a/b"), "a/b"),
    "enum": (Colour.RED, "RED"),
    "numpy scalar": (np.float64(0.5), 0.5),
    "torch's dtype": (torch.bfloat16, torch.bfloat16),
    "dataclass": (Point(pathlib.Path("x")), {"place": "x"}),
    "containers": ({"a": [pathlib.Path("b"), (np.int64(1), {2})]}, {"a": ["b", (1, {2})]}),
    "namespace": (Namespace(path=pathlib.Path("c")), Namespace(path="c")),
    "function": (len, "<built-in function len>"),
}


@pytest.mark.parametrize("case", VALUES)
def test_saved_flags_are_plain_values(case):
    value, expected = VALUES[case]
    plain = to_plain(value)
    assert plain == expected and type(plain) is type(expected)
    assert set(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(saved(plain)))) <= {"argparse.Namespace"}


def written_by_python(module: str, make, monkeypatch) -> bytes:
    """Return `make(PosixPath)`, written where PosixPath is a class of that module."""
    with monkeypatch.context() as other:
        home = sys.modules.get(module) or ModuleType(module)
        other.setitem(sys.modules, module, home)
        path = type("PosixPath", (pathlib.PosixPath,), {"__module__": module})
        other.setattr(home, "PosixPath", path, raising=False)
        return make(path)


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])  # Python up to 3.12, Python 3.13
def test_paths_saved_by_other_python_versions_load(module, monkeypatch):
    safe_loading.install()
    common = written_by_python(module, lambda path: saved([{"args": Namespace(folder=path("a/b"))}]), monkeypatch)
    assert load_plain(io.BytesIO(common))[0]["args"].folder == pathlib.Path("a/b")
    check_pickled_names(io.BytesIO(common))
    assert torch.load(io.BytesIO(common), weights_only=True)[0]["args"].folder == pathlib.Path("a/b")

    def metadata(path) -> bytes:
        return pickle.dumps(Metadata({}, None, {}, StorageMeta(checkpoint_id=path("a/b"))))

    assert load_metadata(written_by_python(module, metadata, monkeypatch)).storage_meta.checkpoint_id.name == "b"


@pytest.mark.parametrize("core", ["core", "_core"])  # numpy 1, numpy 2
def test_random_states_saved_by_other_numpy_versions_load(core):
    with warnings.catch_warnings(action="error"):  # numpy 2 deprecates numpy.core
        safe_loading.install()
    names = torch.serialization._weights_only_unpickler._get_user_allowed_globals()
    assert f"numpy.{core}.multiarray._reconstruct" in names


@pytest.mark.slow
def test_flags_of_a_run_from_a_model_load_in_another_process(tmp_path):
    save_model(tmp_path / "hf", "llama-mha", vocab_size=100)
    flags = ["--load-hf", tmp_path / "hf", "--data-path", write_documents(tmp_path / "documents", documents=20)]
    flags += ["--save", tmp_path / "run", "--train-iters", 1, "--split", "90,10,0"]
    own_shape = TINY[TINY.index("--seq-length") :]
    train(1, tmp_path / "events", *flags, base=own_shape)
    step = open_step(tmp_path / "run" / "iter_0000001", "--load")
    shard = (tmp_path / "run" / "iter_0000001" / "__0_0.distcp").read_bytes()
    info = next(info for index, info in step.metadata.storage_data.items() if index.fqn.startswith("common_state"))
    with zipfile.ZipFile(io.BytesIO(shard[info.offset : info.offset + info.length])) as entry:
        (data,) = (entry.read(name) for name in entry.namelist() if name.endswith("data.pkl"))
    named = {arg.split()[0] for opcode, arg, _ in pickletools.genops(data) if opcode.name == "GLOBAL"}
    assert named <= {"argparse", "collections", "torch", "torch._utils"}
    assert step.args.model_folder == str(tmp_path / "hf")
    result = run_tool("export", "--checkpoint", tmp_path / "run", "--hf-path", tmp_path / "out")
    assert result.returncode == 0, result.stderr
