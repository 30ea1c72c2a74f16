"""Floating-point operations of a Llama model."""


def flops_per_token(
    *, num_layers: int, hidden_size: int, ffn_hidden_size: int, num_query_groups: int, kv_channels: int,
    num_attention_heads: int, vocab_size: int, seq_length: int,
) -> float:  # fmt: skip
    """Return the floating-point operations of training on one token, forward and backward.

    6 x the parameters in matrix products (without the embedding look-up), plus
    6 x layers x sequence length x attention width for causal attention.
    """
    attention_width = num_attention_heads * kv_channels
    attention = hidden_size * (2 * attention_width + 2 * num_query_groups * kv_channels)
    parameters = num_layers * (attention + 3 * hidden_size * ffn_hidden_size) + hidden_size * vocab_size
    return 6.0 * parameters + 6.0 * num_layers * seq_length * attention_width
