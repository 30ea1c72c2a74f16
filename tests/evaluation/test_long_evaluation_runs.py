"""Long evaluation in real runs: equal scores at every layout, and a best checkpoint that survives SIGKILL."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from megatron_cream.checkpoint.best import BestCheckpoint
from megatron_cream.checkpoint.convert import export_hf
from megatron_cream.checkpoint.megatron_folder import MegatronCheckpoint
from megatron_cream.common.errors import UsageError
from megatron_cream.data import embedded
from megatron_cream.data.tokenizers import load_tokenizer
from megatron_cream.evaluation.models.tokenizer import TrainingTokenizer
from megatron_cream.evaluation.tasks import kv
from tests.faults.kill import compare, newest, ranks, ranks_of_folder, wait_for, writing
from tests.forked_commands import FRESH_TORCHRUN
from tests.launch import ROOT, TINY, torchrun, write_documents
from tests.processes import ending_with_test

# Half of the second tensor-parallel rank's vocabulary is padding.
MODEL = (
    "--split 80,20,0 --num-layers 4 --hidden-size 64 --ffn-hidden-size 172 --num-attention-heads 4 --seq-length 128 "
    "--target-length 1024 --rope-scaling-type linear --micro-batch-size 4 --global-batch-size 8 --fp32 --seed 7 "
    "--num-workers 0 --eval-iters 1 --make-vocab-size-divisible-by 384 "
    "--long-eval-interval 20 --long-eval-tasks needle,kv,perplexity --long-eval-lengths 512 1024 --long-eval-samples 1"
).split()


def lines(save: Path) -> list[dict]:
    return [json.loads(line) for line in (save / "long_evaluation.jsonl").read_text().splitlines()]


def run(count: int, *flags) -> str:
    """Train on `count` ranks and return the output."""
    result = torchrun(count, *flags)
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list:
    """Write documents of keys and values, and return the data flags."""
    prefix, model = tmp_path_factory.mktemp("data") / "keys", embedded.prepare().tokenizer_model
    tokenizer = TrainingTokenizer(load_tokenizer("SentencePieceTokenizer", model))
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for example in kv.examples(tokenizer, keys=[30], gold=[0], seed=1, per_cell=20):
        tokens = tokenizer.encode_prompt(example.prompt)
        builder.add_document(torch.tensor(tokens), [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return ["--data-path", prefix, "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Train with long evaluation on one rank; return the folder and the output."""
    folder = tmp_path_factory.mktemp("trained")
    flags = ["--train-iters", 40, "--lr", 5e-3, "--save", folder / "save", "--tensorboard-dir", folder / "tb"]
    words = run(1, *MODEL, *data, *flags, "--console", "progress")
    return folder, words


def test_scores_are_printed_recorded_and_logged(trained):
    folder, words = trained
    said = [line for line in words.splitlines() if line.startswith("long evaluation")]
    assert len(said) == 2 and "step 20" in said[0] and "step 40" in said[1] and "% of the time so far" in said[1]
    first, last = lines(folder / "save")
    assert (first["iteration"], last["iteration"]) == (20, 40) and first["best"]
    assert 0 < last["share"] < 1 and last["seconds"] > 0
    # The model has learned something: the positions of the dashes in the values.
    assert 0.05 < last["kv"]["512"]["tokens"] < 1 and last["perplexity"]["1024"] < 200
    board = EventAccumulator(str(folder / "tb")).Reload()
    for name, value in {
        "kv tokens/1024": last["kv"]["1024"]["tokens"],
        "needle/512": last["needle"]["512"]["accuracy"],
        "perplexity/512": last["perplexity"]["512"],
        "mean accuracy": last["score"]["value"],
    }.items():
        events = board.Scalars(f"long evaluation/{name}")
        assert [event.step for event in events] == [20, 40] and events[-1].value == pytest.approx(value)


