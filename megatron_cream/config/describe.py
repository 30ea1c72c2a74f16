"""What would run, as a recipe: --print-config."""

from argparse import Namespace

import yaml

from megatron_cream.config.parser import default_values
from megatron_cream.config.samplers import sampler_options
from megatron_cream.model.attention import AttentionBackend


def describe(args: Namespace) -> str:
    """What will run: a few lines for a reader, then every value that is not a default, as a recipe.

    What follows from the machine (backend, fusions) is left out, so that a recipe printed on a
    laptop is right on a cluster.
    """
    defaults = default_values()
    derived = {"config", "print_config", "transformer_impl", "kv_channels", "save_hook"}
    derived |= {"gradient_accumulation_fusion", "bias_dropout_fusion"}
    if args.embedded_data:
        derived |= {"train_data_path", "valid_data_path", "tokenizer_model"}
    known = defaults.keys() - derived
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
        f"batch: {batch} samples of {args.seq_length} tokens, {batch * args.seq_length:,} a step",
        *(["save_hook: left out, as its words may hold secrets"] if args.save_hook else []),
    ]
    return "".join(f"# {line}\n" for line in head) + yaml.safe_dump(recipe, sort_keys=True, default_flow_style=None)
