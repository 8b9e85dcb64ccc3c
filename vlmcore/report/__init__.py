"""The page that shows a run to people: what came out, how it came about, whether to trust it."""

from vlmcore.report.loss_plot import loss_plot_svg
from vlmcore.report.page import Gate, ReportInput, render_report

__all__ = ["Gate", "ReportInput", "loss_plot_svg", "render_report"]
