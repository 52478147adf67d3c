"""Running experiments, and showing what came out."""

from llama_probe.runner.auditing import audit
from llama_probe.runner.compare import compare
from llama_probe.runner.experiment import Experiment
from llama_probe.runner.grid import run
from llama_probe.runner.report import rebuild
from llama_probe.runner.saved import SavedRun, read_run, runs
from llama_probe.runner.steps import Run

__all__ = [
    "Experiment",
    "Run",
    "SavedRun",
    "audit",
    "compare",
    "read_run",
    "rebuild",
    "run",
    "runs",
]
