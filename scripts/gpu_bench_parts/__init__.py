"""The parts of scripts/gpu_bench: each says what there is to do (``items``), and does one thing of it (``run``)."""
