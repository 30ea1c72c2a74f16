"""Choice of the attention kernel for --attention-backend auto on a GPU, by timing."""

import json
from argparse import Namespace
from dataclasses import asdict

import torch
from megatron.core.transformer.enums import AttnBackend

from megatron_cream.distributed import rendezvous
from megatron_cream.model import attention_speed
from megatron_cream.model.attention import AttentionBackend, list_alternatives


def choose_fastest_backend(args: Namespace) -> None:
    """Time the attention kernels on this run's shapes and set the fastest in `args`.

    Every rank measures, because the measurement also compiles the kernels. Rank 0's result is used on all ranks.
    """
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
        chosen = attention_speed.choose_fastest(list_alternatives(first, half=shape.dtype != torch.float32), shape)
    args.attention = json.loads(rendezvous.broadcast_from_rank_0(json.dumps(asdict(chosen))))
    args.attention_backend = AttnBackend[args.attention["te_kernel"]]
