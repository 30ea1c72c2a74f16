"""A NaN on one rank is detected by all ranks in the same step, and no weight changes."""

import json
import re

import pytest
import torch

from megatron_cream.optimizer import finite
from tests.launch import TINY, torchrun, write_documents

# At step 3 the loss of one rank is non-finite.
SCRIPT = """
import functools, json, os, sys
import pretrain_cream as job
import torch
from megatron.training import get_args, training

original, log = job.loss_func, training.training_log
def loss_func(mask, losses):
    wrong = get_args().curr_iteration == 2 and os.environ["RANK"] == "1"
    return original(mask, losses * float(os.environ["WRONG"]) if wrong else losses)
job.loss_func = loss_func
seen = []
@functools.wraps(log)
def training_log(loss_dict, total, lr, iteration, scale, report, skipped, grad_norm, *rest, **kw):
    seen.append([iteration, skipped, grad_norm])
    return log(loss_dict, total, lr, iteration, scale, report, skipped, grad_norm, *rest, **kw)
training.training_log = training_log
code = job.main()
print("SEEN" + json.dumps(seen), flush=True)
sys.exit(code)
"""


@pytest.mark.parametrize("wrong", [0.0, float("nan"), float("inf")])
def test_nan_weights_are_not_skipped(monkeypatch, wrong):
    """With non-finite weights every step would be skipped, so training stops even with the policy `skip`."""
    model = torch.nn.Linear(2, 2)
    model.bias.data[1] = wrong
    monkeypatch.setattr(finite, "_guard", guard := finite._Guard())
    guard.policy, guard.report = "skip", lambda norm: None
    finite.watch_model([torch.nn.Linear(2, 2), model])
    with pytest.raises(finite.NonFiniteError if wrong else finite._SkipStep, match="bias" if wrong else ""):
        finite._check_norm(lambda self: float("nan"), None)
    assert finite._check_norm(lambda self: 1.0, None) == 1.0


@pytest.mark.parametrize(
    "policy, wrong, optimizer", [("stop", "nan", []), ("skip", "inf", ["--use-distributed-optimizer"])]
)
def test_policy(tmp_path, monkeypatch, policy, wrong, optimizer):
    script = tmp_path / "job.py"
    script.write_text(SCRIPT)
    documents = write_documents(tmp_path / "documents", documents=20)
    monkeypatch.setenv("WRONG", wrong)
    flags = [*TINY, "--fp32", "--data-path", documents, "--split", "90,10,0", "--train-iters", 5]
    result = torchrun(2, *flags, *optimizer, "--nan-policy", policy, script=script)
    assert (result.returncode == 0) == (policy == "skip"), result.stdout[-2000:] + result.stderr[-2000:]
    assert result.stdout.count("step 3: the gradient's norm is") == 1
    # Each rank lists its two micro-batches of two samples and their documents.
    for rank in (0, 1):
        line = rf"step 3, rank {rank}: sample \d+, document \d+, positions 0-\d+( \d+-\d+)*"
        assert len(re.findall(line, result.stdout)) == 4
    seen = [json.loads(text) for text in re.findall(r"SEEN(\[\[.*?\]\])", result.stdout)]
    if policy == "stop":
        # Both ranks exit themselves, not killed by the launcher, and log no step after the second.
        assert result.stderr.count("pretrain_cream.py: stopped:") == 2
        assert [step for step, *_ in seen[0]] == [1, 2]
    else:
        assert seen[0] == seen[1]
        assert [(step, skipped) for step, skipped, _ in seen[0]] == [(1, 0), (2, 0), (3, 1), (4, 0), (5, 0)]
        assert all(norm is not None and norm < 100 for step, _, norm in seen[0] if step != 3)
