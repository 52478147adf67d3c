"""Explorers for the notebook: views that follow a selection, with the live model behind a click."""

from llama_probe.widgets.attention import AttentionExplorer
from llama_probe.widgets.lens import LogitLensExplorer
from llama_probe.widgets.patching import PatchingExplorer
from llama_probe.widgets.probing import ProbeDashboard
from llama_probe.widgets.refusal import RefusalDashboard
from llama_probe.widgets.rope import RopeExplorer
from llama_probe.widgets.routing import RoutingExplorer
from llama_probe.widgets.scatter import ActivationScatter
from llama_probe.widgets.selection import Selection
from llama_probe.widgets.tokens import TokenStrip

__all__ = [
    "ActivationScatter",
    "AttentionExplorer",
    "LogitLensExplorer",
    "PatchingExplorer",
    "ProbeDashboard",
    "RefusalDashboard",
    "RopeExplorer",
    "RoutingExplorer",
    "Selection",
    "TokenStrip",
]
