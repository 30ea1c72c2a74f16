"""Read and write Hugging Face folders and Megatron checkpoints, and convert between them."""
