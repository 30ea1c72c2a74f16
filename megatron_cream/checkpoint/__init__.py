"""Hugging Face folders and Megatron checkpoints: reading, writing, and the map between them."""
