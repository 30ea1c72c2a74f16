"""The output of --print-config: the run as a recipe."""

from argparse import Namespace

import yaml

from megatron_cream.config.parser import default_values
from megatron_cream.config.samplers import sampler_options
from megatron_cream.model.attention import AttentionBackend


def describe(args: Namespace) -> str:
    """Return the run as a YAML recipe: comments for a reader, then all non-default values.

    Values that follow from the machine (backend, fusions) are omitted, so that a recipe printed on a laptop also works
    on a cluster.
    """
    defaults = default_values()
    omitted = {"config", "print_config", "transformer_impl", "kv_channels", "save_hook"}
    omitted |= {"gradient_accumulation_fusion", "bias_dropout_fusion"}
    if args.embedded_data:
        omitted |= {"train_data_path", "valid_data_path", "tokenizer_model"}
    known = defaults.keys() - omitted
    recipe = {name: value for name, value in vars(args).items() if name in known and value != defaults[name]}
    data_parallel = args.world_size // (
        args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    )
    batch = args.global_batch_size or args.micro_batch_size * data_parallel
    head = [
        f"attention: {AttentionBackend(**args.attention)}",
        f"positions: {sampler_options(args)}",
        f"rope: theta {args.rotary_base}, scaling {args.rope_scaling_config}",
        *args.rope_lines,
        f"parallel: {args.world_size} ranks, TP {args.tensor_model_parallel_size}, "
        f"PP {args.pipeline_model_parallel_size}, CP {args.context_parallel_size}, DP {data_parallel}",
        f"batch: {batch} samples of {args.seq_length} tokens, {batch * args.seq_length:,} tokens a step",
        *(["save_hook: omitted, because the command may contain secrets"] if args.save_hook else []),
    ]
    return "".join(f"# {line}\n" for line in head) + yaml.safe_dump(recipe, sort_keys=True, default_flow_style=None)
