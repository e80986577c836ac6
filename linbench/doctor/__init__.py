"""Is this machine fit to measure? Facts, a few quick measurements, and a verdict in plain words."""

from linbench.doctor.examination import examine

__all__ = ["examine"]
