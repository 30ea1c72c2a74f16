"""CUDA kernels of this project, each with a plain form in torch that it is tested against.

Triton, which comes with torch's CUDA wheels; nothing is compiled at installation.
"""
