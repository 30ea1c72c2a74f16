"""Causal attention within each document of packed samples.

The boundaries of the documents are numbers on the host, so no kernel waits for the device to read them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Span(NamedTuple):
    """The part of a document in a range of queries: queries `first` to `last` attend to keys `start` to `last`."""

    first: int
    last: int
    start: int


class Bounds(NamedTuple):
    """The spans of a range of queries, as the kernels of variable length take them: int32 [spans + 1] each."""

    queries: Tensor
    keys: Tensor
    longest_queries: int
    longest_keys: int


@dataclass
class Documents(PackedSeqParams):
    """The documents of a micro-batch, on their way through Megatron's layers.

    Tensors stay [s, b, ...]; with Megatron's own format, `thd`, a micro-batch would have one sample.

    ends: for each sample the ends of its documents, in tokens; the last one is the sample's length.
    """

    qkv_format: str = "sbhd"
    ends: tuple[tuple[int, ...], ...] = ()
    _bounds: dict[tuple, Bounds] = field(default_factory=dict)

    @classmethod
    def read(cls, starts: Tensor) -> "Documents | None":
        """Return the documents of a micro-batch; None if each sample is one document.

        Args:
            starts: [b, s] on the host, 1 on the first token of each document.
        """
        length = starts.shape[1]
        firsts = (row.nonzero()[:, 0].tolist() for row in starts)
        ends = tuple((*first[1:], length) for first in firsts)
        return cls(ends=ends) if any(len(of_sample) > 1 for of_sample in ends) else None

    def spans(self, sample: int, begin: int, end: int) -> Iterator[Span]:
        """Yield the spans of a sample's queries `begin` to `end`."""
        start = 0
        for last in self.ends[sample]:
            if last > begin and start < end:
                yield Span(max(start, begin), min(last, end), start)
            start = last

    def bounds(self, begin: int, end: int, device: torch.device) -> Bounds:
        """Return the bounds of the queries `begin` to `end` of all samples, one after another.

        The keys of a sample are those from the start of its first span to `end`.
        """
        key = (begin, end, device)
        if key not in self._bounds:  # once for all layers
            spans = [span for i in range(len(self.ends)) for span in self.spans(i, begin, end)]
            queries = [span.last - span.first for span in spans]
            keys = [span.last - span.start for span in spans]
            host = torch.tensor([[0, *accumulate(queries)], [0, *accumulate(keys)]], dtype=torch.int32)
            if device.type == "cuda":
                host = host.pin_memory()
            cumulated = host.to(device, non_blocking=True)
            self._bounds[key] = Bounds(cumulated[0], cumulated[1], max(queries), max(keys))
        return self._bounds[key]


def attend_each_document(
    attend: Attend, documents: Documents, query_SBND: Tensor, key_SBGD: Tensor, value_SBGD: Tensor
) -> Tensor:
    """Return the attention of each query to its document, [s, b, n, d], by one call of `attend` a document.

    Args:
        attend: causal attention of queries to keys, aligned at the end if there are more keys.
        documents: of the micro-batch.
        query_SBND: the queries that end where the keys end.
        key_SBGD: the keys of each sample from its beginning.
        value_SBGD: as the keys.
    """
    end = key_SBGD.shape[0]
    samples = []
    for i in range(query_SBND.shape[1]):
        spans = list(documents.spans(i, end - query_SBND.shape[0], end))
        queries = query_SBND[:, i : i + 1].split([span.last - span.first for span in spans])
        keys, values = (
            x[spans[0].start :, i : i + 1].split([span.last - span.start for span in spans])
            for x in (key_SBGD, value_SBGD)
        )
        samples.append(torch.cat([attend(*parts) for parts in zip(queries, keys, values, strict=True)]))
    return torch.cat(samples, dim=1)


def attend_by_bounds(
    kernel: Callable[[Tensor, Tensor, Tensor, Bounds], Tensor],
    documents: Documents,
    query_SBND: Tensor,
    key_SBGD: Tensor,
    value_SBGD: Tensor,
) -> Tensor:
    """Return what `attend_each_document` returns, by one call of a kernel of variable length.

    Args:
        kernel: (queries [t, n, d], keys [k, g, d], values, bounds) -> [t, n, d].
        documents: of the micro-batch.
        query_SBND: as in `attend_each_document`.
        key_SBGD: as in `attend_each_document`.
        value_SBGD: as the keys.
    """
    length, samples = query_SBND.shape[:2]
    end = key_SBGD.shape[0]
    bounds = documents.bounds(end - length, end, query_SBND.device)
    starts = [next(documents.spans(i, end - length, end)).start for i in range(samples)]
    query = query_SBND[:, 0] if samples == 1 else query_SBND.transpose(0, 1).flatten(0, 1)
    key, value = (
        x[starts[0] :, 0] if samples == 1 else torch.cat([x[start:, i] for i, start in enumerate(starts)])
        for x in (key_SBGD, value_SBGD)
    )
    out_TND = kernel(query, key, value, bounds)
    return out_TND.view(samples, length, *query_SBND.shape[2:]).transpose(0, 1)
