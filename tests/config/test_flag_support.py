"""Tests that every flag of --help is classified once: tested, passed on untested, or rejected with a reason.

Runs with flags that no other test uses are here too. Some must leave the losses unchanged, the others must not.
"""

import argparse
import re
import sys

import pytest

from megatron_cream.common.errors import UsageError
from megatron_cream.config import flag_support, parse
from megatron_cream.config.parser import build_parser
from tests.launch import ROOT, train, write_documents

PARSER = build_parser(recipe=False)
SORTED = flag_support.sort_flags(PARSER)
ACTIONS = {flag_support.name_of(action): action for action in PARSER._actions}


def test_every_flag_is_classified_once():
    assert SORTED.keys() == ACTIONS.keys() - {"-h"}
    assert {support.kind for support in SORTED.values()} == {"tested", "untested", "rejected"}


def test_an_unclassified_flag_is_detected():
    parser = build_parser(recipe=False)
    parser.add_argument("--new-flag")
    with pytest.raises(ValueError, match="not sorted: new-flag"):
        flag_support.sort_flags(parser)


@pytest.mark.parametrize("file", flag_support.TESTED)
def test_the_named_test_uses_the_flag(file):
    text = (ROOT / "tests" / file).read_text()
    names = [name for name, support in SORTED.items() if support == ("tested", file)]
    absent = [name for name in names if not _is_given(ACTIONS[name], text)]
    assert names and not absent


def _is_given(action: argparse.Action, text: str) -> bool:
    """Return whether the source of a test contains the flag or the name of its variable."""
    words = [re.escape(option) for option in action.option_strings] + [action.dest]
    return re.search(rf"(?<![\w-])({'|'.join(words)})(?![\w-])", text) is not None


def _another_value(action: argparse.Action) -> list[str]:
    """Return the words after the flag that give it a value other than its default."""
    if action.nargs == 0:
        return []
    if action.choices:
        return [next(str(choice) for choice in action.choices if choice != PARSER.get_default(action.dest))]
    if action.dest == "window_size":
        return ["2,0"]
    number = "5" if action.default == 3 else "3"
    return [number] * (action.nargs if isinstance(action.nargs, int) else 1)


@pytest.mark.parametrize("name", [name for name, support in SORTED.items() if support.kind == "rejected"])
def test_a_rejected_flag_prints_its_reason(name):
    action = ACTIONS[name]
    with pytest.raises(UsageError) as caught:
        PARSER.parse_args([action.option_strings[0], *_another_value(action)])
    line = str(caught.value)
    assert line.startswith(action.option_strings[0]) and line.endswith(f"not supported here; {SORTED[name].note}")


def test_a_rejected_flag_at_its_default_changes_nothing():
    assert PARSER.parse_args(["--moe-token-dispatcher-type", "allgather"]) == PARSER.parse_args([])


