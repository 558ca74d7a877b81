"""Triton kernels for CUDA: they read each map once, and make one launch of many operators.

Importing this package registers them with the operators they serve. The PyTorch forms stay what a
CPU runs, what serves where a kernel cannot, and the reference of the kernels. Its files: launch,
folding, scores, batch_gram, joint, eigenvalues.
"""

from renyi_kd._triton import batch_gram, eigenvalues, folding, joint, scores

__all__ = ["batch_gram", "eigenvalues", "folding", "joint", "scores"]
