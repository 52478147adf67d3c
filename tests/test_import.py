"""Importing the package is cheap, and every public name is there."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

import llama_probe

HEAVY = {"torch", "transformers", "transformer_lens", "pandas", "plotly", "numpy"}


def imported_by(statement: str) -> set[str]:
    """The modules that a fresh interpreter loads for a statement."""
    command = [sys.executable, "-X", "importtime", "-c", statement]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {line.rpartition("|")[2].strip() for line in report.splitlines()}


def test_the_package_loads_nothing_heavy():
    loaded = imported_by("import llama_probe; llama_probe.__version__; dir(llama_probe)")
    assert "llama_probe" in loaded
    assert not loaded & HEAVY


def test_the_catalogue_and_the_command_line_load_nothing_heavy():
    assert not imported_by("import llama_probe.checkpoints.catalogue, llama_probe.cli") & HEAVY


def test_a_heavy_import_would_be_seen():
    assert "torch" in imported_by("from llama_probe import Llama")


@pytest.mark.parametrize("name", llama_probe.__all__)
def test_every_public_name_resolves(name):
    assert getattr(llama_probe, name) is not None


def test_the_lists_of_public_names_agree():
    assert llama_probe.__all__ == sorted([*llama_probe._HOME, "__version__"])
    assert set(llama_probe.__all__) <= set(dir(llama_probe))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = llama_probe.nothing


def cpu_seconds(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_answers_at_once():
    script = Path(sys.executable).with_name("llama-probe")
    assert script.exists(), f"{script} is missing: install the package with make setup"
    assert min(cpu_seconds([str(script), "--help"]) for _ in range(3)) < 0.5
