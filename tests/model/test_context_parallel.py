"""Context-parallel attention against attention over the whole sequence: real ranks, gloo, float64."""

from tests.launch import torchrun

SCRIPT = """
from megatron_cream.patches import platform
platform.setup()
from types import SimpleNamespace
import torch
from torch import distributed as dist
from megatron_cream.model import context_parallel as cp
from functools import partial
from megatron_cream.model.attention import SdpaCoreAttention
from megatron_cream.model.packed_attention import Documents, attend_each_document

dist.init_process_group("gloo")
gathers = 0
gather = cp.gather_from_sequence_parallel_region

def counted(*args, **kwargs):
    global gathers
    gathers += 1
    return gather(*args, **kwargs)

cp.gather_from_sequence_parallel_region = counted

def attend(q, k, v):
    return SdpaCoreAttention.attend(SimpleNamespace(softmax_scale=0.3), q, k, v)

def plain(q, k, v, documents=None):
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores = 0.3 * torch.einsum("sbnd,tbnd->bnst", q, k)
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    if documents:
        number = [torch.bucketize(torch.arange(len(q)), torch.tensor(ends), right=True) for ends in documents.ends]
        hidden = torch.stack([hidden | (n[:, None] != n) for n in number])[:, None]
    scores = scores.masked_fill(hidden, float("-inf"))
    return torch.einsum("bnst,tbnd->sbnd", scores.softmax(-1), v)

pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
for group in (pairs[dist.get_rank() // 2], dist.group.WORLD):
    ranks, rank = group.size(), group.rank()
    for heads, groups in ((4, 4), (4, 2), (4, 1)):
        torch.manual_seed(ranks + groups)
        half, b, d = 3, 2, 8
        whole = [torch.randn(2 * ranks * half, b, n, d, dtype=torch.float64) for n in (heads, groups, groups)]
        upstream = torch.randn(2 * ranks * half, b, heads, d, dtype=torch.float64)
        for x in whole:
            x.requires_grad_()
        expected = plain(*whole)
        expected.backward(upstream)

        def mine(x):
            chunks = x.detach().split(half)
            return torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]])

        local = [mine(x).requires_grad_() for x in whole]
        for recomputed in (False, True):
            gathers = 0
            for x in local:
                x.grad = None
            run = lambda *xs: cp.context_parallel_attention(attend, *xs, group)
            if recomputed:
                out = torch.utils.checkpoint.checkpoint(run, *local, use_reentrant=True)
            else:
                out = run(*local)
            assert gathers == 2
            torch.testing.assert_close(out, mine(expected), rtol=1e-12, atol=1e-12)
            out.backward(mine(upstream))
            assert gathers == 4  # keys and values again, once: also where the layer is computed again
            for x, y in zip(local, whole):
                torch.testing.assert_close(x.grad, mine(y.grad), rtol=1e-11, atol=1e-12)
        with torch.no_grad():
            torch.testing.assert_close(run(*local), mine(expected), rtol=1e-12, atol=1e-12)

        # Packed samples: documents cross the borders of chunks.
        s = 2 * ranks * half
        documents = Documents(ends=((1, 4, s - 4, s), (5, 7, s)))
        for x in (*whole, *local):
            x.grad = None
        expected = plain(*whole, documents)
        expected.backward(upstream)
        out = cp.context_parallel_attention(partial(attend_each_document, attend, documents), *local, group)
        torch.testing.assert_close(out, mine(expected), rtol=1e-12, atol=1e-12)
        out.backward(mine(upstream))
        for x, y in zip(local, whole):
            torch.testing.assert_close(x.grad, mine(y.grad), rtol=1e-11, atol=1e-12)
print("same")
dist.barrier()
"""


def test_output_and_gradients_at_two_and_four_ranks(tmp_path):
    (tmp_path / "ranks.py").write_text(SCRIPT)
    result = torchrun(4, script=tmp_path / "ranks.py")
    assert result.returncode == 0 and result.stdout.count("same") == 4, result.stderr[-4000:]
