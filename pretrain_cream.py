"""Extend a Llama's context window with CREAM, on NVIDIA Megatron.

Without flags, a tiny Llama is trained and extended on text that is already on this machine, on CPU or GPU:

    torchrun --nproc_per_node=2 pretrain_cream.py

With a recipe, and any flag of Megatron or of this project on top of it (--help lists them all):

    torchrun --nproc_per_node=2 pretrain_cream.py --config llama2_7b_32k --data-path data/pile ...

To print all settings and exit:

    python pretrain_cream.py --config llama2_7b_32k --data-path data/pile ... --print-config
"""

import sys

if sys.version_info < (3, 12):
    sys.exit(f"megatron_cream needs Python 3.12 or newer; this is Python {sys.version.split()[0]}")

from megatron_cream.common import entry

if __name__ == "__main__":
    entry.start()  # before the imports, which take seconds

from megatron_cream.common import processes
from megatron_cream.distributed import launcher

if __name__ == "__mp_main__":  # the writer process of --async-save imports this file
    processes.end_with_parent()
else:
    launcher.end_with_launcher()

from megatron_cream.patches import platform

platform.setup()  # before anything of Megatron is imported

import functools
from argparse import Namespace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank
from megatron.training import get_args, get_timers, get_tokenizer

from megatron_cream.config import values
from megatron_cream.data.chunks import SharedMicroBatches
from megatron_cream.data.dataset import LongDocumentDataset, LongDocumentDatasetConfig
from megatron_cream.data.mixed_dataset import MixedDataset
from megatron_cream.data.packed_dataset import PackedDocumentDataset
from megatron_cream.data.recent import RecentSamples
from megatron_cream.data.repeated_blend import repeat_if_short
from megatron_cream.data.transport import ThroughPipe
from megatron_cream.data.usage import Usage
from megatron_cream.model.packed_attention import Documents
from megatron_cream.planning.graph_choice import choose_graphs
from megatron_cream.planning.own_run import predict_own_run
from megatron_cream.training import run

micro_batches = SharedMicroBatches()
recent_samples = RecentSamples()
usage = Usage()


def get_batch(data_iterator, samples: int) -> dict[str, Any]:
    """Return the next micro-batch of this rank.

    Each tensor is [samples, seq_length / context_parallel_size]. Every pipeline stage gets one, since the rotary
    embedding needs `position_ids` in every layer. The first tensor-parallel rank broadcasts it in one tensor of known
    size. Megatron's `broadcast_data` sends the sizes first, and waits for the device to read them, in every
    micro-batch.

    If short texts are mixed in, `documents` has the documents of the samples; it is None if each sample is one.
    """
    names = ["tokens", "labels", "loss_mask", "position_ids"]
    names += ["document_starts"] if values.short_mix(get_args()) else []
    packed = data = None
    if data_iterator is not None:
        data = next(data_iterator)
        recent_samples.add(get_args().curr_iteration, data)
        # Converted on the device: the GPU has nothing to do yet, and would wait for the host's threads.
        packed = torch.stack([data[name].cuda(non_blocking=True).long() for name in names])
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        shape = (len(names), samples, get_args().seq_length)
        packed = torch.empty(shape, dtype=torch.long, device="cuda") if packed is None else packed.view(shape)
        torch.distributed.broadcast(packed, group=parallel_state.get_tensor_model_parallel_group(), group_src=0)
    batch = dict(zip(names, packed, strict=True))
    starts = batch.pop("document_starts", None)
    cp_group = parallel_state.get_context_parallel_group()
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=cp_group)
    if starts is not None:
        # The ranks that got the batch by a broadcast wait for the device here.
        batch["documents"] = Documents.read(data["document_starts"] if data else starts.cpu())
    return batch


