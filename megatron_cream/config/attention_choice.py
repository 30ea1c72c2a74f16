"""--attention-backend auto on a GPU: the fastest kernel for this run's shapes, measured."""

import json
from argparse import Namespace
from dataclasses import asdict

import torch
from megatron.core.transformer.enums import AttnBackend

from megatron_cream.distributed import rendezvous
from megatron_cream.model import attention_speed
from megatron_cream.model.attention import AttentionBackend, list_alternatives


def take_fastest(args: Namespace) -> None:
    """Measured by every rank at once, as kernels are compiled by it; decided by rank 0."""
    first = AttentionBackend(**args.attention)
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    shape = attention_speed.Shape(
        tokens=args.seq_length // args.context_parallel_size,
        samples=args.micro_batch_size,
        heads=args.num_attention_heads // args.tensor_model_parallel_size,
        groups=max(groups // args.tensor_model_parallel_size, 1),
        head_dim=args.kv_channels,
        dtype=args.params_dtype,
    )
    with torch.cuda.device(args.local_rank):
        chosen = attention_speed.choose_fastest(list_alternatives(first, half=args.bf16 or args.fp16), shape)
    args.attention = json.loads(
        rendezvous.broadcast_from_rank_0(json.dumps(asdict(chosen)), args.rank, args.world_size)
    )
    args.attention_backend = AttnBackend[args.attention["te_kernel"]]
