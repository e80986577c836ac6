"""The peers' forms of our mechanisms, one file a family. Timed by ``scripts/peers.py``."""

from importlib import import_module
from pkgutil import iter_modules

from peer_forms.pair import Comparison

FAMILIES = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
COMPARISONS: tuple[Comparison, ...] = tuple(
    comparison for family in FAMILIES for comparison in getattr(family, "COMPARISONS", ())
)
"""Those of every file here, in the order of the table."""
