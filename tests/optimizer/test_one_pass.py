"""The one-pass optimizer step in Megatron's optimizers on real ranks, against Megatron's own step.

model/test_kernels.py tests the kernel; here torch computes instead, so that the test runs on a CPU.
"""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.launch import TINY, torchrun, train, write_documents

SCRIPT = """
if __name__ == "__main__":
    import sys
    import pretrain_cream as job
    import torch
    from megatron_cream.config import values
    from megatron_cream.optimizer import adamw

    class Kernel:
        launches = copies = scales = 0

        def __getitem__(self, grid):
            Kernel.launches += 1
            return self.run

        def run(self, p, g, m, v, copy, scale, count, lr, beta1, beta2, eps, decay, factor1, factor2, **flags):
            g = g * scale if flags["HAS_SCALE"] else g
            m.mul_(beta1).add_(g, alpha=1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            p.sub_(lr * (m * factor1 / (v.sqrt() * factor2 + eps) + decay * p))
            if flags["HAS_COPY"]:
                copy.copy_(p)
            Kernel.copies += flags["HAS_COPY"]
            Kernel.scales += flags["HAS_SCALE"]

    adamw._adamw_kernel = Kernel()
    values.can_use_one_pass_optimizer = lambda args: True
    code = job.main()
    assert Kernel.launches and Kernel.scales == Kernel.launches
    assert Kernel.copies == (Kernel.launches if "--bf16" in sys.argv else 0)
    sys.exit(code)
"""


def one_pass(script, folder, *flags):
    script.write_text(SCRIPT)
    result = torchrun(2, *TINY, "--tensorboard-dir", folder, *flags, script=script)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    events = EventAccumulator(str(folder)).Reload()
    names = [name for name in events.Tags()["scalars"] if name in ("lm loss", "grad-norm", "perplexity/64")]
    return {name: {e.step: e.value for e in events.Scalars(name)} for name in names}


OVERLAP = ["--overlap-grad-reduce", "--overlap-param-gather", "--ddp-num-buckets", 4]


@pytest.mark.parametrize(
    "layout, bound",
    [
        (["--use-distributed-optimizer", "--fp32"], 1e-6),
        (["--use-distributed-optimizer", "--bf16"], 2e-3),  # another order of sums, then rounding
        (["--use-distributed-optimizer", "--bf16", *OVERLAP], 2e-3),
        (["--pipeline-model-parallel-size", 2, "--fp32", "--clip-grad", 0.5], 1e-6),
    ],
)
def test_trains_as_megatron_does(tmp_path, layout, bound):
    """Gradient scaling and clipping in the same pass give equal losses, also after resuming.

    The reference and the resumed run do not overlap communication.
    """
    flags = ["--data-path", write_documents(tmp_path / "documents"), "--split", "90,10,0", *layout]
    save = ["--save", tmp_path / "saved", "--save-interval", 3]
    plain = [flag for flag in flags if flag not in OVERLAP]
    evaluate = ["--eval-interval", 2, "--eval-lengths", 64]
    reference = train(2, tmp_path / "reference", *plain, "--train-iters", 6, *evaluate, fp32=False)
    ours = one_pass(tmp_path / "job.py", tmp_path / "ours", *flags, "--train-iters", 6, *evaluate, *save)
    assert max(abs(ours["lm loss"][s] - reference[s]) / reference[s] for s in reference) < bound
    events = EventAccumulator(str(tmp_path / "reference")).Reload()
    for event in events.Scalars("grad-norm"):
        assert abs(ours["grad-norm"][event.step] - event.value) / event.value < 10 * bound
    for event in events.Scalars("perplexity/64"):  # uses the weights after the step
        assert abs(ours["perplexity/64"][event.step] - event.value) / event.value < 10 * bound
    (tmp_path / "saved" / "latest_checkpointed_iteration.txt").write_text("3")
    load = ["--train-iters", 6, "--load", tmp_path / "saved"]
    if "--use-distributed-optimizer" in layout:  # any AdamW loads its checkpoint
        resumed = train(2, tmp_path / "resumed", *plain, *load, fp32=False)
    else:
        resumed = one_pass(tmp_path / "job.py", tmp_path / "resumed", *flags, *load)["lm loss"]
    assert max(abs(resumed[s] - reference[s]) / reference[s] for s in (4, 5, 6)) < bound