def loss_func(loss_mask: torch.Tensor, losses: torch.Tensor):
    """Return the summed loss of a micro-batch, its number of tokens, and both for the log.

    Args:
        loss_mask: [b, n], 1 where a token counts.
        losses: float32 [b, n], each token's cross-entropy.
    """
    mask = loss_mask.view(-1).float()
    loss = torch.sum(losses.view(-1).float() * mask)
    if get_args().check_for_nan_in_loss_and_grad:
        get_rerun_state_machine().validate_result(  # once, since each check waits for the device
            result=loss,
            rejection_func=lambda value: not torch.isfinite(value),
            message="found NaN or Inf in local forward loss calculation",
            tolerance=0.0,
            fatal=True,
        )
    num_tokens = mask.sum().to(torch.int)
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.to(loss.dtype)])}


def forward_step(data_iterator, model):
    """Run one micro-batch through this rank's part of the model."""
    args, timers = get_args(), get_timers()
    timers("batch-generator", log_level=2).start()
    samples = args.micro_batch_size if model.training else args.eval_micro_batch_size
    chunk = get_attr_wrapped_model(model, "vp_stage", allow_none=True)
    chunks = args.virtual_pipeline_model_parallel_size
    batch = micro_batches.take(lambda: get_batch(data_iterator, samples), chunk, chunks)
    timers("batch-generator").stop()
    packed = batch.get("documents")
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], packed_seq_params=packed)
    return losses, functools.partial(loss_func, batch["loss_mask"])


def train_valid_test_datasets_provider(train_val_test_num_samples, vp_stage=None):
    """Build the data sets, on the first tensor-parallel rank of every pipeline stage, for its first chunk."""
    if vp_stage:
        return [None] * 3  # the first chunk reads for all
    args, (train, valid, test) = get_args(), train_val_test_num_samples
    if args.start_eval_at_iter and valid is not None:
        valid += (
            args.eval_iters * args.eval_global_batch_size
        )  # Megatron 0.19 does not count the evaluation at that step
    # A resumed run may have used larger batches before, and evaluated more often.
    if train and args.train_iters:
        left = max(args.train_iters - args.iteration, 0) * args.global_batch_size
        train = max(train, args.consumed_train_samples + left)
    counts = [train, valid + args.consumed_valid_samples if valid else valid, test]
    mix = values.short_mix(args) if train else None
    short = mix.count_short(train) if mix else 0
    long_counts = [train - short if short else train, *counts[1:]]
    datasets = _build(LongDocumentDataset, long_counts, values.dataset_config(args, get_tokenizer()))
    if mix and short:
        packed = _build(PackedDocumentDataset, [short, 0, 0], values.short_dataset_config(args, get_tokenizer()))[0]
        if packed is not None:
            datasets[0] = usage.dataset = MixedDataset(datasets[0], packed, mix, train)
    # Megatron's samplers reject an empty data set, as with --eval-iters 0.
    pairs = zip(datasets, counts, strict=True)
    return [None if data is None or count == 0 else _through_pipe(data) for data, count in pairs]


train_valid_test_datasets_provider.is_distributed = True


def _through_pipe(data):
    """Return a data set whose batches go through a pipe, or a list of them: several --valid-data-path are one."""
    return [ThroughPipe(each) for each in data] if isinstance(data, list) else ThroughPipe(data)


def _build(kind: type, counts: list, config: LongDocumentDatasetConfig) -> list:
    """Build a data set of each split on the first tensor-parallel rank; elsewhere they are None. All ranks call it."""
    is_built_here = parallel_state.get_tensor_model_parallel_rank() == 0
    built = BlendedMegatronDatasetBuilder(kind, counts, lambda: is_built_here, config).build()
    return [repeat_if_short(data, count) for data, count in zip(built, counts, strict=True)]


def train(argv: list[str] | None = None) -> Namespace:
    """Run one training; see `megatron_cream.training.run.train`."""
    datasets = train_valid_test_datasets_provider
    job = run.Job(datasets, forward_step, recent_samples, choose_graphs, predict_own_run, usage)
    return run.train(job, argv)


def main() -> int:
    return run.main(train)


if __name__ == "__main__":
    entry.run(main)
