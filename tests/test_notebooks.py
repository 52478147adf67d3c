"""Every notebook runs from top to bottom, and is the same as the source beside it."""

import resource
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SECONDS = 60  # of processor time, which does not depend on what else the machine does
FIGURES = {"application/vnd.plotly.v1+json", "application/vnd.jupyter.widget-view+json"}

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_of(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def contents(notebook: Any) -> list[tuple[str, str, list[str]]]:
    """What a notebook and its source have in common: all but outputs, counters and ids."""
    return [(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in notebook.cells]


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_each_notebook_has_a_source_and_each_source_a_notebook():
    assert NOTEBOOKS
    assert {path.stem for path in NOTEBOOKS} == {path.stem for path in FOLDER.glob("*.py")}


@every_notebook
def test_a_notebook_and_its_source_agree(path: Path):
    source = jupytext.read(path.with_suffix(".py"))
    assert contents(read(path)) == contents(source), "run `make notebooks`"
    assert read(path).metadata.kernelspec == source.metadata.kernelspec


@every_notebook
def test_outputs_are_not_committed(path: Path):
    notebook = read(path)
    assert "widgets" not in notebook.metadata
    for cell in code_of(notebook):
        assert not cell.outputs and cell.execution_count is None, "run `make notebooks`"


@every_notebook
def test_the_parameters_come_first_and_need_no_network(path: Path):
    first, *others = code_of(read(path))
    assert first.metadata.tags == ["parameters"]
    assert first.source.startswith('MODEL = "tiny-moe"\nFAST = True')
    assert not any("parameters" in cell.metadata.get("tags", []) for cell in others)


@pytest.mark.slow
@every_notebook
def test_it_runs_from_top_to_bottom(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = read(path)
    before = seconds_of_children()
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}}).execute()
    assert 1 < seconds_of_children() - before < SECONDS
    outputs = [output for cell in code_of(notebook) for output in cell.outputs]
    assert any(FIGURES & set(output.get("data", {})) for output in outputs)
    said = [output.text for output in outputs if output.output_type == "stream"]
    assert said == [], "a warning or a print, which does not belong beside figures"


@pytest.mark.slow
def test_a_failing_cell_would_be_seen():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 == 2")])
    with pytest.raises(Exception, match="AssertionError"):
        NotebookClient(notebook, timeout=300).execute()
