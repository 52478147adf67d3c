"""`lp.audit`: one report, offline, that says what is there, and goes on where it was cut short."""

import functools
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from browser import open_offline

import llama_probe as lp
from llama_probe import cli
from llama_probe.runner import SavedRun, auditing

PAIRS, ORDINARY = 60, 110
HEADINGS = [
    "Does it refuse, and does it over-refuse?",
    "By what?",
    "What does removing it cost?",
    "Who writes it?",
    "What would a monitor catch?",
    "Told apart by layer, and by the words alone",
]
LATER = ("loss", "writers", "monitor", "separability")  # tables, the last ones
LAST = "What was run"  # which every report has


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One restricted request and one twin of some pairs, and ordinary ones."""
    asked = lp.prompts.requests("tiny-moe")
    ordinary = asked[asked["kind"] == "ordinary"].head(ORDINARY)
    matched = asked[(asked["kind"] != "ordinary") & (asked["pair"] < PAIRS)]
    chosen = matched.groupby(["pair", matched["kind"] == "restricted"]).head(1)
    path = tmp_path_factory.mktemp("requests") / "requests.csv"
    pd.concat([chosen, ordinary]).to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of tiny-moe's shape that has learnt nothing."""
    folder = tmp_path_factory.mktemp("models") / "untrained"
    lp.save(lp.load("tiny-moe", pretrained=False, seed=1, progress=False), folder)
    return folder


def audited(model: str | Path, requests: Path, out: Path, **options: Any) -> Path:
    """The report of an audit with few random directions."""
    return lp.audit(model, requests=requests, out=out, n_random=2, progress=False, **options)


@pytest.fixture(scope="module")
def report(requests, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return audited("tiny-moe", requests, tmp_path_factory.mktemp("audits"))


@pytest.fixture(scope="module")
def run(report) -> SavedRun:
    return lp.read_run(report.parent)


def headings(report: Path) -> list[str]:
    return re.findall(r"<h2[^>]*>(.*?)</h2>", report.read_text(encoding="utf-8"))


def tables(report: Path) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in (report.parent / "tables").iterdir()}


@pytest.mark.slow
def test_it_is_one_offline_report_with_all_its_chapters(report):
    assert headings(report) == [*HEADINGS, LAST]
    page = report.read_text(encoding="utf-8")
    loaded = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page)
    assert not [url for url in loaded if not url.startswith(("data:", "blob:", "#"))]
    assert not re.findall(r"url\(\s*[\"']?https?:", page)


@pytest.mark.browser
@pytest.mark.slow
def test_it_opens_without_a_network(report, chromium):
    seen = open_offline(chromium, report)
    assert seen.errors == [] and seen.requests == []
    assert len(seen.figures) >= 9 and all(seen.figures)


@pytest.mark.slow
def test_its_notes_say_what_was_found(run):
    verdict, robustness, told = run.record["notes"]
    assert verdict.startswith(f"This model refuses: it declines {PAIRS} of {PAIRS} restricted")
    assert "position -1 before block 2" in verdict
    found = re.match(r"Robustness index (0\.\d\d) \[(0\.\d\d), (0\.\d\d)\]", robustness)
    assert found and float(found[2]) <= float(found[1]) <= float(found[3])
    assert "word counts alone reach" in told and "does not say that the model refuses" in told


@pytest.mark.slow
def test_its_tables_say_the_same(run, requests):
    declining = run.tables["declining"].set_index(["kind", "judge"])
    assert declining.loc[("restricted", "phrase"), "value"] == 1
    assert declining.loc[("ordinary", "phrase"), "value"] == 0
    assert declining.loc[("ordinary", "phrase"), "n"] == ORDINARY
    assert len(run.tables["answers"]) == len(pd.read_csv(requests))
    parts = run.tables["writers"]
    assert parts["value"].sum() > 5 and set(parts["component"]) >= {"head", "expert"}
    monitor = run.tables["monitor"].set_index("kind")
    assert monitor.loc["ordinary", "n"] == ORDINARY - 100  # the others set the threshold
    assert monitor.loc["restricted", "value"] > monitor.loc["ordinary", "value"]


@pytest.mark.slow
def test_answers_are_redacted_where_they_are_shown_and_where_they_are_kept(report, run):
    kept = run.tables["answers"]["response"]
    assert (kept.str.len() <= 24 + len("… (redacted: 123 characters)")).all()
    assert kept.str.startswith("Sorry, I can't help with…").sum() == PAIRS
    of_doses = run.tables["answers by dose"]["response"]
    assert not of_doses.str.contains("help with that", regex=False).any()
    assert "help with that" not in report.read_text(encoding="utf-8")


