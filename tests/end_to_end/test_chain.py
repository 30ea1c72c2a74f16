"""Tests of the whole chain: extend a Hugging Face model once or twice, with the commands that each step advises.

By default a tiny model is extended once. Only the first and the last command are fresh processes there; the others are
forks (tests/forked_commands.py). All commands are fresh processes where the model is extended twice, which .ci/run
does: `-m slow` takes a tiny model, `-m real_model` a pretrained one, from the folder REAL_MODEL that fetch_model.sh
made. CHAIN_PYTHON lists interpreters, separated by colons, that take turns at running the fresh processes.
"""

import json
import os
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from megatron_cream.checkpoint import card
from megatron_cream.evaluation.comparison.measures import format_tokens
from tests.end_to_end.chain import ROOT, Chain, advised
from tests.faults.kill import newest

TINY_MODEL = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.evaluation_models import save_llama
config = save_llama(Path("model")) / "config.json"
config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 256}))
"""
"""Code that saves a Llama with two layers, 256 positions and its own tokenizer."""

OPEN_BY_TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
model, found = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(found[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
GenerationConfig.from_pretrained(sys.argv[1])
text = "def read(self, name):"
tokens = tokenizer(text, return_tensors="pt")
assert text in tokenizer.decode(tokens["input_ids"][0])
assert model(**tokens).logits.isfinite().all()
assert model.generate(**tokens, max_new_tokens=2, do_sample=False).shape[1] == tokens["input_ids"].shape[1] + 2
print("opened by transformers")
"""


@dataclass(frozen=True)
class Model:
    """A model to extend, and the sizes of its runs.

    window: positions of the pretrained model. seq_length: tokens of a training sample. steps: steps of the first run.
    targets: windows of the first and the second training. length: tokens of the evaluations. train: further flags.
    """

    window: int
    seq_length: int
    targets: tuple[int, int]
    steps: int
    length: int
    train: str = ""


TINY = Model(window=256, seq_length=256, targets=(1024, 2048), steps=10, length=512)
REAL = Model(
    window=8192,
    seq_length=512,
    targets=(16384, 24576),
    steps=4,
    length=1024,
    train="--most-recent-k 1",
)


@pytest.mark.parametrize("twice", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["once", "twice"])
def test_tiny_model(tmp_path, twice):
    chain = Chain(tmp_path, forked=not twice)
    chain.run_code(TINY_MODEL, ROOT)
    extend(chain, TINY)
    if twice:
        compare_formats_and_extend_again(chain, TINY)


@pytest.mark.real_model
def test_real_model(tmp_path):
    folder = os.environ.get("REAL_MODEL")
    assert folder, "REAL_MODEL: give the folder that tests/end_to_end/fetch_model.sh made"
    (tmp_path / "model").symlink_to(Path(folder).absolute())
    chain = Chain(tmp_path)
    extend(chain, REAL)
    compare_formats_and_extend_again(chain, REAL)


def extend(chain: Chain, model: Model) -> None:
    """Preprocess, import, train until killed, resume, export and evaluate, with the commands that each step advises."""
    folder = chain.folder
    write_texts(folder / "docs.jsonl")
    tokenizer = "--tokenizer-type HuggingFaceTokenizer --tokenizer-model model".split()
    chain.run("tools/preprocess_data.py", "--input", "docs.jsonl", "--output-prefix", "data", *tokenizer, fresh=True)
    imported = chain.run("tools/convert_hf.py", "import", "--hf-path", "model", "--output", "imported")

    script, *train = [word.replace("DATA", "data") for word in advised(imported)]
    train += [*common_flags(model, model.targets[0]), "--train-iters", str(model.steps)]
    train += "--save run --load run --save-interval 2".split()
    train += f"--long-eval-interval 4 --long-eval-tasks kv --long-eval-lengths {model.length}".split()
    train += "--long-eval-samples 1 --long-eval-share 1".split()
    killed = chain.kill_when(lambda: newest(folder / "run") >= 2, script, *train, ranks=2)
    before = newest(folder / "run")
    assert 2 <= before < model.steps, killed[-3000:]
    resumed = chain.run(script, *train, ranks=2)
    assert steps_of(resumed) == list(range(before + 1, model.steps + 1)), resumed[-3000:]
    evaluated = map(json.loads, (folder / "run" / "long_evaluation.jsonl").read_text().splitlines())
    last = model.steps // 4 * 4
    assert before >= last or last in {line["iteration"] for line in evaluated}

    exported = chain.run(*advised(resumed))
    check_exported(chain, "run", "run-hf", model, model.targets[0])
    find_needle(chain, *advised(exported), length=model.length)


