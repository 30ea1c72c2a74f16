"""LoRA on a transformers model with peft, for benchmarks/train_step.py."""

TARGETS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()


def add_adapters(model, recipe: dict, recompute: bool):
    """Return the model with peft's adapters; it trains what the recipe's run of this project trains.

    The adapters stay in bf16, and embeddings and norms train in place: peft's own choices, adapters in float32 and
    copies of the trained modules, are slower and larger.

    Args:
        model: a LlamaForCausalLM.
        recipe: the recipe's values, with lora_rank.
        recompute: whether each layer keeps its input only.
    """
    from peft import LoraConfig, get_peft_model

    rank = recipe["lora_rank"]
    config = LoraConfig(r=rank, lora_alpha=recipe.get("lora_alpha", 2 * rank), target_modules=TARGETS)
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    ends = {"embeddings": ("embed_tokens.weight", "lm_head.weight"), "norms": ("norm.weight",)}
    trained = recipe.get("lora_train", "embeddings,norms").split(",")
    for name, parameter in adapted.named_parameters():
        if name.endswith(tuple(end for key in trained for end in ends.get(key, ()))):
            parameter.requires_grad_()
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return adapted
