"""Held-out perplexity against the length of the context, inside a training job.

The same tokens are scored at every length, so the lengths compare: for each held-out
document, the last `scored` of its first max(lengths) tokens are predicted from a context
that ends there and is n tokens long, at positions 0 .. n-1. A model that cannot use
positions beyond its window does worse as n grows; one that can does no worse.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_batch_on_this_cp_rank


def held_out_documents(files: list[tuple[str, tuple[float, float]]], minimum: int, most: int) -> list[np.ndarray]:
    """The first `minimum` tokens of up to `most` documents that have as many, spread over the files.

    Args:
        files: prefixes of .bin/.idx pairs, each with the share of its documents that is held
            out: (0.969, 0.999) for the validation part of Megatron's split 969,30,1.
        minimum: tokens of each document.
        most: documents in all.

    Returns: int64 arrays [minimum]; empty where no document is long enough.
    """
    found = []
    for prefix, share in files:
        dataset = IndexedDataset(prefix)
        first, last = (round(bound * len(dataset)) for bound in share)
        long = np.flatnonzero(dataset.sequence_lengths[first:last] >= minimum) + first
        found += [(dataset, int(i)) for i in long]
    chosen = np.unique(np.linspace(0, len(found) - 1, num=min(most, len(found)), dtype=np.int64))
    pick = [found[i] for i in chosen]
    return [dataset.get(i, offset=0, length=minimum).astype(np.int64) for dataset, i in pick]


def perplexity_by_length(
    model: list[torch.nn.Module], documents: list[np.ndarray], lengths: list[int], scored: int
) -> dict[int, float]:
    """exp of the mean negative log-likelihood of the scored tokens, for each context length.

    Runs on every rank, under any TP x PP x CP x DP; documents are shared out over the
    data-parallel ranks.

    Args:
        model: Megatron's model chunks, in evaluation mode.
        documents: int64 [max(lengths)] each.
        lengths: context lengths, in tokens; each more than `scored`.
        scored: tokens scored at the end of each context.

    Returns: perplexity for each length, the same on every rank.
    """
    end = max(lengths)
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    mine = documents[rank::ranks]
    # The interleaved schedule takes micro-batches in groups of the pipeline's size.
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    padding = -len(mine) % stages if len(model) > 1 else 0

    def windows(length: int) -> Iterator[dict[str, torch.Tensor]]:
        for document in mine:
            yield _window(document[end - length : end], scored)
        for _ in range(padding):
            yield _window(mine[0][end - length : end], scored=0)

    result = {}
    for length in lengths:
        total = torch.zeros(2, dtype=torch.float64, device=torch.cuda.current_device())
        if mine:
            outputs = get_forward_backward_func()(
                forward_step_func=_forward_step,
                data_iterator=windows(length) if len(model) == 1 else [windows(length) for _ in model],
                model=model,
                num_microbatches=len(mine) + padding,
                seq_length=length,
                micro_batch_size=1,
                decoder_seq_length=length,
                forward_only=True,
            )
            # Filled on the last pipeline stage; tensor-parallel ranks hold equal losses.
            if outputs and parallel_state.get_tensor_model_parallel_rank() == 0:
                total += torch.stack([output["nll"] for output in outputs]).sum(dim=0)
        torch.distributed.all_reduce(total)
        nll, count = total.tolist()
        result[length] = math.exp(min(nll / count, 100.0))
    return result


def _window(tokens: np.ndarray, scored: int) -> dict[str, torch.Tensor]:
    """A batch of one: tokens [1, n], and a loss mask on the last `scored` labels that exist."""
    n = len(tokens)
    labels = np.append(tokens[1:], 0)
    loss_mask = np.zeros(n, dtype=np.float32)
    loss_mask[n - 1 - scored : n - 1] = 1.0
    arrays = dict(tokens=tokens, labels=labels, loss_mask=loss_mask, position_ids=np.arange(n))
    return {name: torch.from_numpy(array)[None] for name, array in arrays.items()}


def _forward_step(data_iterator: Iterator, model):
    batch = {k: v.to(torch.cuda.current_device()) for k, v in next(data_iterator).items()}
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group())
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

    def collect(losses_BS):
        mask = batch["loss_mask"].double()
        nll = (losses_BS.double() * mask).sum()
        return nll, {"nll": torch.stack([nll, mask.sum()])}

    return losses, collect
