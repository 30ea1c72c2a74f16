"""Folders of good inputs, ways to damage them, and command lines run on them in forks of the test process."""

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import pickle
import shutil
import socket
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from megatron_cream.checkpoint.convert import export_hf, import_hf
from megatron_cream.checkpoint.hf_folder import HfFolder
from megatron_cream.checkpoint.megatron_folder import MegatronCheckpoint
from tests.evaluation_models import save_llama
from tests.launch import ROOT, TINY, torchrun, write_documents

TRAINER = "pretrain_cream.py"
TOOLS = tuple(f"tools/{name}.py" for name in ("convert_hf", "preprocess_data", "evaluate", "plan", "plot_positions"))


# ---------------------------------------------------------------- running


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    error: str


def load(name: str):
    """Import a command-line script as a module. `start` runs its main()."""
    spec = importlib.util.spec_from_file_location(f"bad_inputs_{Path(name).stem}", ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(main: Callable[[], int | None], name: str, *flags, rank: int = 0, ranks: int = 1, port: int = 0):
    """Run main() in a fork with the command line `name flags`.

    Returns: a function that waits for the fork and returns its Ended.
    """
    out, error = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process == 0:
        code = 1
        try:
            os.dup2(out.fileno(), 1)
            os.dup2(error.fileno(), 2)
            sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
            sys.argv = [name, *map(str, flags)]
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port or free_port()), "HF_HUB_OFFLINE": "1"}
            code = main() or 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            os._exit(code)

    def wait() -> Ended:
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        texts = []
        for file in (out, error):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
            file.close()
        return Ended(code, *texts)

    return wait


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def snapshot(folder: Path) -> dict[str, str]:
    """Return the contents of a folder: path -> SHA-256 of a file's bytes, or the target of a link."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = os.readlink(path)
        else:
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no file"
    return found


# ---------------------------------------------------------------- good inputs


def make_world(folder: Path) -> None:
    """Write a world of good inputs into `folder`.

    data: .bin/.idx; hf: a Hugging Face model; ckpt: imported from hf; exported: exported from ckpt, with checksums;
    run: a checkpoint trained by two ranks; classic: hf imported as `mp_rank_XX` files; texts.jsonl.
    """
    write_documents(folder / "data", documents=20)
    save_llama(folder / "hf")
    import_hf(HfFolder(folder / "hf"), folder / "ckpt")
    export_hf(MegatronCheckpoint(folder / "ckpt"), folder / "exported")
    import_hf(HfFolder(folder / "hf"), folder / "classic", checkpoint_format="torch", transformer_engine=False)
    (folder / "texts.jsonl").write_text('{"text": "one text"}\n' * 3)
    flags = [*RUN, "--data-path", folder / "data", "--save", folder / "run", "--save-interval", 2]
    result = torchrun(2, *flags)
    assert result.returncode == 0, result.stderr[-4000:]
    shutil.rmtree(folder / "run" / "runs")


# Two steps of a tiny Llama; the caller adds the data.
RUN = [*TINY, "--fp32", "--train-iters", "2", "--split", "8,2,0"]
RUN += ["--use-distributed-optimizer", "--nan-policy", "rerun"]
# A run of the imported model, which gives the shape and the RoPE settings.
MODEL = "--seq-length 96 --micro-batch-size 2 --train-iters 2 --lr 1e-3 --split 8,2,0 --eval-iters 1 --fp32".split()


# ---------------------------------------------------------------- damage


class Malice:
    """Create a file when unpickled."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def cut(name: str, by: int = 1):
    return lambda w: (w / name).write_bytes((w / name).read_bytes()[:-by])


def flip(name: str, at: float = 0.9):
    """Flip one bit, at this fraction of the file's length."""

    def damage(w: Path) -> None:
        data = bytearray((w / name).read_bytes())
        data[int(at * len(data))] ^= 1
        (w / name).write_bytes(data)

    return damage


