"""Records -> tables, figures and one page. Reads records only: never a device, never torch."""

from linbench.report.page import write_report

__all__ = ["write_report"]