def test_a_recipe_cannot_set_a_rejected_flag(tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("num_experts: 8\n")
    monkeypatch.setattr(sys, "argv", ["pretrain_cream.py"])
    with pytest.raises(UsageError, match="--num-experts 8: not supported here; this project's Llama is dense"):
        parse.read(["--config", str(recipe)])


def test_the_page_is_up_to_date():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from make_flags import page
    finally:
        sys.path.pop(0)
    assert (ROOT / "docs" / "flags.md").read_text() == page(), "run: python docs/make_flags.py"


# ---------------------------------------------------------------- runs

STEPS = ["--train-iters", 2]
# name: (ranks, flags that leave every loss unchanged)
SAME = {
    "one-rank": (
        1,
        "--no-initialization --deterministic-mode --no-masked-softmax-fusion --no-bias-gelu-fusion "
        "--no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion --no-persist-layer-norm "
        "--no-gradient-accumulation-fusion --mlp-chunks-for-training 2 --recompute-activations --kv-channels 8 "
        "--accumulate-allreduce-grads-in-fp32 --position-embedding-type rope --use-mcore-models --enable-experimental "
        "--manual-gc --manual-gc-interval 1 --no-manual-gc-eval --train-sync-interval 1 --empty-unused-memory-level 2 "
        "--dataloader-type single --no-mmap-bin-files --num-dataset-builder-threads 2 --eod-mask-loss "
        "--no-create-attention-mask-in-dataloader --exit-signal-handler-for-dataloader "
        "--log-params-norm --log-throughput --log-num-zeros-in-grad --log-timers-to-tensorboard "
        "--no-log-loss-scale-to-tensorboard --log-validation-ppl-to-tensorboard --log-world-size-to-tensorboard "
        "--timing-log-level 2 --timing-log-option all --no-barrier-with-level-1-timing --tensorboard-queue-size 5 "
        "--tensorboard-log-interval 1 --logging-level 20 --no-one-logger --disable-jit-fuser --disable-msc "
        "--no-check-for-nan-in-loss-and-grad --exit-duration-in-mins 60 --start-eval-at-iter 1 --eval-interval 1 "
        "--eval-global-batch-size 4 --decrease-batch-size-if-needed --swiglu --untie-embeddings-and-output-weights "
        "--exit-signal-handler --log-interval 1 --vocab-size 100",
    ),
    "fused-cross-entropy": (1, "--cross-entropy-loss-fusion --cross-entropy-fusion-impl native"),
    "rerun": (1, "--nan-policy rerun --check-for-large-grads --check-for-spiky-loss"),
    "two-ranks": (
        2,
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 1000 "
        "--use-tp-pp-dp-mapping --no-align-grad-reduce --check-weight-hash-across-dp-replicas-interval 1 "
        "--ddp-pad-buckets-for-high-nccl-busbw",
    ),
    "stages-by-layout": (2, "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et|tL"),
    "stages-by-number": (
        2,
        "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1 --decoder-last-pipeline-num-layers 1",
    ),
    "stages-with-ends": (
        2,
        "--pipeline-model-parallel-size 2 --account-for-embedding-in-pipeline-split "
        "--account-for-loss-in-pipeline-split",
    ),
}
# name: training flags that change the second loss
OTHER = {
    "dropout": "--hidden-dropout 0.1 --attention-dropout 0.1 --attention-backend local",
    "sgd": "--optimizer sgd --sgd-momentum 0.8",
    "adam": "--adam-beta1 0.5 --adam-beta2 0.9 --adam-eps 0.1 --weight-decay 0.5 --clip-grad 0.1",
    "schedule": (
        "--lr 2e-2 --lr-decay-style WSD --lr-decay-iters 2 --lr-wsd-decay-style linear --lr-wsd-decay-iters 1 "
        "--lr-warmup-iters 1 --lr-warmup-init 1e-4 --min-lr 1e-3 --decoupled-lr 5e-3 --decoupled-min-lr 1e-4 "
        "--start-weight-decay 0.1 --end-weight-decay 0.2 --weight-decay-incr-style linear"
    ),
    "warm-up": "--lr-warmup-fraction 0.9 --lr-decay-style cosine",
    "order": "--dataloader-type cyclic",
    "positions": (
        "--position-sampler mix --position-mix cream=1,pose=1 --cream-middle uniform --pose-chunks 3 "
        "--cream-relativity 0.2"
    ),
}
# Model flags, for a run without a checkpoint.
SHAPES = (
    "--norm-epsilon 1e-3 --add-qkv-bias --qk-layernorm --apply-wd-to-qk-layernorm --init-method-std 0.05 "
    "--embedding-init-method-std 0.5 --rotary-base 500000"
)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """(folder, data flags, flags that start from a checkpoint, losses of one rank)."""
    folder = tmp_path_factory.mktemp("flags")
    data = ["--data-path", write_documents(folder / "documents", documents=20), "--split", "80,20,0"]
    once = ["--train-iters", 1, "--eval-iters", 0, "--save", folder / "start", "--save-interval", 1]
    train(1, folder / "tb0", *data, *once)
    loaded = [*data, "--pretrained-checkpoint", folder / "start"]
    return folder, data, loaded, train(1, folder / "tb1", *loaded, *STEPS)


@pytest.mark.parametrize("name", SAME)
def test_same_losses(start, name):
    folder, _, loaded, reference = start
    ranks, flags = SAME[name]
    losses = train(ranks, folder / name, *loaded, *STEPS, *flags.split())
    assert losses == pytest.approx(reference, rel=1e-5 if ranks == 1 and "fused" not in name else 1e-4)


@pytest.mark.parametrize("name", OTHER)
def test_other_losses(start, name):
    folder, _, loaded, reference = start
    losses = train(1, folder / name, *loaded, "--train-iters", 2, *OTHER[name].split())
    assert losses.keys() == reference.keys() and abs(losses[2] - reference[2]) > 1e-5


def test_another_model(start):
    folder, data, _, reference = start
    losses = train(1, folder / "shapes", *data, *STEPS, *SHAPES.split())
    assert losses.keys() == reference.keys() and losses != reference


def test_a_run_counted_in_samples_equals_one_in_steps(start):
    folder, _, loaded, _ = start
    schedule = ["--lr-warmup-iters", 1, "--lr-decay-iters", 2]
    reference = train(1, folder / "steps", *loaded, *STEPS, *schedule)
    samples = ["--train-samples", 16, "--lr-decay-samples", 16, "--lr-warmup-samples", 8]
    assert train(1, folder / "samples", *loaded, *samples) == reference


def test_skipped_steps(start):
    folder, _, loaded, reference = start
    assert train(1, folder / "exit", *loaded, *STEPS, "--exit-interval", 1) == {1: reference[1]}
    losses = train(1, folder / "skip", *loaded, *STEPS, "--iterations-to-skip", 1)
    assert losses.keys() == {2} and losses[2] != reference[2]


def test_flags_that_tests_run_are_listed_as_tested():
    """No flag of the runs above is listed as untested."""
    given = " ".join([flags for _, flags in SAME.values()] + [*OTHER.values(), SHAPES]).split()
    names = {word[2:] for word in given if word.startswith("--")}
    assert not [name for name in names if SORTED[name].kind != "tested"]
