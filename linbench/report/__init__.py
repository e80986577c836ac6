"""Records -> tables, figures and one page (:func:`linbench.report.page.write_report`).

Reads records only: never a device, never torch.
"""
