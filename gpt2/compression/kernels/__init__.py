"""Kernels that read packed codes. Everything works without them, slower: each says whether it can be used."""
