"""Kernels that read and write what quantizers store. All of it works without them, slower."""
