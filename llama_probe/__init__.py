"""Look inside Llama-family models: every quantity named, every name editable.

Importing this package loads neither torch nor transformers: each public name is fetched from its
module when it is first asked for (PEP 562).

>>> import llama_probe as lp
>>> lp.act_name("resid_post", 3)
'blocks.3.hook_resid_post'
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama_probe import plots as plots
    from llama_probe import prompts as prompts
    from llama_probe import refusal as refusal
    from llama_probe import stats as stats
    from llama_probe.capturing import Activations as Activations
    from llama_probe.capturing import Moments as Moments
    from llama_probe.capturing import capture as capture
    from llama_probe.checkpoints.load import from_transformers as from_transformers
    from llama_probe.checkpoints.load import load as load
    from llama_probe.checkpoints.save import save as save
    from llama_probe.errors import CheckpointError as CheckpointError
    from llama_probe.errors import ConfigError as ConfigError
    from llama_probe.errors import DownloadError as DownloadError
    from llama_probe.errors import HookNameError as HookNameError
    from llama_probe.errors import InputError as InputError
    from llama_probe.errors import LlamaProbeError as LlamaProbeError
    from llama_probe.errors import OutputError as OutputError
    from llama_probe.errors import UnknownNameError as UnknownNameError
    from llama_probe.hooks import ActivationCache as ActivationCache
    from llama_probe.hooks import act_name as act_name
    from llama_probe.interventions import Edit as Edit
    from llama_probe.interventions import ablate as ablate
    from llama_probe.interventions import ablate_experts as ablate_experts
    from llama_probe.interventions import add as add
    from llama_probe.interventions import affine as affine
    from llama_probe.interventions import bias_router as bias_router
    from llama_probe.interventions import force_experts as force_experts
    from llama_probe.interventions import freeze_routes as freeze_routes
    from llama_probe.interventions import replace as replace
    from llama_probe.lens import AttentionMaps as AttentionMaps
    from llama_probe.lens import RopeMaps as RopeMaps
    from llama_probe.lens import activation_pca as activation_pca
    from llama_probe.lens import attention_maps as attention_maps
    from llama_probe.lens import direct_logit_attribution as direct_logit_attribution
    from llama_probe.lens import head_scores as head_scores
    from llama_probe.lens import logit_lens as logit_lens
    from llama_probe.lens import rope_angles as rope_angles
    from llama_probe.lens import rope_contributions as rope_contributions
    from llama_probe.lens import rope_distance as rope_distance
    from llama_probe.lens import rope_maps as rope_maps
    from llama_probe.lens import rope_wavelengths as rope_wavelengths
    from llama_probe.model.config import LlamaConfig as LlamaConfig
    from llama_probe.model.llama import Llama as Llama
    from llama_probe.page import Report as Report
    from llama_probe.patching import ablate_each as ablate_each
    from llama_probe.patching import agreement as agreement
    from llama_probe.patching import attribution_patch as attribution_patch
    from llama_probe.patching import kl as kl
    from llama_probe.patching import logit_diff as logit_diff
    from llama_probe.patching import patch as patch
    from llama_probe.patching import path_patch as path_patch
    from llama_probe.patching import prob as prob
    from llama_probe.probing import Direction as Direction
    from llama_probe.probing import LinearProbe as LinearProbe
    from llama_probe.probing import Monitor as Monitor
    from llama_probe.probing import ProbeWarning as ProbeWarning
    from llama_probe.probing import contrast_direction as contrast_direction
    from llama_probe.probing import direction_similarity as direction_similarity
    from llama_probe.probing import erasure_check as erasure_check
    from llama_probe.probing import fit_monitor as fit_monitor
    from llama_probe.probing import leace as leace
    from llama_probe.probing import probe as probe
    from llama_probe.probing import transfer as transfer
    from llama_probe.refusal import RefusalStudy as RefusalStudy
    from llama_probe.refusal import find_refusal_direction as find_refusal_direction
    from llama_probe.routing import Routes as Routes
    from llama_probe.routing import RoutingReport as RoutingReport
    from llama_probe.routing import expert_contrast as expert_contrast
    from llama_probe.routing import route_stability as route_stability
    from llama_probe.routing import routes_of as routes_of
    from llama_probe.routing import routing_report as routing_report
    from llama_probe.routing import specialisation as specialisation
    from llama_probe.runner import Experiment as Experiment
    from llama_probe.runner import Run as Run
    from llama_probe.runner import audit as audit
    from llama_probe.runner import read_run as read_run
    from llama_probe.runner import run as run
    from llama_probe.runner import runs as runs
    from llama_probe.runner.ray_engine import RayEngine as RayEngine
    from llama_probe.widgets import ActivationScatter as ActivationScatter
    from llama_probe.widgets import AttentionExplorer as AttentionExplorer
    from llama_probe.widgets import LogitLensExplorer as LogitLensExplorer
    from llama_probe.widgets import PatchingExplorer as PatchingExplorer
    from llama_probe.widgets import ProbeDashboard as ProbeDashboard
    from llama_probe.widgets import RefusalDashboard as RefusalDashboard
    from llama_probe.widgets import RopeExplorer as RopeExplorer
    from llama_probe.widgets import RoutingExplorer as RoutingExplorer
    from llama_probe.widgets import Selection as Selection
    from llama_probe.widgets import TokenStrip as TokenStrip

__version__ = "0.1.0"

# Public name -> the module that defines it; a module stands for itself.
_HOME = {
    "ActivationCache": "llama_probe.hooks",
    "ActivationScatter": "llama_probe.widgets",
    "Activations": "llama_probe.capturing",
    "AttentionExplorer": "llama_probe.widgets",
    "AttentionMaps": "llama_probe.lens",
    "CheckpointError": "llama_probe.errors",
    "ConfigError": "llama_probe.errors",
    "Direction": "llama_probe.probing",
    "DownloadError": "llama_probe.errors",
    "Edit": "llama_probe.interventions",
    "Experiment": "llama_probe.runner",
    "HookNameError": "llama_probe.errors",
    "InputError": "llama_probe.errors",
    "LinearProbe": "llama_probe.probing",
    "Llama": "llama_probe.model.llama",
    "LlamaConfig": "llama_probe.model.config",
    "LlamaProbeError": "llama_probe.errors",
    "LogitLensExplorer": "llama_probe.widgets",
    "Moments": "llama_probe.capturing",
    "Monitor": "llama_probe.probing",
    "OutputError": "llama_probe.errors",
    "PatchingExplorer": "llama_probe.widgets",
    "ProbeDashboard": "llama_probe.widgets",
    "ProbeWarning": "llama_probe.probing",
    "RayEngine": "llama_probe.runner.ray_engine",
    "RefusalDashboard": "llama_probe.widgets",
    "RefusalStudy": "llama_probe.refusal",
    "Report": "llama_probe.page",
    "RopeExplorer": "llama_probe.widgets",
    "RopeMaps": "llama_probe.lens",
    "Routes": "llama_probe.routing",
    "RoutingExplorer": "llama_probe.widgets",
    "RoutingReport": "llama_probe.routing",
    "Run": "llama_probe.runner",
    "Selection": "llama_probe.widgets",
    "TokenStrip": "llama_probe.widgets",
    "UnknownNameError": "llama_probe.errors",
    "ablate": "llama_probe.interventions",
    "ablate_each": "llama_probe.patching",
    "ablate_experts": "llama_probe.interventions",
    "act_name": "llama_probe.hooks",
    "activation_pca": "llama_probe.lens",
    "add": "llama_probe.interventions",
    "affine": "llama_probe.interventions",
    "agreement": "llama_probe.patching",
    "attention_maps": "llama_probe.lens",
    "attribution_patch": "llama_probe.patching",
    "audit": "llama_probe.runner",
    "bias_router": "llama_probe.interventions",
    "capture": "llama_probe.capturing",
    "contrast_direction": "llama_probe.probing",
    "direct_logit_attribution": "llama_probe.lens",
    "direction_similarity": "llama_probe.probing",
    "erasure_check": "llama_probe.probing",
    "expert_contrast": "llama_probe.routing",
    "find_refusal_direction": "llama_probe.refusal",
    "fit_monitor": "llama_probe.probing",
    "force_experts": "llama_probe.interventions",
    "freeze_routes": "llama_probe.interventions",
    "from_transformers": "llama_probe.checkpoints.load",
    "head_scores": "llama_probe.lens",
    "kl": "llama_probe.patching",
    "leace": "llama_probe.probing",
    "load": "llama_probe.checkpoints.load",
    "logit_diff": "llama_probe.patching",
    "logit_lens": "llama_probe.lens",
    "patch": "llama_probe.patching",
    "path_patch": "llama_probe.patching",
    "plots": "llama_probe.plots",
    "prob": "llama_probe.patching",
    "probe": "llama_probe.probing",
    "prompts": "llama_probe.prompts",
    "read_run": "llama_probe.runner",
    "refusal": "llama_probe.refusal",
    "replace": "llama_probe.interventions",
    "rope_angles": "llama_probe.lens",
    "rope_contributions": "llama_probe.lens",
    "rope_distance": "llama_probe.lens",
    "rope_maps": "llama_probe.lens",
    "rope_wavelengths": "llama_probe.lens",
    "route_stability": "llama_probe.routing",
    "routes_of": "llama_probe.routing",
    "routing_report": "llama_probe.routing",
    "run": "llama_probe.runner",
    "runs": "llama_probe.runner",
    "save": "llama_probe.checkpoints.save",
    "specialisation": "llama_probe.routing",
    "stats": "llama_probe.stats",
    "transfer": "llama_probe.probing",
}

__all__ = [
    "ActivationCache",
    "ActivationScatter",
    "Activations",
    "AttentionExplorer",
    "AttentionMaps",
    "CheckpointError",
    "ConfigError",
    "Direction",
    "DownloadError",
    "Edit",
    "Experiment",
    "HookNameError",
    "InputError",
    "LinearProbe",
    "Llama",
    "LlamaConfig",
    "LlamaProbeError",
    "LogitLensExplorer",
    "Moments",
    "Monitor",
    "OutputError",
    "PatchingExplorer",
    "ProbeDashboard",
    "ProbeWarning",
    "RayEngine",
    "RefusalDashboard",
    "RefusalStudy",
    "Report",
    "RopeExplorer",
    "RopeMaps",
    "Routes",
    "RoutingExplorer",
    "RoutingReport",
    "Run",
    "Selection",
    "TokenStrip",
    "UnknownNameError",
    "__version__",
    "ablate",
    "ablate_each",
    "ablate_experts",
    "act_name",
    "activation_pca",
    "add",
    "affine",
    "agreement",
    "attention_maps",
    "attribution_patch",
    "audit",
    "bias_router",
    "capture",
    "contrast_direction",
    "direct_logit_attribution",
    "direction_similarity",
    "erasure_check",
    "expert_contrast",
    "find_refusal_direction",
    "fit_monitor",
    "force_experts",
    "freeze_routes",
    "from_transformers",
    "head_scores",
    "kl",
    "leace",
    "load",
    "logit_diff",
    "logit_lens",
    "patch",
    "path_patch",
    "plots",
    "prob",
    "probe",
    "prompts",
    "read_run",
    "refusal",
    "replace",
    "rope_angles",
    "rope_contributions",
    "rope_distance",
    "rope_maps",
    "rope_wavelengths",
    "route_stability",
    "routes_of",
    "routing_report",
    "run",
    "runs",
    "save",
    "specialisation",
    "stats",
    "transfer",
]

# Hidden from type checkers, which would otherwise accept any attribute of the package.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module 'llama_probe' has no attribute {name!r}")
        module = import_module(_HOME[name])
        value = module if _HOME[name] == f"{__name__}.{name}" else getattr(module, name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
