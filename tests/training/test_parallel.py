"""Every parallel layout gives equal losses: real torchrun ranks over gloo, in float32.

All layouts start from one checkpoint, written by one rank, so each also tests that it loads at its layout.
"""

import re

import pytest

from tests.launch import ROOT, TINY, relative_error, torchrun, train, write_documents
from tests.selection import slow_but

STEPS = 10
LAYOUTS = {
    "dp2": (2, "--use-distributed-optimizer"),
    "tp2": (2, "--tensor-model-parallel-size 2 --eval-micro-batch-size 1"),
    "tp2-sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "tp2-sp-full-recompute": (
        2,
        "--tensor-model-parallel-size 2 --sequence-parallel --recompute-granularity full "
        "--recompute-method uniform --recompute-num-layers 1",
    ),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "pp2-selective-recompute": (
        2,
        "--pipeline-model-parallel-size 2 --recompute-granularity selective --recompute-modules core_attn mlp",
    ),
    "cp4-selective-recompute": (
        4,
        "--context-parallel-size 4 --recompute-granularity selective --recompute-modules core_attn mlp",
    ),
    "cp2-overlap": (
        2,
        "--context-parallel-size 2 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather "
        "--ddp-num-buckets 4",
    ),
    "one-rank-local-attention": (1, "--attention-backend local"),
    "dp2-sdpa": (2, "--attention-backend sdpa"),
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Write data and a checkpoint; return the folder, the flags and the losses of one rank."""
    folder = tmp_path_factory.mktemp("parallel")
    data = ["--data-path", write_documents(folder / "documents"), "--split", "90,10,0"]
    # Skip evaluation, though there is data for it.
    once = ["--train-iters", 1, "--eval-iters", 0]
    train(1, folder / "tb0", *data, *once, "--save", folder / "start", "--save-interval", 1)
    flags = [*data, "--train-iters", STEPS, "--pretrained-checkpoint", folder / "start"]
    return folder, flags, train(1, folder / "tb1", *flags)


def test_one_rank_learns(start):
    losses = start[2]
    assert list(losses) == list(range(1, STEPS + 1))
    assert losses[STEPS] < losses[1] - 0.05


@pytest.mark.parametrize("layout", slow_but(LAYOUTS, "dp2", "tp2-sp-full-recompute", "pp2", "cp2-overlap"))
def test_same_losses(start, layout):
    folder, flags, reference = start
    ranks, extra = LAYOUTS[layout]
    losses = train(ranks, folder / layout, *flags, *extra.split())
    assert relative_error(losses, reference) < 1e-5


@pytest.mark.slow
def test_packed_short_texts_under_every_kind_of_parallelism(start):
    """Documents cross the borders of context-parallel ranks; micro-batches mix packed and long samples."""
    folder, flags, _ = start
    prefix = write_documents(folder / "short", documents=200, shortest=2, longest=97)
    short = ["--short-data-path", prefix, "--short-share", 0.5, "--long-min-tokens", 300, "--train-iters", 3]
    reference = train(1, folder / "short-one", *flags, *short)
    layout = "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2"
    losses = train(8, folder / "short-eight", *flags, *short, *layout.split(), "--context-parallel-size", 2)
    assert relative_error(losses, reference) < 1e-5


@pytest.mark.slow
def test_full_length_positions_under_context_parallelism(start):
    """Training at the full target length, which CREAM avoids."""
    folder, flags, _ = start
    full = "--position-sampler full --seq-length 384 --train-iters 3".split()
    reference = train(1, folder / "full", *flags, *full)
    losses = train(2, folder / "full-cp2", *flags, *full, "--context-parallel-size", 2)
    assert relative_error(losses, reference) < 1e-5


@pytest.mark.slow
def test_resume(start):
    """A run stopped at step 5 resumes: bit-identical at its layout, within 1e-5 at others."""
    folder, flags, _ = start
    saved = folder / "saved"
    layout = ["--use-distributed-optimizer"]
    whole = train(2, folder / "whole", *flags, *layout, "--save", saved, "--save-interval", 5)

    def resume(ranks, name, *extra):
        # --load takes precedence over the --pretrained-checkpoint in the flags.
        return train(ranks, folder / name, *flags, "--load", saved, "--ckpt-step", 5, *extra)

    same = resume(2, "same", *layout)
    assert list(same) == [6, 7, 8, 9, 10]
    assert same == {step: whole[step] for step in same}, "not bit-equal at the same layout"
    rest = {step: whole[step] for step in same}
    for name, ranks, extra in [
        ("to-tp2", 2, "--tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer"),
        ("to-pp2", 2, "--pipeline-model-parallel-size 2 --use-distributed-optimizer"),
        ("to-one", 1, "--use-distributed-optimizer"),
    ]:
        assert relative_error(resume(ranks, name, *extra.split()), rest) < 1e-5, name


@pytest.mark.slow
def test_resume_from_an_optimizer_that_was_not_gathered(start, tmp_path):
    """The flag is the one advised when memory is too small to gather the optimizer on saving."""
    layout = ["--use-distributed-optimizer", "--no-dist-ckpt-optim-fully-reshardable", "--train-iters", 4]
    whole = train(2, tmp_path / "whole", *start[1], *layout, "--save", tmp_path / "saved", "--save-interval", 2)
    rest = train(2, tmp_path / "rest", *start[1], *layout, "--load", tmp_path / "saved", "--ckpt-step", 2)
    assert rest == {step: whole[step] for step in (3, 4)}


@pytest.mark.slow
def test_the_step_line_has_the_memory_of_the_fullest_stage(start, tmp_path):
    """The last stage prints the memory of the first stage, which keeps the most micro-batches."""
    job = tmp_path / "job.py"
    job.write_text(
        "import os, sys\n"
        "held = b'x' * 2**30 if os.environ['RANK'] == '0' else b''\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import pretrain_cream\n"
        "if __name__ == '__main__':\n"
        "    sys.exit(pretrain_cream.main())\n"
    )
    result = torchrun(2, *TINY, "--fp32", *start[1], "--pipeline-model-parallel-size", 2, script=job)
    assert result.returncode == 0, result.stderr[-3000:]
    shown = [float(gib) for gib in re.findall(r"^step .* ([\d.]+) GiB$", result.stdout, re.M)]
    assert len(shown) == STEPS and min(shown) > 1.3, shown
