"""Scores tokens of long texts inside a training job: their losses, and whether greedy decoding would choose them.

Each text takes one forward pass of Megatron's own schedules, so this runs under any TP x PP x CP x DP and needs
no cache of keys and values: if every token of an answer is the likeliest after all tokens before it, greedy
decoding of the prompt gives exactly that answer. Only the scored tokens go through the output layer, because the
logits of a whole long text would not fit in memory.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank
from torch import Tensor


@dataclass(frozen=True)
class ScoredText:
    """A text and the tokens of it to score.

    tokens: int64 [n].
    first: 1 to n; tokens[first:] are scored, each given all tokens before it.
    """

    tokens: np.ndarray
    first: int


def score_texts(model: list[torch.nn.Module], texts: list[ScoredText], length: int) -> Tensor:
    """Sum losses and counts over the scored tokens of each text, with positions from 0.

    Call it on every rank. Texts are distributed over the data-parallel ranks and padded at their ends.

    Args:
        model: Megatron's model chunks, in evaluation mode, without gradients.
        texts: token ids, and which of them to score; the same list on every rank.
        length: tokens that the model reads of each text. The last token of a text is not read, so a text has at
            most length + 1 tokens.

    Returns: float64 [texts, 3] on the CPU, the same on every rank: negative log-likelihood, number of scored
        tokens, number of those that are the likeliest.
    """
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    own = list(range(rank, len(texts), ranks))
    # The interleaved schedule takes micro-batches in groups of the pipeline's size.
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    padding = -len(own) % stages if len(model) > 1 else 0

    def batches() -> Iterator[tuple[int, dict[str, Tensor]]]:
        for i in own:
            yield i, _part_of_rank(build_batch(texts[i], length))
        for _ in range(padding):
            unscored = ScoredText(texts[own[0]].tokens, first=len(texts[own[0]].tokens))
            yield own[0], _part_of_rank(build_batch(unscored, length))

    sums = torch.zeros(len(texts), 3, dtype=torch.float64, device=torch.cuda.current_device())
    if own:
        outputs = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=batches() if len(model) == 1 else list(itertools.tee(batches(), len(model))),
            model=model,
            num_microbatches=len(own) + padding,
            seq_length=length,
            micro_batch_size=1,
            decoder_seq_length=length,
            forward_only=True,
        )
        # Only the last pipeline stage has outputs, and tensor-parallel ranks have equal ones.
        if outputs and parallel_state.get_tensor_model_parallel_rank() == 0:
            for output in outputs:
                sums[output["text"]] += output["sums"]
    torch.distributed.all_reduce(sums)
    return sums.cpu()


def build_batch(text: ScoredText, length: int) -> dict[str, Tensor]:
    """Build a batch of one text: tensors [1, length]; the loss mask marks scored labels."""
    n = len(text.tokens)
    tokens, labels = np.zeros((2, length), dtype=np.int64)
    tokens[:n] = text.tokens[:length]
    labels[: n - 1] = text.tokens[1:]
    loss_mask = np.zeros(length, dtype=np.float32)
    loss_mask[text.first - 1 : n - 1] = 1.0
    arrays = dict(tokens=tokens, labels=labels, loss_mask=loss_mask, position_ids=np.arange(length))
    return {name: torch.from_numpy(array)[None] for name, array in arrays.items()}


def _part_of_rank(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return this context-parallel rank's part of a batch, on its device."""
    batch = {name: tensor.to(torch.cuda.current_device()) for name, tensor in batch.items()}
    return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group())


def _forward_step(data_iterator: Iterator, model):
    text, batch = next(data_iterator)
    output = score_batch(model, batch)

    def collect(scores):
        losses, likeliest = scores.double()
        sums = torch.stack([losses.sum(), losses.new_tensor(len(losses)), likeliest.sum()])
        return losses.sum(), {"text": text, "sums": sums}

    return output, collect


def score_batch(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return losses of the scored tokens, and 1 where the token is the likeliest.

    The last pipeline stage returns float32 [2, k] for the k scored tokens of the batch.

    Args:
        model: one of Megatron's model chunks.
        batch: a batch like that of `build_batch`, on the model's device; the loss mask may mark any labels.
    """
    return model(
        batch["tokens"],
        batch["position_ids"],
        None,
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        output_processor=partial(_score, real_vocab_size=get_attr_wrapped_model(model, "real_vocab_size")),
    )


def _score(
    *, hidden_states, output_layer, output_weight, labels, loss_mask, compute_language_model_loss, real_vocab_size, **_
) -> Tensor:
    """Return losses of the scored tokens, and 1 where the token is the likeliest.

    GPTModel calls this on the last stage instead of its own output. Returns float32 [2, k] for k scored tokens.

    Args:
        hidden_states: [s, b, h]; under sequence parallelism this rank's part of s.
        output_layer: the model's output layer; its weight [v / TP, h] is this tensor-parallel rank's part.
        output_weight: weight that replaces the output layer's own if it is shared with the embedding; else None.
        labels: int64 [b, s]; under context parallelism this rank's part of the text.
        loss_mask: [b, s], not 0 where a token is scored; under context parallelism this rank's part of the text.
        compute_language_model_loss: the model's loss function of labels [1, k] and logits [k, 1, v / TP].
        real_vocab_size: size of the vocabulary without padding.
    """
    sequence_parallel = output_layer.sequence_parallel
    if sequence_parallel:
        hidden_states = gather_from_sequence_parallel_region(hidden_states)
    scored_SB = loss_mask.transpose(0, 1).bool()
    labels_K = labels.transpose(0, 1)[scored_SB]
    if not len(labels_K):  # no scored token on this context-parallel rank
        return hidden_states.new_zeros(2, 0, dtype=torch.float32)
    output_layer.sequence_parallel = False  # the hidden states are already gathered
    try:
        logits, _ = output_layer(hidden_states[scored_SB][:, None], weight=output_weight)  # [k, 1, v / TP]
    finally:
        output_layer.sequence_parallel = sequence_parallel
    # Before the loss, which may overwrite the logits.
    likeliest_K = find_likeliest_tokens(logits[:, 0], real_vocab_size)
    losses_K = compute_language_model_loss(labels_K[None], logits)[0]
    return torch.stack([losses_K.float(), (likeliest_K == labels_K).float()])


def find_likeliest_tokens(logits: Tensor, real_vocab_size: int) -> Tensor:
    """Return the argmax of the logits over all tensor-parallel ranks: int64 [k].

    Of equal logits the lowest token id wins, as in torch's `argmax` of the whole logits.

    Args:
        logits: [k, v / TP], this rank's part of the vocabulary.
        real_vocab_size: size of the vocabulary without padding; larger ids are ignored.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    first = group.rank() * logits.shape[-1]
    real = logits[:, : max(real_vocab_size - first, 0)]
    if real.shape[-1]:
        largest, tokens = real.max(dim=-1)
        largest, tokens = largest.float(), tokens + first
    else:
        largest = torch.full_like(logits[:, 0], float("-inf"), dtype=torch.float32)
        tokens = torch.full_like(largest, real_vocab_size, dtype=torch.int64)
    if group.size() > 1:
        overall = largest.clone()
        torch.distributed.all_reduce(overall, torch.distributed.ReduceOp.MAX, group=group)
        tokens[largest != overall] = real_vocab_size
        torch.distributed.all_reduce(tokens, torch.distributed.ReduceOp.MIN, group=group)
    return tokens
