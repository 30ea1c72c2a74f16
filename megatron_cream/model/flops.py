"""Floating-point operations and parameters of a Llama model."""


def flops_per_token(
    *,
    num_layers: int,
    hidden_size: int,
    ffn_hidden_size: int,
    num_query_groups: int,
    kv_channels: int,
    num_attention_heads: int,
    vocab_size: int,
    seq_length: float,
    frozen_layers: bool = False,
    frozen_head: bool = False,
) -> float:
    """Return the floating-point operations of training on one token, forward and backward.

    6 x the parameters in matrix products (without the embedding look-up), or 4 x if they are frozen, plus
    6 x layers x sequence length x attention width for causal attention. LoRA's adapters are not counted. Packed
    samples attend within their documents: their sequence length is the mean length of the document that a token is in.
    """
    attention_width = num_attention_heads * kv_channels
    layer = _layer_weights(hidden_size, ffn_hidden_size, num_query_groups, kv_channels, num_attention_heads)
    products = (4.0 if frozen_layers else 6.0) * num_layers * layer
    products += (4.0 if frozen_head else 6.0) * hidden_size * vocab_size
    return products + 6.0 * num_layers * seq_length * attention_width


def parameters(
    *,
    num_layers: int,
    hidden_size: int,
    ffn_hidden_size: int,
    num_query_groups: int,
    kv_channels: int,
    num_attention_heads: int,
    vocab_size: int,
    tied: bool,
) -> int:
    """Return the number of weights in linear layers and embeddings, without norms and biases.

    A `tied` model has its embedding as output layer.
    """
    layer = _layer_weights(hidden_size, ffn_hidden_size, num_query_groups, kv_channels, num_attention_heads)
    return num_layers * layer + (1 if tied else 2) * hidden_size * vocab_size


def _layer_weights(
    hidden_size: int, ffn_hidden_size: int, num_query_groups: int, kv_channels: int, num_attention_heads: int
) -> int:
    """Return the number of weights in the linear layers of one transformer layer."""
    attention = hidden_size * (2 * num_attention_heads * kv_channels + 2 * num_query_groups * kv_channels)
    return attention + 3 * hidden_size * ffn_hidden_size
