"""Disable CUDA graphs (--cuda-graph-impl local) in evaluations; reset them at the end."""

import weakref

from megatron_cream.patches import registry
from megatron_cream.patches.registry import Patch

GRAPHS_IN_TRAINING = Patch(
    "graphs-in-training",
    "megatron.core.transformer:TransformerLayer._should_call_local_cudagraph",
    "Megatron also replays the training graphs in evaluations, whose shapes differ: an assertion fails.",
    parameters="self, *args, **kwargs",
)
KNOWN_GRAPHS = Patch(
    "known-graphs",
    "megatron.core.transformer.cuda_graphs:_CudaGraphRunner.__init__",
    "Megatron keeps no list of its graphs and never resets them, and NCCL cannot shut down while a graph holds its "
    "collectives.",
    parameters="self, base_module, mempool, fwd_graph_input_args, fwd_graph_input_kwargs, func, need_backward",
)

_runners = weakref.WeakSet()


def install() -> None:
    """Install the patches. Call before `pretrain`."""
    registry.install(GRAPHS_IN_TRAINING, _use_graphs_in_training)
    registry.install(KNOWN_GRAPHS, _record_runner)


def reset_graphs() -> None:
    """Reset all captured graphs. Call before process groups are destroyed.

    NCCL waits until no graph holds its collectives. With tensor parallelism the graphs of every layer do, so the ranks
    of a finished run would hang.
    """
    for runner in _runners:
        for graph in (runner.fwd_graph, runner.bwd_graph):
            if graph is not None:
                graph.reset()


def _use_graphs_in_training(original, self, *args, **kwargs):
    return self.training and original(self, *args, **kwargs)


def _record_runner(original, self, *args, **kwargs) -> None:
    original(self, *args, **kwargs)
    _runners.add(self)
