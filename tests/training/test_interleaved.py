"""Interleaved pipeline stages: real torchrun ranks over gloo, in float32."""

import pytest

from tests.launch import ROOT, relative_error, train, write_documents
from tests.selection import slow_but

STEPS = 4
CHUNKS = "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"
LAYOUTS = {
    "pp2": (2, CHUNKS),
    "pp2, groups of four": (2, f"{CHUNKS} --microbatch-group-size-per-virtual-pipeline-stage 4"),
    "tp2 x pp2": (4, f"{CHUNKS} --tensor-model-parallel-size 2 --sequence-parallel"),
    "cp2 x pp2": (4, f"{CHUNKS} --context-parallel-size 2 --use-distributed-optimizer"),
}
# A rank counts the micro-batches that it reads, those that it makes cosines and sines for, and its data loaders.
COUNTING_JOB = """
import os, sys
sys.path.insert(0, {root!r})
import pretrain_cream as job
from megatron.training import training
from megatron_cream.model.rotary import RotaryEmbedding

counts = dict(read=0, rotated=0, loaders=0)

def counting(name, original):
    def counted(*args, **kwargs):
        counts[name] += 1
        return original(*args, **kwargs)
    return counted

job.get_batch = counting("read", job.get_batch)
RotaryEmbedding.cos_sin = counting("rotated", RotaryEmbedding.cos_sin)
loader = training.build_pretraining_data_loader
training.build_pretraining_data_loader = lambda data, *rest: (
    loader(data, *rest) if data is None else counting("loaders", loader)(data, *rest)
)
if __name__ == "__main__":
    code = job.main()
    with open("{folder}/counts." + os.environ["RANK"], "w") as file:
        file.write(" ".join(map(str, counts.values())))
    sys.exit(code)
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Write data and a checkpoint of four layers; return the folder, the flags and the losses of one rank."""
    folder = tmp_path_factory.mktemp("interleaved")
    data = ["--num-layers", 4, "--data-path", write_documents(folder / "documents"), "--split", "90,10,0"]
    save = ["--save", folder / "start", "--save-interval", 1]
    train(1, folder / "tb0", *data, "--train-iters", 1, "--eval-iters", 0, *save)
    flags = [*data, "--train-iters", STEPS, "--eval-interval", 2, "--pretrained-checkpoint", folder / "start"]
    return folder, flags, train(1, folder / "tb1", *flags)


@pytest.mark.parametrize("layout", slow_but(LAYOUTS, "pp2"))
def test_same_losses(start, layout):
    folder, flags, reference = start
    assert len(reference) == STEPS
    ranks, extra = LAYOUTS[layout]
    assert relative_error(train(ranks, folder / layout, *flags, *extra.split()), reference) < 1e-5


@pytest.mark.slow
def test_chunks_share_their_micro_batches(start, tmp_path):
    """A rank loads, reads and rotates each micro-batch once for all its chunks, in training and evaluation."""
    folder, flags, _ = start
    prefix = write_documents(folder / "short", documents=200, shortest=2, longest=97)
    short = ["--short-data-path", prefix, "--short-share", 0.5, "--long-min-tokens", 300]
    reference = train(1, tmp_path / "one", *flags, *short)
    job = tmp_path / "job.py"
    job.write_text(COUNTING_JOB.format(root=str(ROOT), folder=tmp_path))
    losses = train(2, tmp_path / "chunks", *flags, *short, *CHUNKS.split(), script=job)
    assert relative_error(losses, reference) < 1e-5
    for rank in (0, 1):
        read, rotated, loaders = map(int, (tmp_path / f"counts.{rank}").read_text().split())
        # Four micro-batches a step, and one evaluation each two steps and at the end.
        assert read == rotated == 4 * STEPS + 4 * 3, rank
        assert loaders == 2, rank
