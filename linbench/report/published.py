"""Numbers that papers printed, for the tables that set ours beside them. Each names its place."""

from __future__ import annotations

LINFORMER_SPEED = {
    512: {128: 1.5, 256: 1.3},
    1024: {128: 1.7, 256: 1.6, 512: 1.3},
    2048: {128: 2.6, 256: 2.4, 512: 2.1, 1024: 1.3},
    4096: {128: 3.4, 256: 3.2, 512: 2.8, 1024: 2.2, 2048: 1.3},
    8192: {128: 5.5, 256: 5.0, 512: 4.4, 1024: 3.5, 2048: 2.1},
    16384: {128: 8.6, 256: 7.8, 512: 7.0, 1024: 5.6, 2048: 3.3},
    32768: {128: 13.0, 256: 12.0, 512: 11.0, 1024: 8.8, 2048: 5.0},
    65536: {128: 20.0, 256: 18.0, 512: 16.0, 1024: 14.0, 2048: 7.9},
}
"""2006.04768, table 3, left: inference speed-up over the Transformer by N and k."""

LINFORMER_MEMORY = {
    512: {128: 1.7, 256: 1.5},
    1024: {128: 3.0, 256: 2.9, 512: 1.8},
    2048: {128: 6.1, 256: 5.6, 512: 3.6, 1024: 2.0},
    4096: {128: 14.0, 256: 13.0, 512: 8.3, 1024: 4.3, 2048: 2.3},
    8192: {128: 28.0, 256: 26.0, 512: 17.0, 1024: 8.5, 2048: 4.5},
    16384: {128: 56.0, 256: 48.0, 512: 32.0, 1024: 16.0, 2048: 8.0},
    32768: {128: 56.0, 256: 48.0, 512: 36.0, 1024: 18.0, 2048: 16.0},
    65536: {128: 60.0, 256: 52.0, 512: 40.0, 1024: 20.0, 2048: 18.0},
}
"""2006.04768, table 3, right: factor of memory saved, by the largest batch that fits."""

NYSTROM: dict[int, dict[str, tuple[float, float]]] = {
    512: {
        "transformer": (54, 0.8),
        "linformer-256": (41, 0.7),
        "longformer-257": (32.2, 2.4),
        "nystrom-64": (35, 0.7),
        "nystrom-32": (26, 0.6),
    },
    1024: {
        "transformer": (186, 2.4),
        "linformer-256": (81, 1.3),
        "longformer-257": (65, 4.6),
        "nystrom-64": (63, 1.3),
        "nystrom-32": (49, 1.2),
    },
    2048: {
        "transformer": (685, 10),
        "linformer-256": (165, 2.7),
        "longformer-257": (130, 9.2),
        "nystrom-64": (118, 2.7),
        "nystrom-32": (96, 2.6),
    },
    4096: {
        "transformer": (2620, 32.9),
        "linformer-256": (366, 5.3),
        "longformer-257": (263, 18.5),
        "nystrom-64": (229, 5.9),
        "nystrom-32": (193, 5.6),
    },
    8192: {
        "transformer": (10233, 155.4),
        "linformer-256": (635, 11.3),
        "longformer-257": (455, 36.2),
        "nystrom-64": (450, 12.3),
        "nystrom-32": (383, 11.5),
    },
}
"""2102.03902, table 1: memory in MB and time in ms of one layer by N, on a 1080 Ti."""

REFORMER = {
    "full attention": {8: 94.8, 4: 92.5, 2: 76.9, 1: 52.5},
    "4 rounds": {8: 100.0, 4: 99.9, 2: 99.4, 1: 91.9},
    "2 rounds": {8: 100.0, 4: 99.9, 2: 98.1, 1: 86.8},
    "1 round": {8: 99.9, 4: 99.6, 2: 94.8, 1: 77.9},
}
"""2001.04451, table 2: accuracy in per cent on duplicated sequences, by rounds at evaluation."""

BASED = {8: (45, 23.4, 2.18), 16: (153, 29.2, 2.07), 24: (325, 34.4, 2.02), 32: (561, 37.6, 2.00)}
"""2402.18668, table 6: feature dimension -> expanded dimension, SWDE accuracy in per cent, recall perplexity."""
