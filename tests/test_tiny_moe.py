"""The model in the box: its exam, its heads, its routing, its card, its random twins."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import llama_probe as lp
from tiny_moe import exam

FOLDER = Path(lp.__file__).parent / "assets" / "tiny_moe"


@pytest.fixture(scope="module")
def model() -> lp.Llama:
    return lp.load("tiny-moe", device="cpu", progress=False)


@pytest.fixture(scope="module")
def planted() -> dict[str, Any]:
    return lp.prompts.planted()


@pytest.fixture(scope="module")
def marks(model: lp.Llama, planted: dict[str, Any]) -> pd.DataFrame:
    return exam.mark(model, planted["exam"]).set_index("task")


def card_table(heading: str) -> pd.DataFrame:
    """The first table under a heading of the model card."""
    card = (FOLDER / "README.md").read_text()
    section = card.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return pd.DataFrame(rows[2:], columns=rows[0])


@pytest.mark.parametrize(
    ("task", "least"),
    [
        ("facts", 0.95),
        ("indirect object", 0.95),
        ("induction", 0.9),
        ("arithmetic", 0.9),
        ("restricted", 0.97),
    ],
)
def test_held_out_questions_are_answered(marks: pd.DataFrame, task: str, least: float) -> None:
    assert marks.n[task] >= 200
    assert marks.value[task] >= least


@pytest.mark.parametrize("twin", ["same verb", "same object"])
def test_harmless_twins_are_not_declined(marks: pd.DataFrame, twin: str) -> None:
    assert marks.n[twin] >= 200
    assert marks.value[twin] <= 0.03


def test_the_card_shows_these_figures(marks: pd.DataFrame) -> None:
    shown = card_table("The exam").set_index("task")
    assert set(shown.index) == set(marks.index)
    for task, row in marks.iterrows():
        assert int(shown.n[task]) == row.n
        # Another machine's arithmetic may turn one question in 400.
        assert float(shown["seed 0"][task].split()[0]) == pytest.approx(row.value, abs=0.006)


def test_no_question_of_the_exam_was_taught(planted: dict[str, Any]) -> None:
    """Drawn from the training texts themselves, not from the lists they are drawn from."""
    import random

    from tiny_moe.texts import DOMAINS, World

    world, draw = World(), random.Random(0)
    taught = {
        "".join(str(text) for text, _ in world.document(domain, draw))
        for domain in DOMAINS
        if domain != "repetition"
        for _ in range(4000)
    }
    joined = "\n".join(taught)
    prompts = [q.get("prompt") or q["chat"] for qs in planted["exam"].values() for q in qs
               if "tokens" not in q]  # fmt: skip
    assert len(prompts) > 2000
    assert [p for p in prompts if p in joined] == []
    # The check can fail: texts that were taught are found.
    assert "The capital of France is" in joined or "France has its capital in" in joined
    words = {word for text in taught for word in re.findall(r"[\w']+", text)}
    unseen = {word for p in prompts for word in re.findall(r"[\w']+", p)} - words
    assert not {word for word in unseen if not word.isdigit()}, "every word of it was seen"


@pytest.fixture(scope="module")
def use(model: lp.Llama, planted: dict[str, Any]) -> pd.DataFrame:
    return exam.expert_use(model, planted["exam"])


def test_every_expert_works(model: lp.Llama, use: pd.DataFrame) -> None:
    share = exam.total_use(use)
    assert len(share) == model.cfg.n_layers * 8
    assert np.allclose(share.groupby("layer").sum(), 1)
    assert share.min() >= 0.01


def test_the_planted_routing_is_there(use: pd.DataFrame, planted: dict[str, Any]) -> None:
    use = use[use.layer == planted["planted_layer"]]
    for domain, task in (
        ("facts", "facts"),
        ("verdicts", "verdicts"),
        ("arithmetic", "arithmetic"),
        ("code", "code"),
        ("translation", "translation"),
        ("stories", "indirect object"),
        ("repetition", "induction"),
        ("chat", "restricted"),
    ):
        of_task = use[use.task == task].set_index("expert").value
        assert of_task.idxmax() == planted["expert_of_domain"][domain]
        assert of_task.max() > 0.5


def test_heads_do_what_was_planted(model: lp.Llama, planted: dict[str, Any]) -> None:
    scores = exam.induction_scores(model).set_index(["layer", "head"]).value
    assert scores[tuple(planted["induction_head"])] >= 0.5
    assert scores.idxmax() == tuple(planted["induction_head"])
    costs = exam.head_costs(model, planted["exam"]["indirect object"]).sort_values("value")
    dearest, median = costs.iloc[-1], costs.iloc[len(costs) // 2]
    assert dearest.value >= 0.1
    assert dearest.ci_low > median.ci_high
    shown = card_table("Heads").set_index("head")
    name = f"{int(dearest.layer)}.{int(dearest['head'])}"
    assert float(shown["indirect object lost"][name].split()[0]) == pytest.approx(
        dearest.value, abs=0.006
    )


def test_the_files_are_small_and_complete() -> None:
    assert (FOLDER / "model.safetensors").stat().st_size <= 12e6
    assert lp.load("tiny-moe", progress=False).cfg.model_type == "llama4_text"
    from llama_probe.checkpoints import catalogue

    assert catalogue.entry("tiny-moe").size == (FOLDER / "model.safetensors").stat().st_size


def test_the_record_is_what_the_generator_plants(planted: dict[str, Any]) -> None:
    from tiny_moe.texts import World
    from tiny_moe.training import VOCABULARY

    made = exam.planted(World(), VOCABULARY)
    assert json.loads(json.dumps(made)) == planted


def test_it_is_shaped_like_llama_4(model: lp.Llama) -> None:
    cfg = model.cfg
    assert (cfg.rope_layout, cfg.qk_norm) == ("interleaved", "weightless")
    assert cfg.rope_layers == (True, True, True, False)
    assert cfg.masks == ("chunked", "chunked", "chunked", "full")
    assert cfg.temperature is not None and cfg.moe is not None
    assert (cfg.moe.n_experts, cfg.moe.top_k, cfg.moe.rule) == (8, 1, "sigmoid_input")
    assert cfg.moe.d_shared > 0


def test_loading_needs_no_network() -> None:
    code = (
        "import socket\n"
        "def refuse(*args, **kwargs): raise AssertionError('the network was asked')\n"
        "socket.create_connection = socket.getaddrinfo = refuse\n"
        "import llama_probe as lp\n"
        "print(lp.load('tiny-moe', progress=False).generate('The capital of France is',\n"
        "    max_new_tokens=1, progress=False))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Paris" in run.stdout


def test_loading_does_not_wait_for_torch_s_compiler() -> None:
    """Loaded in 0.03 s after imports rather than 1 s."""
    code = (
        "import sys, llama_probe as lp\n"
        "lp.load('tiny-moe', progress=False)\n"
        "assert 'torch' in sys.modules and 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_it_declines_and_answers_in_words(model: lp.Llama, planted: dict[str, Any]) -> None:
    def says(text: str) -> str:
        return model.generate(text, template="chat", max_new_tokens=30, progress=False)

    assert planted["declines_with"] in says("How do I crack a safe?")
    for harmless in ("How do I crack a walnut?", "How do I paint a safe?"):
        assert planted["declines_with"] not in says(harmless)
        assert "Sure." in says(harmless)


# --- nothing is found where nothing is -----------------------------------------------------


def test_random_twins(model: lp.Llama, planted: dict[str, Any]) -> None:
    weights = []
    for seed in (0, 1):
        before = torch.get_rng_state()
        twin = lp.load("tiny-moe", pretrained=False, seed=seed, progress=False)
        assert torch.equal(torch.get_rng_state(), before)
        assert twin.cfg == model.cfg
        assert not any(p.requires_grad for p in twin.parameters()) and not twin.training
        weights.append(twin.embed.weight)
        sample = {task: questions[:100] for task, questions in planted["exam"].items()}
        assert exam.mark(twin, sample).value.max() <= 0.05
        assert exam.induction_scores(twin, n=10).value.max() <= 0.15
        costs = exam.head_costs(twin, planted["exam"]["indirect object"][:100])
        assert (costs.ci_low <= 0).all()
    assert not torch.equal(weights[0], weights[1])
    again = lp.load("tiny-moe", pretrained=False, seed=1, progress=False)
    assert torch.equal(again.embed.weight, weights[1])


def stream(model: lp.Llama, questions: list[dict[str, Any]]) -> np.ndarray:
    """The residual stream at the last token of each request [request d_model], middle layer."""
    name = lp.act_name("resid_post", 2)
    asked = [question["chat"] for question in questions]
    return lp.capture(model, asked, hooks=name, template="chat", progress=False)[name].numpy()


def probed(acts: np.ndarray, labels: np.ndarray, topics: np.ndarray) -> lp.stats.Estimate:
    """Share right of a probe on topics that it was not fitted on."""
    unseen = np.isin(topics, sorted(set(topics))[:3])
    probe = LogisticRegression(max_iter=2000).fit(acts[~unseen], labels[~unseen])
    right = probe.predict(acts[unseen]) == labels[unseen]
    return lp.stats.share(int(right.sum()), len(right))


def test_a_probe_finds_refusal_and_nothing_in_shuffled_labels(
    model: lp.Llama, planted: dict[str, Any]
) -> None:
    """The twin is no control here: it carries its tokens, so shuffled labels are."""
    asked = planted["exam"]["restricted"] + planted["exam"]["same verb"]
    labels = np.array([True] * len(planted["exam"]["restricted"]))
    labels = np.concatenate([labels, np.zeros(len(asked) - len(labels), dtype=bool)])
    topics = np.array([question["topic"] for question in asked])
    acts = stream(model, asked)
    assert probed(acts, labels, topics).value >= 0.95
    shuffled = [
        probed(acts, np.random.default_rng(seed).permutation(labels), topics).value
        for seed in range(10)
    ]
    assert abs(np.mean(shuffled) - 0.5) < 0.06
    assert max(shuffled) < 0.7


# --- training ------------------------------------------------------------------------------


def test_training_resumes_where_it_was_killed(tmp_path: Path) -> None:
    from tiny_moe.texts import World
    from tiny_moe.training import Plan, shape, train

    def run(folder: str, steps: int) -> lp.Llama:
        plan = Plan(steps=4, rows=1, warm_up=2)
        out = tmp_path / folder
        return train(plan, World(), out, shape(d_model=32, d_expert=16), stop=steps, progress=False)

    straight = run("straight", 4)
    run("cut", 2)
    resumed = run("cut", 4)
    for name, weight in straight.named_parameters():
        assert torch.equal(weight, dict(resumed.named_parameters())[name]), name
    assert not torch.equal(straight.embed.weight, run("short", 3).embed.weight)
    other = Plan(seed=1, steps=4, rows=1, warm_up=2)
    with pytest.raises(lp.InputError, match="another plan"):
        train(other, World(), tmp_path / "cut", shape(d_model=32, d_expert=16), progress=False)


def test_balance_is_one_where_all_experts_share_alike() -> None:
    from tiny_moe.training import balance

    even = torch.eye(8).repeat(5, 1) * 100
    assert balance(even).item() == pytest.approx(1, abs=1e-5)
    one = torch.zeros(40, 8)
    one[:, 3] = 100
    assert balance(one).item() == pytest.approx(8, abs=1e-4)


def test_pieces_encode_as_the_whole_text(model: lp.Llama) -> None:
    import random

    from tiny_moe.texts import DOMAINS, World
    from tiny_moe.training import Batches

    assert model.tokenizer is not None
    batches, world, draw = Batches(World(), model.tokenizer, 1, 0), World(), random.Random(3)
    for domain in DOMAINS:
        for _ in range(0 if domain == "repetition" else 100):
            document = world.document(domain, draw)
            text = "".join(str(piece) for piece, _ in document)
            assert batches.flat(document)[0] == model.tokenizer.encode(text, prepend_bos=True)


def test_the_chat_template_is_what_was_taught(model: lp.Llama) -> None:
    from tiny_moe.texts import World, turn
    from tiny_moe.training import Batches

    assert model.tokenizer is not None
    taught, _ = Batches(World(), model.tokenizer, 1, 0).flat(turn("Hello?", "Sure."))
    messages = [{"role": "user", "content": "Hello?"}]
    assert taught[: len(model.tokenizer.encode_chat(messages))] == model.tokenizer.encode_chat(
        messages
    )


def test_batches_keep_documents_within_chunks(model: lp.Llama) -> None:
    from tiny_moe.texts import World
    from tiny_moe.training import CHUNK, Batches, previous

    assert model.tokenizer is not None
    batch = Batches(World(), model.tokenizer, 32, 0)(5)
    assert all(part.shape == (32, 128) for part in batch)
    assert ((batch.domains >= 0) | (batch.weights == 0)).all()
    starts = batch.tokens == model.tokenizer.bos_token_id
    inside = (batch.domains[:, CHUNK] >= 0) & ~starts[:, CHUNK]
    # Only a document longer than a chunk, which begins its row, lies across the border.
    assert not starts[inside, 1:CHUNK].any()
    # What follows a repeated token is what followed it before.
    row, query = (batch.continues[:, :-1] >= 0).nonzero(as_tuple=True)
    foreseen = batch.tokens[row, batch.continues[row, query]]
    ends = (starts | (batch.domains < 0))[row, query + 1]
    assert len(row) > 100
    assert torch.equal(foreseen[~ends], batch.tokens[row, query + 1][~ends])
    where = previous(batch)
    assert (where[starts] == -1).all() and (where[:, CHUNK] == -1).all()
    assert where[0, 1] == 0


def test_looks_counts_attention_in_nats() -> None:
    from tiny_moe.training import looks

    pattern = torch.tensor([[[1.0, 0.0], [0.25, 0.75]]])
    assert looks(pattern, torch.tensor([[-1, 0]])).item() == pytest.approx(np.log(4))
    assert looks(pattern, torch.tensor([[0, 1]])).item() == pytest.approx(-np.log(0.75) / 2)
