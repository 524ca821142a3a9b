"""A report or a comparison as one page that needs nothing else: no network, no folder beside it."""

from .render import comparison_page, report_page, save_page

__all__ = ["comparison_page", "report_page", "save_page"]
