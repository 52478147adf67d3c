"""The experiments run, on tiny-moe, and leave what they promise."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import expert_specialisation
import ioi_patching
import llama_probe as lp


@pytest.fixture(scope="module")
def ioi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "ioi"
    ioi_patching.main(["--model", "tiny-moe", "--n", "4", "--seed", "3", "--out", str(out)])
    return out


def table(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(folder / f"{name}.csv")


def test_ioi_patching_finds_what_holds_by_construction(ioi: Path):
    exact = table(ioi, "exact")
    assert set(exact.site) == {"resid_pre", "attn_out", "mlp_out", "z", "q", "k"}
    first = exact[(exact.site == "resid_pre") & (exact.layer == 0)].set_index("pos").effect
    assert first["S2"] == pytest.approx(1, abs=1e-3)
    assert first.drop("S2").abs().max() < 1e-3
    assert (exact.n == 4).all() and (exact.ci_low <= exact.ci_high).all()


def test_ioi_patching_has_every_estimate_of_every_cell(ioi: Path):
    exact, estimates = table(ioi, "exact"), table(ioi, "estimates")
    cells = exact.groupby("site").size()
    for method, estimate in estimates.groupby("method"):
        sites = ["q", "k"] if method == "QK fix" else list(cells.index)
        assert estimate.groupby("site").size().to_dict() == cells[sites].to_dict()
    agreement = table(ioi, "agreement").set_index(["method", "site"])
    assert len(agreement) == 6 + 6 + 2
    assert agreement.loc[("integrated", "resid_pre"), "pearson"] > 0.8
    assert (agreement.largest <= 1.5).all() and agreement.largest["gradient", "z"] > 0.1


def test_ioi_patching_counts_held_out_answers(ioi: Path):
    measures = table(ioi, "behaviour").set_index("measure")
    assert (measures.n >= 200).all()
    assert measures.loc["share right", "ci_low"] > 0.8
    assert measures.loc["logit difference", "ci_low"] > 1
    pairs = table(ioi, "pairs")
    untaught = {frozenset(pair) for pair in lp.prompts.planted()["held_out_name_pairs"]}
    people = zip(pairs.answer.str.strip(), pairs.foil.str.strip(), strict=True)
    assert all(frozenset(both) in untaught for both in people)
    assert pairs.clean.is_unique and len(pairs) >= 200


def test_ioi_patching_leaves_a_record_and_no_half_files(ioi: Path):
    tables = {f"{name}.csv" for name in ioi_patching.Tables._fields}
    assert {path.name for path in ioi.iterdir()} == tables | {"record.json", "report.html"}
    record: dict[str, Any] = json.loads((ioi / "record.json").read_text())
    assert record["arguments"]["n"] == "4" and record["seed"] == 3
    assert record["versions"]["llama-probe"] == lp.__version__
    assert len(record["weights_sha256"]) == len(record["pairs_sha256"]) == 64
    assert record["seconds"] > 0 and record["started"].endswith("+00:00")


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "table.csv"
    ioi_patching.write(path, "old")
    with pytest.raises(UnicodeEncodeError):
        ioi_patching.write(path, "\ud800")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_expert_specialisation_finds_what_was_planted(tmp_path: Path):
    arguments = ["--n", "20", "--permutations", "199", "--twins", "1", "--controls", "5"]
    expert_specialisation.main([*arguments, "--out", str(tmp_path)])
    truth = lp.prompts.planted()
    ablation = table(tmp_path, "ablation").set_index("domain")
    for domain in ("facts", "arithmetic", "translation"):
        row = ablation.loc[domain]
        assert row["layer"] == truth["planted_layer"]
        assert row["expert"] == truth["expert_of_domain"][domain]
        assert row["ci_low"] > row["random_mean"] and row["n"] == 10
    found = table(tmp_path, "specialisation").set_index(["layer", "metric"])
    twins = table(tmp_path, "twins").set_index(["layer", "metric"])
    planted = (truth["planted_layer"], "mutual_information")
    assert found.corrected[planted] > twins.corrected[planted] + 1
    record = json.loads((tmp_path / "record.json").read_text())
    assert len(record["weights_sha256"]) == 64 and record["arguments"]["twins"] == "1"
    assert "Experts of tiny-moe" in (tmp_path / "report.html").read_text()


def test_random_experts_serve_as_many_tokens():
    import numpy as np

    model = lp.load("tiny-moe")
    texts = expert_specialisation.planted_texts(4)
    routes = lp.routes_of(model, texts.text.tolist(), texts.domain.tolist())
    draw = np.random.default_rng(0)
    for expert in range(8):
        load = expert_specialisation.served(routes, 2, [expert]).sum()
        layer, experts = expert_specialisation.matched(routes, (2, expert), load, draw)
        assert not (layer == 2 and expert in experts)
        assert expert_specialisation.served(routes, layer, experts).sum() >= 0.9 * load
