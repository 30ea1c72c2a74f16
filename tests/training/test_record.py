"""The record of its settings that a run writes to its folder."""

import subprocess
from argparse import Namespace

import pytest
import torch
import yaml

from megatron_cream.checkpoint import save_hook
from megatron_cream.config import describe, parse
from megatron_cream.training import record
from tests.launch import ROOT, TINY, train, write_documents


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


HOOK = "upload --token s3cr3t"


@pytest.mark.parametrize("flags", [["--save-hook", HOOK], [f"--save-hook={HOOK}"], ["--config", "recipe.yaml"]])
def test_secrets_are_not_recorded(tmp_path, monkeypatch, flags):
    """Arguments of --save-hook, passwords in URLs and environment variables named as keys are left out."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(f"save: x\nsave_hook: |\n  {HOOK}\n")
    for name, value in {"NCCL_API_KEY": "s3cr3t", "NCCL_NET": "http://user:s3cr3t@proxy:3128"}.items():
        monkeypatch.setenv(name, value)
    given = ["--save", "x", "--save-interval", "1", *flags, "--data-path", "https://user:s3cr3t@host/data"]
    args = Namespace(save_hook=save_hook.set_command(HOOK), config=flags[1] if flags[0] == "--config" else None, seed=1)
    found = record.describe(Namespace(**vars(args), world_size=1, data_path=[given[-1]]), given)
    assert "s3cr3t" not in str(found) and found["settings"]["save_hook"] == "upload"
    assert found["environment"]["NCCL_NET"] == "http://***@proxy:3128"
    assert "save: x" in found["recipe"] if args.config else "upload" in " ".join(found["command"])
    assert save_hook.get_command() == ["upload", "--token", "s3cr3t"]


def test_a_printed_configuration_hides_the_arguments_of_the_hook(tmp_path):
    write_documents(tmp_path / "documents", documents=20)
    flags = [*TINY, "--train-iters", "1", "--data-path", str(tmp_path / "documents"), "--save", str(tmp_path / "x")]
    args = parse.read([*flags, "--save-interval", "1", "--save-hook", HOOK])
    words = describe.describe(args)
    assert "s3cr3t" not in words and "upload" not in words and "# save_hook: omitted" in words
