"""Conversion of a recipe's model shape to a transformers config."""

from transformers import LlamaConfig


def llama_config(recipe: dict, **more) -> LlamaConfig:
    heads = recipe["num_attention_heads"]
    return LlamaConfig(
        vocab_size=recipe["vocab_size"],
        hidden_size=recipe["hidden_size"],
        intermediate_size=recipe["ffn_hidden_size"],
        num_hidden_layers=recipe["num_layers"],
        num_attention_heads=heads,
        num_key_value_heads=recipe.get("num_query_groups", heads),
        **more,
    )
