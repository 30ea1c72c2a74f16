"""The optimizer step in one pass over memory, and the check for NaN gradients."""
