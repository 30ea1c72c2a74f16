"""What a run leaves of itself in its folder."""

import subprocess

import torch
import yaml

from tests.launch import ROOT, train, write_documents


def test_a_run_is_recorded_at_each_start(tmp_path, monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG_SUBSYS", "INIT")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("clip_grad: 0.75\n")
    flags = ["--data-path", write_documents(tmp_path / "documents", documents=20), "--split", "90,10,0"]
    flags += ["--config", recipe, "--save", tmp_path / "run", "--load", tmp_path / "run"]
    flags += ["--override-opt-param-scheduler"]
    train(2, tmp_path / "tb1", *flags, "--train-iters", 1)
    train(2, tmp_path / "tb2", *flags, "--train-iters", 2)
    first, second = (yaml.safe_load(path.read_text()) for path in sorted((tmp_path / "run" / "runs").iterdir()))
    assert first["recipe"] == "clip_grad: 0.75\n" and first["settings"]["clip_grad"] == 0.75
    assert (first["settings"]["train_iters"], second["settings"]["train_iters"]) == (1, 2)
    assert second["command"][0] == "pretrain_cream.py" and second["command"][-1] == "2"
    assert first["seed"] == 7 and first["machine"]["ranks"] == 2
    assert torch.__version__.startswith(first["versions"]["torch"]) and first["versions"]["megatron-core"]
    assert first["environment"]["NCCL_DEBUG_SUBSYS"] == "INIT" and "HOME" not in first["environment"]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert (first["commit"] or {"id": ""})["id"] == head
