"""Optional kernels that read and write quantized codes. Without them PyTorch does the same, more slowly."""
