"""The commands that a tool prints after `Next:` run as printed, each in processes of its own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bad_inputs import free_port
from tests.evaluation_models import save_llama
from tests.forked_commands import environment
from tests.launch import ROOT, write_documents
from tests.processes import ending_with_test

pytestmark = pytest.mark.slow

WINDOW = 128
RECIPE = f"""\
load_hf: hf
data_path: [documents]
split: 90,10,0
seq_length: {WINDOW}
target_length: {4 * WINDOW}
rope_scaling_type: yarn
train_iters: 1
global_batch_size: 4
micro_batch_size: 1
lr: 1.0e-4
eval_iters: 1
save: trained
"""
RUN = f"--load-hf hf --data-path documents --seq-length {WINDOW} --target-length {4 * WINDOW} --rope-scaling-type yarn "
RUN += "--micro-batch-size 1 --global-batch-size 2 --train-iters 1 --lr 1e-4 --split 90,10,0 --eval-iters 1"
ONE_STEP = "--train-iters 1 --global-batch-size 1 --eval-iters 1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with a window of 128 tokens, and documents longer than it."""
    folder = tmp_path_factory.mktemp("printed")
    config = save_llama(folder / "hf") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": WINDOW}))
    write_documents(folder / "documents", shortest=200)
    (folder / "extend.yaml").write_text(RECIPE)
    return folder


def run(folder: Path, command: str) -> str:
    """Run a command of a shell, check that it succeeds, and return what it prints."""
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    offline = {"HF_HUB_OFFLINE": "1", "PET_MASTER_PORT": str(free_port())}  # torchrun's --master-port
    done = subprocess.run(
        ending_with_test(["bash", "-c", command]),
        cwd=folder,
        env=environment() | offline | {"PATH": programs},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def printed(said: str) -> str:
    """Return the command of the last line."""
    found = re.fullmatch(r"Next: (.+)", said.splitlines()[-1])
    assert found, said[-2000:]
    return found[1]


def test_plan_of_a_complete_recipe(folder):
    run(folder, printed(run(folder, f"python {ROOT}/tools/plan.py --config extend.yaml --gpus 1")))
    assert (folder / "trained" / "latest_checkpointed_iteration.txt").read_text().strip() == "1"


def test_import_for_one_layout(folder):
    layout = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"
    said = run(folder, f"python {ROOT}/tools/convert_hf.py import --hf-path hf --output parts --format torch {layout}")
    command = printed(said).replace(" DATA ", " documents ")
    assert layout in command and "--nproc_per_node=4" in command
    said = run(folder, f"{command} {ONE_STEP}")
    assert "load_return" not in said, "Megatron says so if it has not found every tensor"


def test_training_and_export_of_an_adapter(folder):
    flags = f"{RUN} --lora-rank 4 --adapter --save-hf adapter --save run"
    said = run(folder, f"torchrun --nproc_per_node=1 {ROOT}/pretrain_cream.py {flags}")
    assert (folder / "adapter" / "adapter_config.json").is_file()
    assert f"--max-length {4 * WINDOW}" in printed(said)
    few = "--length-steps 1 --depth-steps 1 --samples 1"
    assert "summary.json" in run(folder, f"{printed(said)} {few} --output needle")
    export = f"python {ROOT}/tools/convert_hf.py export --checkpoint run --adapter --hf-path"
    said = run(folder, f"{export} again --ckpt-step 1")
    assert "--ckpt-step 1" in printed(said)
    assert "summary.json" in run(folder, f"{printed(said)} {few} --output needle-again")
    (folder / "hf").rename(folder / "moved")
    try:
        run(folder, printed(run(folder, f"{export} moved-adapter --base moved")))
    finally:
        (folder / "moved").rename(folder / "hf")
    assert (folder / "run-hf" / "model.safetensors").is_file()


def test_an_adapter_without_a_checkpoint(folder):
    """No tool evaluates it, so the last line names the page that says how to use it."""
    said = run(
        folder, f"torchrun --nproc_per_node=1 {ROOT}/pretrain_cream.py {RUN} --lora-rank 4 --adapter --save-hf lone"
    )
    assert (
        "lone: adapter for 512 positions; its README.md shows how to load it with PEFT" in said and "Next:" not in said
    )
    assert "PeftModel.from_pretrained" in (folder / "lone" / "README.md").read_text()
