"""CUDA graphs: the launches of many kernels, recorded once and repeated by one call of the host."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

Runner = Callable[[Callable[[], Tensor]], Tensor]
"""Calls the function that it gets, the same at each call, and returns the result."""


class GraphRunner:
    """A Runner that records the function's kernels at the second call, and repeats them from then on.

    The first call runs it as it is, which compiles kernels and fills caches: neither may happen while a graph is
    recorded. Whatever changes between calls must be in tensors that the function reads and writes in place.

    The graph has memory of its own, for the results in between. It is free again when this object is gone.
    """

    def __init__(self):
        self._warm = False
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, function: Callable[[], Tensor]) -> Tensor:
        if not self._warm:
            self._warm = True
            return _run_on(_side_stream(), function)
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=_side_stream()):  # runs nothing
                self._out = function()
            self._graph = graph
        self._graph.replay()
        return self._out.clone()  # the next call writes into the same tensor


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    """Return the stream on which graphs are recorded: one, as cuBLAS keeps a workspace for each stream."""
    return torch.cuda.Stream()


def _run_on(stream: torch.cuda.Stream, function: Callable[[], Tensor]) -> Tensor:
    current = torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        out = function()
    current.wait_stream(stream)
    out.record_stream(current)
    return out
