"""Pages that work offline: one HTML file with live figures, whose clicks change each other."""

from llama_probe.page.report import Report
from llama_probe.page.views import Fill, Linked, Strip, View

__all__ = ["Fill", "Linked", "Report", "Strip", "View"]
