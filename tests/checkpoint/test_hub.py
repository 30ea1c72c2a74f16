"""Models given by name: requests to a Hub on this machine, and the cache without a Hub."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.evaluation_models import save_tokenizer
from tests.hf_models import save_model
from tests.launch import ROOT

NAME, COMMIT = "org/model", "0123456789abcdef" * 2 + "01234567"


class Hub:
    """One repository, as huggingface_hub asks for it.

    Attributes:
        fetched: names of the files that were sent.
    """

    def __init__(self, folder: Path):
        self.fetched: list[str] = []
        hub, names = self, sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_HEAD(self):
                self.do_GET(body=False)

            def do_GET(self, body=True):
                path = self.path.split("?")[0]
                if path.startswith(f"/api/models/{NAME}"):
                    files = [
                        {"rfilename": name, "size": (folder / name).stat().st_size, "blobId": "0"} for name in names
                    ]
                    tree = [
                        {"type": "file", "path": file["rfilename"], "size": file["size"], "oid": "0"} for file in files
                    ]
                    info = {"id": NAME, "modelId": NAME, "sha": COMMIT, "siblings": files, "private": False}
                    answer = tree if "/tree/" in path else info
                    return self.send(json.dumps(answer).encode(), body, {"Content-Type": "application/json"})
                name = path.removeprefix(f"/{NAME}/resolve/").partition("/")[2]
                if name not in names:
                    return self.send(b"{}", body, {"X-Error-Code": "EntryNotFound"}, status=404)
                data = (folder / name).read_bytes()
                if body:
                    hub.fetched.append(name)
                self.send(data, body, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT})

            def send(self, data, body, headers, status=200):
                self.send_response(status)
                for key, value in (headers | {"Content-Length": len(data)}).items():
                    self.send_header(key, str(value))
                self.end_headers()
                if body:
                    self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """The weights in three formats, as in Llama-2-7b-chat-hf, and files that would change the loaded model."""
    folder = tmp_path_factory.mktemp("repository")
    save_model(folder, "llama-mha", shard_size="200KB", vocab_size=2048)
    save_tokenizer(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    names = {
        name: name.replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        for name in index["weight_map"].values()
    }
    index["weight_map"] = {tensor: names[file] for tensor, file in index["weight_map"].items()}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "original").mkdir()
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(
        "{% generation %}{{ messages }}{% endgeneration %}"
    )
    others = [*names.values(), "original/consolidated.00.pth", "consolidated.00.pth", "consolidated.safetensors"]
    for name in [*others, "model.fp16.safetensors", "adapter_config.json", "params.json", "modeling.py", "picture.png"]:
        (folder / name).write_bytes(b"{}")
    return folder


def import_by_name(endpoint: str, cache: Path, output: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "PYTHONPATH": str(ROOT)}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "no_proxy": "127.0.0.1"}
    command = [sys.executable, "tools/convert_hf.py", "import", "--hf-path", NAME, "--output", str(output)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_weights_are_fetched_once(repository, tmp_path):
    hub = Hub(repository)
    ended = import_by_name(hub.endpoint, tmp_path / "cache", tmp_path / "ckpt")
    hub.close()
    assert ended.returncode == 0, ended.stderr
    shards = {file.name for file in repository.glob("model-*.safetensors")}
    assert len(shards) > 1
    assert set(hub.fetched) == shards | {
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
    }
    assert len(hub.fetched) == len(set(hub.fetched))
    assert (tmp_path / "ckpt/hf/additional_chat_templates/tool_use.jinja").is_file()

    # Without the Hub, the cached files are found.
    ended = import_by_name(hub.endpoint, tmp_path / "cache", tmp_path / "again")
    assert ended.returncode == 0, ended.stderr


@pytest.mark.slow
def test_a_name_that_is_nowhere_prints_one_line(tmp_path):
    ended = import_by_name("http://127.0.0.1:9", tmp_path / "empty", tmp_path / "none")
    line = ended.stderr.strip().splitlines()[-1]
    assert ended.returncode == 2 and f"--hf-path {NAME}: no such folder, and cannot be downloaded from the" in line


@pytest.mark.slow
@pytest.mark.parametrize("form", ["one file", "bin"])
def test_other_weight_formats_are_fetched(repository, tmp_path, form):
    """A single file is preferred to shards and .bin; .bin is fetched if there is nothing else."""
    import torch

    folder = shutil.copytree(repository, tmp_path / "repository")
    state = {name: t for file in folder.glob("model-*.safetensors") for name, t in load_file(file).items()}
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    if form == "bin":
        (folder / "pytorch_model.bin.index.json").unlink()
        torch.save(state, folder / "pytorch_model.bin")
        expected = "pytorch_model.bin"
    else:
        from safetensors.torch import save_file

        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        expected = "model.safetensors"
    hub = Hub(folder)
    ended = import_by_name(hub.endpoint, tmp_path / "cache", tmp_path / "ckpt")
    hub.close()
    assert ended.returncode == 0, ended.stderr
    assert {name for name in hub.fetched if name.endswith((".bin", ".safetensors", ".pth"))} == {expected}
