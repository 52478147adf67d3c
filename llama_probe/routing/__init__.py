"""Routing of mixtures of experts: who is used, for what, and for which behaviour."""

from llama_probe.routing.contrast import expert_contrast
from llama_probe.routing.report import RoutingReport, routing_report
from llama_probe.routing.routes import Routes, routes_of
from llama_probe.routing.specialisation import specialisation
from llama_probe.routing.stability import route_stability

__all__ = [
    "Routes",
    "RoutingReport",
    "expert_contrast",
    "route_stability",
    "routes_of",
    "routing_report",
    "specialisation",
]
