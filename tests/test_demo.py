"""The demo's report, in a browser without a network."""

import re
from pathlib import Path

import pytest
import tiny
from browser import open_offline

from llama_probe import cli
from llama_probe.runner import demo


def test_the_report_of_a_tiny_model(tmp_path, monkeypatch, tiny_tokenizer, capsys):
    """The same steps on a random model: every section is there and progress is shown."""
    model = tiny.make("mixtral", vocab_size=tiny_tokenizer.vocab_size)
    model.tokenizer = tiny_tokenizer
    monkeypatch.setattr(demo, "load", lambda name: model)
    out = demo.run_demo("anything", tmp_path / "new folder" / "report.html")
    page = out.read_text()
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", page)
    assert len(headings) == 5
    assert "what it predicts" in capsys.readouterr().err
    assert not list(out.parent.glob("*.part"))


@pytest.mark.slow
@pytest.mark.browser
def test_every_figure_is_drawn_without_a_network(tmp_path, chromium, smollm2_path, monkeypatch):
    out = tmp_path / "report.html"
    monkeypatch.setattr("sys.argv", ["llama-probe", "demo", "--out", str(out)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    seen = open_offline(chromium, Path(out))
    assert seen.errors == [] and len(seen.figures) == 11
    assert all(seen.figures)


@pytest.mark.slow
@pytest.mark.browser
def test_the_demo_needs_no_network(tmp_path, chromium, monkeypatch, capsys):
    """Nothing on disk, and pip's index out of reach: the report is about tiny-moe."""
    out = tmp_path / "report.html"
    monkeypatch.setenv("LLAMA_PROBE_HOME", str(tmp_path / "home"))
    for name, value in (
        ("PIP_INDEX_URL", "http://127.0.0.1:9/simple"),
        ("PIP_RETRIES", "0"),
        ("PIP_CONFIG_FILE", "/dev/null"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["llama-probe", "demo", "--out", str(out)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    assert "The demo goes on with tiny-moe" in capsys.readouterr().err
    assert "Inside tiny-moe" in out.read_text()
    seen = open_offline(chromium, Path(out))
    assert seen.errors == [] and len(seen.figures) == 11
    assert all(seen.figures)
