"""The products that stand in for apex's extension, in the places where Megatron looks for it."""

import sys
from types import SimpleNamespace

import pytest
import torch
from megatron.core.tensor_parallel import layers
from megatron.core.utils import drain_embedding_wgrad_compute

from megatron_cream.patches import registry, weight_gradients


@pytest.mark.skipif(layers._grad_accum_fusion_available, reason="apex is installed")
def test_deferred_gradients_of_the_head(monkeypatch):
    """--defer-embedding-wgrad-compute adds the head's gradients of all micro-batches at the end of a step."""
    monkeypatch.setitem(sys.modules, "fused_weight_gradient_mlp_cuda", None)  # restored after the test
    monkeypatch.setattr(registry, "assign", lambda *_: None)
    weight_gradients.install()
    inputs, gradients = torch.randn(3, 5, 2, 4), torch.randn(3, 5, 2, 6)  # micro-batch, token, sample, size
    weight = torch.nn.Parameter(torch.zeros(6, 4))
    weight.main_grad = torch.zeros(6, 4)
    config = SimpleNamespace(sequence_parallel=False, gradient_accumulation_fusion=True)
    alone = SimpleNamespace(size=lambda: 1)
    drain_embedding_wgrad_compute(config, list(inputs), list(gradients), weight, alone)
    torch.testing.assert_close(weight.main_grad, torch.einsum("mtso,mtsi->oi", gradients, inputs))
