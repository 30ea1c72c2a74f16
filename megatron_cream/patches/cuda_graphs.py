"""Keep Megatron's CUDA graphs (--cuda-graph-impl local) out of evaluations, and end them with the run."""

import weakref

from megatron_cream.patches import registry
from megatron_cream.patches.registry import Patch

GRAPHS_IN_TRAINING = Patch(
    "graphs-in-training",
    "megatron.core.transformer:TransformerLayer._should_call_local_cudagraph",
    "Graphs have the training's shapes, and Megatron replays them in evaluations, where an assertion fails.",
    parameters="self, *args, **kwargs",
)
KNOWN_GRAPHS = Patch(
    "known-graphs",
    "megatron.core.transformer.cuda_graphs:_CudaGraphRunner.__init__",
    "Megatron keeps graphs for good, in no list, and NCCL cannot end while a graph holds its collectives.",
    parameters="self, base_module, mempool, fwd_graph_input_args, fwd_graph_input_kwargs, func, need_backward",
)

_runners = weakref.WeakSet()


def install() -> None:
    """Call before `pretrain`."""
    registry.install(GRAPHS_IN_TRAINING, _only_in_training)
    registry.install(KNOWN_GRAPHS, _remember)


def reset_graphs() -> None:
    """Call before process groups are destroyed.

    NCCL waits until no graph holds its collectives. With tensor parallelism every layer's graphs do: the ranks of a
    finished run would never end.
    """
    for runner in _runners:
        for graph in (runner.fwd_graph, runner.bwd_graph):
            if graph is not None:
                graph.reset()


def _only_in_training(original, self, *args, **kwargs):
    return self.training and original(self, *args, **kwargs)


def _remember(original, self, *args, **kwargs) -> None:
    original(self, *args, **kwargs)
    _runners.add(self)