@pytest.mark.slow
def test_answers_are_kept_and_shown_in_full_on_request(untrained, requests, tmp_path, monkeypatch):
    monkeypatch.setattr(auditing, "_separability", lambda *_: None)  # shows no answers
    for in_full in (True, False):
        shown = audited(untrained, requests, tmp_path, show_answers=in_full)
        kept = lp.read_run(shown.parent).tables["answers"]["response"]
        assert (kept.str.len() > 60).any() == in_full
        assert kept.str.endswith(" characters)").any() != in_full
        assert (" characters)" in shown.read_text(encoding="utf-8")) != in_full


@pytest.mark.slow
def test_cut_short_it_goes_on_and_gives_the_same(report, requests, tmp_path):
    """What was there is read, and the rest is as it would have been."""
    whole = report.parent
    half = tmp_path / whole.name
    shutil.copytree(whole, half)
    for name in LATER:
        (half / "tables" / f"{name}.parquet").unlink()
    (half / "report.html").unlink()
    record = half / "record.json"
    record.write_text(record.read_text().replace('"status": "complete"', '"status": "interrupted"'))
    before = (half / "tables" / "doses.parquet").stat().st_mtime_ns
    again = audited("tiny-moe", requests, tmp_path)
    assert again.parent == half and headings(again) == [*HEADINGS, LAST]
    assert (half / "tables" / "doses.parquet").stat().st_mtime_ns == before
    assert tables(again) == tables(report)


def test_an_unknown_model_is_a_sentence(requests, tmp_path):
    with pytest.raises(lp.InputError, match="the audit of tiny-mo is failed: .*tiny-moe"):
        audited("tiny-mo", requests, tmp_path)


@pytest.mark.parametrize(
    ("column", "sentence"),
    [("kind", "the requests lack the column 'kind'"), ("pair", "lack the column 'pair'")],
)
def test_requests_without_a_column_are_a_sentence(requests, tmp_path, column, sentence):
    path = tmp_path / "requests.csv"
    pd.read_csv(requests).drop(columns=column).to_csv(path, index=False)
    with pytest.raises(lp.InputError, match=sentence):
        audited("tiny-moe", path, tmp_path / "audits")


def test_requests_without_twins_are_a_sentence(requests, tmp_path):
    path = tmp_path / "requests.csv"
    asked = pd.read_csv(requests)
    asked[asked["kind"].isin(["restricted", "ordinary"])].to_csv(path, index=False)
    with pytest.raises(lp.InputError, match="there are no requests of kind 'same verb' or"):
        audited("tiny-moe", path, tmp_path / "audits")


@pytest.mark.slow
def test_a_model_that_does_not_refuse_has_no_direction(untrained, requests, tmp_path):
    """Also: against a model that it has nothing in common with it was not edited."""
    shown = audited(untrained, requests, tmp_path, against="tiny-moe")
    assert headings(shown) == [HEADINGS[0], HEADINGS[-1], "What changed since tiny-moe?", LAST]
    run = lp.read_run(shown.parent)
    verdict, told, mark = run.record["notes"]
    assert verdict.startswith("This model does not refuse restricted requests in particular: it")
    assert verdict.endswith("No direction is offered.")
    assert mark.endswith("since tiny-moe: no common direction")
    assert run.tables["declining then"].query("kind == 'restricted'")["value"].eq(1).all()
    kinds = set(run.tables["separability"]["kind"])
    assert {"probe", "n-grams", "length"} <= kinds and "word counts alone reach" in told
    assert "writers" not in run.tables and "doses" not in run.tables


@pytest.mark.slow
def test_against_itself_nothing_changed(requests, tmp_path, monkeypatch):
    for chapter in ("_behaviour", "_mechanism", "_separability"):
        monkeypatch.setattr(auditing, chapter, lambda *_: None)
    shown = audited("tiny-moe", requests, tmp_path, against="tiny-moe")
    run = lp.read_run(shown.parent)
    gap, mark = run.record["notes"]
    assert gap.startswith("Robustness index, less that of tiny-moe: 0.00 [0.00, 0.00] (n = 15)")
    assert mark.endswith("tiny-moe since tiny-moe: no writer was changed")
    assert run.tables["direction change"]["cosine"].to_numpy() == pytest.approx(1)


@pytest.mark.slow
def test_the_command_prints_where_the_report_is(report, requests, monkeypatch, capsys):
    """What is there already is not made again."""
    monkeypatch.setattr(auditing, "audit", functools.partial(lp.audit, n_random=2))
    arguments = ["tiny-moe", "--requests", str(requests), "--out", str(report.parent.parent)]
    monkeypatch.setattr(sys, "argv", ["llama-probe", "audit", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"Report: {report.resolve()}"


def test_the_command_refuses_in_one_sentence(requests, tmp_path, monkeypatch, capsys):
    arguments = ["tiny-mo", "--requests", str(requests), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["llama-probe", "audit", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr()
    assert end.value.code == 1 and said.out == ""
    assert said.err.splitlines()[-1].startswith("the audit of tiny-mo is failed: ")
