"""The ways to the trace of a power of a Gram matrix, from which its entropy follows.

The files, each of which imports only those before it:
tiles, frobenius, gaussian, joints, powers, eigenvalues, dual, choice (which of the former serves),
quadrature, lanczos. The last two make estimates.
"""
