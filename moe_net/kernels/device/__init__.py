"""Triton kernels of the expert backends; imported only where Triton is installed."""
