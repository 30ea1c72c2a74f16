"""CUDA kernels of this project, each tested against a reference implementation in torch.

They are written in Triton, which is part of torch's CUDA wheels; nothing is compiled at installation.
"""
