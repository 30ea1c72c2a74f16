"""Floating-point operations of a Llama."""


def flops_per_token(
    *, num_layers: int, hidden_size: int, ffn_hidden_size: int, num_query_groups: int, kv_channels: int,
    num_attention_heads: int, vocab_size: int, seq_length: int,
) -> float:  # fmt: skip
    """Floating-point operations of one trained token, forward and backward.

    6 x the parameters that stand in a matrix product (the embedding's look-up is none) and
    6 x layers x sequence x attention width: causal attention, counted once.
    """
    attention_width = num_attention_heads * kv_channels
    attention = hidden_size * (2 * attention_width + 2 * num_query_groups * kv_channels)
    parameters = num_layers * (attention + 3 * hidden_size * ffn_hidden_size) + hidden_size * vocab_size
    return 6.0 * parameters + 6.0 * num_layers * seq_length * attention_width
