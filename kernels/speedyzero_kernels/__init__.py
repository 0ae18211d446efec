"""Batched tree search, replay and optimiser operations for PyTorch: each one a plain reference that runs anywhere,
and a kernel for CUDA; the trees have a native form for a CPU too.

One file per operation; a file's public functions take and return tensors of fixed shape and never wait for the device.
"""