def put(name: str, content: bytes | str):
    def damage(w: Path) -> None:
        (w / name).parent.mkdir(parents=True, exist_ok=True)
        (w / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def remove(name: str):
    return lambda w: shutil.rmtree(w / name) if (w / name).is_dir() else (w / name).unlink()


def also(*damages):
    return lambda w: [damage(w) for damage in damages]


def without_checksums(damage):
    """Damage a checkpoint without checksums, so that the fault itself must be found."""

    def both(w: Path) -> None:
        for manifest in w.rglob("integrity.json"):
            manifest.unlink()
        damage(w)

    return both


def config(name: str = "hf", **changes):
    def damage(w: Path) -> None:
        path = w / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def tensors(change, name: str = "hf"):
    def damage(w: Path) -> None:
        state = load_file(w / name / "model.safetensors")
        change(state)
        save_file(state, w / name / "model.safetensors", metadata={"format": "pt"})

    return damage


def header(change, name: str = "hf"):
    """Change the header of model.safetensors, or its stated length if `change` returns an int."""

    def damage(w: Path) -> None:
        path = w / name / "model.safetensors"
        data = path.read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        found = json.loads(data[8 : 8 + size])
        changed = change(found)
        text = json.dumps(found).encode()
        length = changed if isinstance(changed, int) else len(text)
        path.write_bytes(struct.pack("<Q", length) + text + data[8 + size :])

    return damage


def sharded(weight_map: dict | None, name: str = "hf"):
    """Rename the weight file to a shard, and write an index of `weight_map` (None: of all tensors)."""

    def damage(w: Path) -> None:
        names = load_file(w / name / "model.safetensors").keys()
        (w / name / "model.safetensors").rename(w / name / "a.safetensors")
        found = dict.fromkeys(names, "a.safetensors") if weight_map is None else weight_map
        (w / name / "model.safetensors.index.json").write_text(json.dumps({"weight_map": found}))

    return damage


def malicious_bin(w: Path) -> None:
    (w / "hf" / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Malice(w / "pwned")}, w / "hf" / "pytorch_model.bin")


def bin_of(change):
    """Replace the weights with a pytorch_model.bin that contains `change(state dict)`."""

    def damage(w: Path) -> None:
        torch.save(change(load_file(w / "hf" / "model.safetensors")), w / "hf" / "pytorch_model.bin")
        (w / "hf" / "model.safetensors").unlink()

    return damage


def saved(value) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def entry(step: str, key: str, make):
    """Replace a pickled entry of a checkpoint with `make(world)`, appended to its shard."""

    def damage(w: Path) -> None:
        folder = w / step
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        index = next(index for index in metadata.storage_data if index.fqn.startswith(key))
        info = metadata.storage_data[index]
        data = saved(make(w))
        with open(folder / info.relative_path, "ab") as shard:
            info.offset, info.length = shard.tell(), len(data)
            shard.write(data)
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))

    return without_checksums(damage)


def flip_in_entry(step: str, key: str):
    """Flip one bit in the first opcode of this pickled entry."""

    def damage(w: Path) -> None:
        found = pickle.loads((w / step / ".metadata").read_bytes())
        info = next(info for index, info in found.storage_data.items() if index.fqn.startswith(key))
        data = bytearray((w / step / info.relative_path).read_bytes())
        data[data.index(b"\x80\x02", info.offset) + 2] ^= 128
        (w / step / info.relative_path).write_bytes(data)

    return damage


def metadata(step: str, change):
    """Replace the metadata with the result of `change(world, metadata)`, or with the changed object if that is None."""

    def damage(w: Path) -> None:
        path = w / step / ".metadata"
        found = pickle.loads(path.read_bytes())
        path.write_bytes(pickle.dumps(change(w, found) or found))

    return without_checksums(damage)


def documents(name: str, lists, dtype=np.uint16):
    """Write a .bin/.idx pair of these token lists."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    def damage(w: Path) -> None:
        builder = IndexedDatasetBuilder(f"{w / name}.bin", dtype=dtype)
        for tokens in lists:
            builder.add_document(torch.tensor(tokens), [len(tokens)])
        builder.finalize(f"{w / name}.idx")

    return damage
