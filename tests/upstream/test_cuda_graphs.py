"""Faults of Megatron's own CUDA graphs (--cuda-graph-impl local). Without a GPU, nothing is captured here."""

import torch
from megatron.core.transformer import MegatronModule, TransformerConfig, TransformerLayer
from megatron.core.transformer.cuda_graphs import CudaGraphManager, _CudagraphGlobalRecord

from tests.upstream import upstream_fault
from tests.upstream.unpatched import unpatched


@upstream_fault(
    "graphs-in-training",
    "graphs of the training are looked for in an evaluation, whose shapes have none",
)
def test_a_layer_runs_without_graphs_in_an_evaluation():
    assert unpatched(_evaluate_after_training) == [2.0] * 3


class _Layer(TransformerLayer):
    """A layer that doubles its input."""

    def __init__(self, config: TransformerConfig):
        MegatronModule.__init__(self, config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * 2


class _GraphsOfTraining(CudaGraphManager):
    """The manager after a training whose graphs have other shapes."""

    def __init__(self):
        torch.nn.Module.__init__(self)
        self.cudagraph_runners, self.reuse_cudagraphs = [], True
        self.func, self.need_backward, self.is_first_microbatch = None, True, False


def _evaluate_after_training() -> list[float]:
    _CudagraphGlobalRecord.cudagraph_created = True
    layer = _Layer(TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1))
    layer.cudagraph_manager = _GraphsOfTraining()
    with torch.no_grad():
        return layer.eval()(hidden_states=torch.ones(3)).tolist()
