"""Which attention mechanism at my length, on my device, and what do I lose?"""

from linbench.registry import build, descriptions

__version__ = "0.1.0"
__all__ = ["__version__", "build", "descriptions"]