def test_the_best_checkpoint_gives_equal_scores_at_every_layout(trained, data, tmp_path):
    """The layouts are TP 2 x interleaved PP 2 with sequence parallelism, and DP 2; the export works too."""
    save = trained[0] / "save"
    best = save / "best"
    one = next(line for line in lines(save) if line["iteration"] == newest(best))
    pipeline = "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"
    for name, count, extra in [
        ("tp2-pp2", 4, f"--tensor-model-parallel-size 2 --sequence-parallel {pipeline}"),
        ("dp2", 2, "--use-distributed-optimizer"),
    ]:
        words = run(count, *MODEL, *data, "--load", best, "--skip-train", "--save", tmp_path / name, *extra.split())
        assert words.count("long evaluation | ") == 1
        (other,) = lines(tmp_path / name)
        assert other["iteration"] == one["iteration"] and "best" not in (tmp_path / name).iterdir()
        assert other["perplexity"] == pytest.approx(one["perplexity"], rel=1e-5), name
        for task in ("needle", "kv"):
            for length in ("512", "1024"):
                assert other[task][length] == pytest.approx(one[task][length], rel=1e-5), (name, task, length)
    export_hf(MegatronCheckpoint(best), tmp_path / "hf")
    assert (tmp_path / "hf" / "tokenizer.model").is_file()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").config.max_position_embeddings == 1024


def test_a_foreign_folder_is_not_overwritten(trained, tmp_path):
    save = tmp_path / "save"
    shutil.copytree(trained[0] / "save", save)
    settings = dict(tasks="needle,kv,perplexity", lengths=[512, 1024], samples=1, best="accuracy")
    best = BestCheckpoint(save, settings, clean=True)
    assert best.step == newest(save / "best") and best.score["name"] == "accuracy"
    with pytest.raises(UsageError, match="scored by another evaluation .* not comparable with .*lengths .1024."):
        BestCheckpoint(save, settings | {"lengths": [1024]}, clean=True)
    shutil.rmtree(save / "best")
    shutil.copytree(trained[0] / "save", save / "best", ignore=shutil.ignore_patterns("best"))
    with pytest.raises(UsageError, match="without a long-evaluation score. Move it away"):
        BestCheckpoint(save, settings, clean=True)
    assert newest(save / "best") == 40


def test_a_kill_during_best_leaves_the_previous_one(tmp_path):
    """Every step is evaluated and saved; a resumed run with --async-save knows the earlier best score."""
    save, best = tmp_path / "save", tmp_path / "save" / "best"
    documents = write_documents(tmp_path / "documents")
    flags = [*TINY, "--fp32", "--data-path", documents, "--split", "50,50,0", "--train-iters", 8]
    flags += ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
    flags += ["--save", save, "--load", save, "--save-interval", 1, "--console", "progress"]
    flags += ["--long-eval-interval", 1, "--long-eval-tasks", "perplexity", "--long-eval-share", 1]
    command = [*FRESH_TORCHRUN, "--nproc_per_node=2", str(ROOT / "pretrain_cream.py"), *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(ending_with_test(command), cwd=ROOT, env=environment, start_new_session=True)
    wait_for(lambda: newest(best) >= 2 and writing(best, newest(best)), process)
    for victim in [psutil.Process(process.pid), *ranks(process)]:
        victim.send_signal(signal.SIGKILL)
    process.wait()
    for rest in ranks_of_folder(save):
        rest.kill()
    kept = MegatronCheckpoint(best).step
    assert kept >= 2
    compare(best, save, kept)

    words = run(2, *flags, "--async-save")
    first = next(line for line in words.splitlines() if line.startswith("long evaluation | step"))
    known = next(line for line in reversed(lines(save)) if line["iteration"] == kept)
    assert f"perplexity {known['score']['value']:.2f} at step {kept}" in first
    found = min(lines(save), key=lambda line: (line["score"]["value"], line["iteration"]))
    assert newest(best) == found["iteration"] > kept
    assert [path.name for path in best.glob("iter_*")] == [f"iter_{found['iteration']:07d}"]
    compare(best, save, found["iteration"])


def test_nan_weights_end_an_evaluation_with_one_line(trained, data, tmp_path):
    export_hf(MegatronCheckpoint(trained[0] / "save"), tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    (tmp_path / "hf" / "integrity.json").unlink()
    without = MODEL[: MODEL.index("--long-eval-interval")]
    for flags in (MODEL, [*without, "--eval-lengths", 128, 512]):
        result = torchrun(2, *flags, *data, "--load-hf", tmp_path / "hf", "--skip-train", "--save", tmp_path / "save")
        said = [line for line in result.stderr.splitlines() if "error: --load-hf" in line]
        assert result.returncode and len(said) == 1, result.stderr[-3000:]
        assert f"error: --load-hf {tmp_path / 'hf'}: decoder.final_layernorm.weight holds NaN" in said[0]
        assert not list(tmp_path.glob("save/*.jsonl"))