def compare_formats_and_extend_again(chain: Chain, model: Model) -> None:
    """Export the best checkpoint, evaluate both formats, and train the exported folder to a second target."""
    assert_same(chain, "imported", "model")
    export(chain, "run/best", "best", model, model.targets[0])
    find_needle(chain, "tools/evaluate.py", "needle", "--model", "run/best", length=model.length)
    scores = [perplexity(chain, name, model.length) for name in ("run", "run-hf", "model")]
    assert scores[0] == pytest.approx(scores[1], rel=1e-3), "Megatron-Core and transformers give the same model"
    chain.run("tools/evaluate.py", "compare", "model.score", "run-hf.score", "--output", "compared")
    assert f"context {format_tokens(model.length)} |" in (chain.folder / "run-hf" / "README.md").read_text()

    classic = "--format torch --transformer-impl local".split()
    chain.run("tools/convert_hf.py", "import", "--hf-path", "run-hf", "--output", "classic", *classic)
    again = common_flags(model, model.targets[1])
    again += "--pretrained-checkpoint classic --train-iters 2 --save further --save-hf ended".split()
    chain.run("pretrain_cream.py", *again, ranks=2)
    export(chain, "further", "exported", model, model.targets[1])
    assert_same(chain, "further", "ended")


def write_texts(file: Path) -> None:
    """Write documents longer than a sample, taken from Python's standard library."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:25]
    text = "".join(source.read_text(encoding="utf-8", errors="replace") for source in sources)
    file.write_text("".join(json.dumps({"text": text[i * 9000 : i * 9000 + 9000]}) + "\n" for i in range(60)))


def common_flags(model: Model, target: int) -> list[str]:
    flags = f"--data-path data --seq-length {model.seq_length} --target-length {target} --rope-scaling-type yarn"
    flags += " --micro-batch-size 1 --global-batch-size 2 --lr 1e-5 --split 90,10,0 --log-interval 1"
    return f"{flags} --eval-iters 1 --eval-interval 1000 --use-distributed-optimizer {model.train}".split()


def steps_of(log: str) -> list[int]:
    return [int(step) for step in re.findall(r"iteration +(\d+)/", log)]


def find_needle(chain: Chain, *command: str, length: int) -> None:
    """Run an evaluation with one needle at one length."""
    flags = f"--min-length {length} --max-length {length} --length-steps 1 --depth-steps 1 --samples 1 --overwrite"
    chain.run(*command, *flags.split(), "--output", "needle", fresh=True)
    assert results(chain, "needle")["examples"] == 1


def export(chain: Chain, checkpoint: str, name: str, model: Model, target: int) -> None:
    """Export a checkpoint and check the folder."""
    chain.run("tools/convert_hf.py", "export", "--checkpoint", checkpoint, "--hf-path", name)
    check_exported(chain, checkpoint, name, model, target)


def check_exported(chain: Chain, checkpoint: str, name: str, model: Model, target: int) -> None:
    """Verify an exported folder, and let transformers open it."""
    assert_same(chain, checkpoint, name)
    assert "opened by transformers" in chain.run_code(OPEN_BY_TRANSFORMERS, name)
    read = ModelCard.load(chain.folder / name / "README.md")
    assert read.data.library_name == "transformers" and f"context window of {target:,} tokens" in read.text
    assert "data.bin" in read.text and card.has_place_for_results(chain.folder / name)
    config = json.loads((chain.folder / name / "config.json").read_text())
    rope = config.get("rope_parameters") or config["rope_scaling"]
    assert config["max_position_embeddings"] == target and rope["rope_type"] == "yarn"
    assert (rope["factor"], rope["original_max_position_embeddings"]) == (target / model.window, model.window)


def assert_same(chain: Chain, checkpoint: str, name: str) -> None:
    said = chain.run("tools/convert_hf.py", "verify", "--checkpoint", checkpoint, "--hf-path", name)
    equal, count = re.search(r"tensors: (\d+) of (\d+) equal", said).groups()
    assert equal == count and "logits: " in said, said


def perplexity(chain: Chain, name: str, length: int) -> float:
    flags = f"perplexity --dataset docs.jsonl --lengths {length} --documents 2 --model {name} --output {name}.score"
    chain.run("tools/evaluate.py", *flags.split())
    return results(chain, f"{name}.score")[str(length)]["perplexity"]


def results(chain: Chain, name: str) -> dict:
    return json.loads((chain.folder / name / "summary.json").read_text())["results"]
