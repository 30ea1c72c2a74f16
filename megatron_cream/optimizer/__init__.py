"""The optimizer step in one pass over memory, inside Megatron's optimizers, and the check for NaN gradients."""
