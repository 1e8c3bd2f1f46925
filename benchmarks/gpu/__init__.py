"""Proof on a GPU: `python -m benchmarks.gpu` tests the kernels there and measures them beside what torch has.

Nothing here needs more than torch, triton and `modelspec.kernels`, so that a plain checkout is enough.
"""
