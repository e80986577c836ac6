"""What a kernel costs, read from its binary: compiled for any architecture on a machine that has none."""
