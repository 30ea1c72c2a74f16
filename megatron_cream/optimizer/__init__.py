"""The optimizer's step in one pass over memory, inside Megatron's own optimizers."""
