"""Small Hugging Face folders of every family that can be converted, as transformers saves them."""

from pathlib import Path

import torch
import transformers

SMALL = dict(
    hidden_size=64,
    intermediate_size=176,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=515,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 500000.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0}
MODELS = {
    "llama-mha": ("Llama", dict(num_key_value_heads=4)),
    "llama-gqa-odd-vocabulary": ("Llama", dict(vocab_size=1003, head_dim=24)),
    "llama-mqa-tied": ("Llama", dict(num_key_value_heads=1, tie_word_embeddings=True)),
    "llama-3": ("Llama", dict(rope_parameters=LLAMA3, num_attention_heads=8, tie_word_embeddings=True)),
    "llama-wide-heads": ("Llama", dict(head_dim=40, num_attention_heads=8, num_key_value_heads=4)),
    "codellama": ("Llama", dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6}, vocab_size=32016)),
    "mistral": ("Mistral", dict(sliding_window=None)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(head_dim=32, rope_parameters=YARN)),
}


def save_model(folder: Path, name: str = "llama-mha", dtype=torch.float32, shard_size: str = "5GB", **changes):
    """Save a small random model with transformers, and return it.

    Args:
        changes: config values to change.
    """
    family, options = MODELS[name]
    options = options | changes
    torch.manual_seed(sum(name.encode()))
    config = getattr(transformers, f"{family}Config")(**(SMALL | options))
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # makes norms differ from one and biases from zero
            parameter.data.uniform_(0.5, 1.5)
        else:
            parameter.data *= 4  # spreads the logits
    if options.get("tie_word_embeddings"):
        model.tie_weights()
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model


def logits_of(model, tokens: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the causal logits of a transformers model, float32 [b, n, vocabulary], at position ids [b, n]."""
    n = tokens.shape[1]
    # Without an explicit mask transformers would take gaps in position ids for packed sequences.
    mask = torch.full((n, n), float("-inf")).triu(1)[None, None].expand(len(tokens), 1, -1, -1)
    with torch.inference_mode():
        return model(tokens, position_ids=ids, attention_mask=mask).logits


def some_tokens(model, window: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random tokens and position ids with gaps, different in each sample, [2, window] each."""
    generator = torch.Generator().manual_seed(1)
    config = model.config
    tokens = torch.randint(0, config.vocab_size, (2, window), generator=generator)
    ids = [torch.randperm(config.max_position_embeddings, generator=generator)[:window].sort().values for _ in range(2)]
    return tokens, torch.stack(ids)


def relative(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return (torch.linalg.norm(ours - expected) / torch.linalg.norm(expected)).item()
