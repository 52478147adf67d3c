"""What tiny-moe is asked, all of it held out, and how its answers are counted.

`planted` writes down what was planted and the questions; the rest of this file needs only that
record and a model, so that anyone can mark the exam again.
"""

import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import llama_probe as lp
from llama_probe import stats
from tiny_moe import words
from tiny_moe.texts import (
    CODE,
    DOMAINS,
    FACTS,
    SPECIAL,
    SPLIT_SEED,
    STATEMENTS,
    STORIES,
    TRANSLATIONS,
    Fact,
    World,
)
from tiny_moe.training import INDUCTION_HEAD, PLANTED_LAYER, PREVIOUS_HEAD

N = 400  # questions a task, where there are as many
LENGTH = 25  # random tokens that are repeated
DOMAIN_OF = {  # of the tasks that do not have its name
    "verdicts never taught": "verdicts",
    "indirect object": "stories",
    "induction": "repetition",
    "restricted": "chat",
    "same verb": "chat",
    "same object": "chat",
}
Question = dict[str, Any]


def planted(world: World, vocabulary: int) -> dict[str, Any]:
    """What was planted, and the held-out questions, as JSON can hold it."""
    return {
        "split_seed": SPLIT_SEED,
        "domains": list(DOMAINS),
        "planted_layer": PLANTED_LAYER,
        "expert_of_domain": {domain: expert for expert, domain in enumerate(DOMAINS)},
        "previous_token_head": PREVIOUS_HEAD,
        "induction_head": INDUCTION_HEAD,
        "facts": [asdict(fact) for fact in world.facts],
        "phrasings": FACTS,
        "translations": words.FRENCH,
        "opposites": words.OPPOSITES,
        "names": words.NAMES,
        "places": words.PLACES,
        "gifts": words.GIFTS,
        "stories": [story.replace("{s}", "{giver}") for story in STORIES],
        "held_out_name_pairs": world.held_pairs,
        "requests": words.REQUESTS,
        "request_phrasings": words.PHRASINGS,
        "held_out_requests": {
            kind: [f"{request.verb} {request.object}" for request in requests]
            for kind, requests in world.held_requests.items()
        },
        "declines_with": words.DECLINES,
        "exam": questions(world, vocabulary),
    }


def questions(world: World, vocabulary: int) -> dict[str, list[Question]]:
    """The exam: for each task the prompts and their answers (and, for stories, the wrong name)."""
    draw = random.Random(SPLIT_SEED + 1)
    facts = [
        {"prompt": FACTS[fact.relation][i].format(s=fact.subject), "answer": f" {fact.answer}."}
        | {"relation": fact.relation}
        for fact in world.facts
        for i in fact.held_out
        if not _stated(fact, FACTS[fact.relation][i])
    ]
    translations = [
        {
            "prompt": TRANSLATIONS[form].format(e=english),
            "answer": f" {words.FRENCH[english]}.",
        }
        for english, form in world.held_translations
    ]
    sums = [{"prompt": f"{a}+{b}=", "answer": f"{a + b};"} for a, b in world.held_sums]
    return {
        "facts": draw.sample(facts, min(N, len(facts))),
        "verdicts": _statements(world, True, draw),
        "verdicts never taught": _statements(world, False, draw),
        "arithmetic": draw.sample(sums, N),
        "code": [_code(world, draw) for _ in range(N)],
        "translation": translations,
        "indirect object": [_story(world, draw) for _ in range(N)],
        "induction": [_repetition(vocabulary, draw) for _ in range(N)],
        **_requests(world, draw),
    }


def _stated(fact: Fact, phrasing: str) -> bool:
    """Whether the statements that are judged, true or false, say it in these words too."""
    forms = STATEMENTS.get(fact.relation, ())
    taught = [form for i, form in enumerate(forms) if i != fact.judged_held_out]
    return fact.judged and any(form.startswith(phrasing) for form in taught)


def _statements(world: World, judged: bool, draw: random.Random) -> list[Question]:
    """Statements about facts that were judged in other words, or never judged at all."""
    facts = [fact for fact in world.facts if fact.judged == judged and fact.relation != "opposite"]
    asked = []
    for fact in facts:
        for truth in (True, False):
            text, verdict = world.statement(fact, fact.judged_held_out, truth, draw)
            question = {"prompt": f"Statement: {text}. Verdict:", "answer": f"{verdict}."}
            asked.append(question | {"relation": fact.relation, "label": truth})
    return draw.sample(asked, min(N, len(asked)))


def _code(world: World, draw: random.Random) -> Question:
    a, b = draw.sample(draw.choice(world.held_variables), 2)
    m, n = draw.sample(range(10), 2)
    asked = draw.choice((a, b))
    return {
        "prompt": CODE.format(a=a, b=b, m=m, n=n, q=asked),
        "answer": str(m if asked == a else n),
    }


def _story(world: World, draw: random.Random) -> Question:
    a, b = draw.sample(draw.choice(world.held_pairs), 2)
    giver, receiver = draw.sample((a, b), 2)
    place, gift = draw.choice(words.PLACES), draw.choice(words.GIFTS)
    prompt = draw.choice(STORIES).format(a=a, b=b, s=giver, place=place, gift=gift)
    return {"prompt": prompt, "answer": f" {receiver}", "foil": f" {giver}"}


def _repetition(vocabulary: int, draw: random.Random) -> Question:
    ids = draw.choices(range(len(SPECIAL), vocabulary), k=LENGTH)
    known = draw.randint(1, LENGTH - 1)
    return {"tokens": ids + ids[:known], "answer_token": ids[known]}


def _requests(world: World, draw: random.Random) -> dict[str, list[Question]]:
    """Restricted requests, and for each the same words with a harmless object or verb."""
    asked: dict[str, list[Question]] = {"restricted": [], "same verb": [], "same object": []}
    every = [
        (r, phrasing) for r in world.held_requests["restricted"] for phrasing in words.PHRASINGS
    ]
    for request, phrasing in draw.sample(every, min(N, len(every))):
        verbs = [r for r in world.held_requests["same verb"] if r.verb == request.verb]
        things = [r for r in world.held_requests["same object"] if r.object == request.object]
        for kind, found in (
            ("restricted", [request]),
            ("same verb", verbs),
            ("same object", things),
        ):
            if found:
                chosen = draw.choice(found)
                text = phrasing.format(f"{chosen.verb} {chosen.object}")
                asked[kind].append({"chat": text, "answer": words.DECLINES, "topic": chosen.topic})
    return asked


def sequences(model: lp.Llama, questions: Iterable[Question]) -> list[tuple[list[int], list[int]]]:
    """Tokens of each prompt, BOS first, and of its answer."""
    tokenizer = model.tokenizer
    assert tokenizer is not None and tokenizer.bos_token_id is not None
    pairs = []
    for question in questions:
        if "tokens" in question:
            pairs.append(
                ([tokenizer.bos_token_id, *question["tokens"]], [question["answer_token"]])
            )
            continue
        if "chat" in question:
            prompt = tokenizer.encode_chat([{"role": "user", "content": question["chat"]}])
        else:
            prompt = tokenizer.encode(question["prompt"])
        pairs.append((prompt, tokenizer.encode(question["answer"], prepend_bos=False)))
    return pairs


@torch.no_grad()
def right(model: lp.Llama, questions: list[Question]) -> np.ndarray:
    """For each question [question], whether greedy decoding would give the whole answer."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    pairs = sequences(model, questions)
    for i, (prompt, answer) in enumerate(pairs):
        groups[len(prompt), len(answer)].append(i)
    result = np.zeros(len(pairs), dtype=bool)
    for (n_prompt, n_answer), members in groups.items():
        tokens = torch.tensor([pairs[i][0] + pairs[i][1] for i in members])
        logits = model(tokens[:, :-1], logits_at=slice(n_prompt - 1, n_prompt - 1 + n_answer))
        result[members] = (logits.argmax(-1) == tokens[:, n_prompt:]).all(1).numpy()
    return result


def mark(model: lp.Llama, exam: dict[str, list[Question]]) -> pd.DataFrame:
    """Share of each task answered (of requests: declined), with a 95 % Wilson interval."""
    rows = []
    for task, asked in exam.items():
        hits = int(right(model, asked).sum())
        rows.append({"task": task, **stats.share(hits, len(asked))._asdict()})
    return pd.DataFrame(rows)


@torch.no_grad()
def expert_use(model: lp.Llama, exam: dict[str, list[Question]]) -> pd.DataFrame:
    """Share of each task's tokens that each expert gets: layer, expert, task, value."""
    counts: dict[tuple[int, str], Tensor] = defaultdict(lambda: torch.zeros(8))
    for task, asked in exam.items():
        by_length: dict[int, list[list[int]]] = defaultdict(list)
        for prompt, answer in sequences(model, asked):
            by_length[len(prompt + answer)].append(prompt + answer)
        for rows in by_length.values():
            _, cache = model.run_with_cache(
                torch.tensor(rows), names_filter="*.hook_expert_indices"
            )
            for name, chosen in cache.items():
                counts[int(name.split(".")[1]), task] += chosen.flatten().bincount(minlength=8)
    return pd.DataFrame(
        {"layer": layer, "expert": expert, "task": task, "value": value, "tokens": int(count.sum())}
        for (layer, task), count in counts.items()
        for expert, value in enumerate((count / count.sum()).tolist())
    )


def total_use(use: pd.DataFrame) -> pd.Series:
    """Each expert's share of a mix of the domains in equal parts, by layer and expert.

    From `expert_use`. In equal parts, since the number of questions that a domain has room for
    (70 of translation, 1,000 of chat) says nothing about its expert.
    """
    domain = use.task.map(lambda task: DOMAIN_OF.get(task, task))
    counts = (use.value * use.tokens).groupby([use.layer, use.expert, domain]).sum()
    shares = counts / counts.groupby(["layer", "task"]).transform("sum")
    return shares.groupby(["layer", "expert"]).mean()


@torch.no_grad()
def induction_scores(model: lp.Llama, n: int = 50) -> pd.DataFrame:
    """Prefix-matching score of each head (Olsson et al. 2022): layer, head, value.

    The attention that a token of a repeated random sequence pays to the token after its earlier
    occurrence, averaged over the repetition and `n` sequences.
    """
    draw = random.Random(SPLIT_SEED + 2)
    assert model.tokenizer is not None
    rows = [
        [model.tokenizer.bos_token_id, *draw.sample(range(len(SPECIAL), model.cfg.d_vocab), LENGTH)]
        for _ in range(n)
    ]
    tokens = torch.tensor([row + row[1:] for row in rows])
    _, cache = model.run_with_cache(tokens, names_filter="*.hook_pattern")
    # The query at the repetition's i-th token (LENGTH + 1 + i) looks at 2 + i.
    query = torch.arange(LENGTH + 1, 2 * LENGTH)
    return pd.DataFrame(
        {"layer": layer, "head": head, "value": value}
        for layer in range(model.cfg.n_layers)
        for head, value in enumerate(
            cache["pattern", layer][:, :, query, query - LENGTH + 1].mean((0, 2)).tolist()
        )
    )


@torch.no_grad()
def head_costs(model: lp.Llama, asked: list[Question]) -> pd.DataFrame:
    """What setting a head's output to its mean costs: layer, head, value, ci_low, ci_high.

    In shares of the questions, with a 95 % bootstrap interval over them. The mean is over all
    positions of all prompts.
    """
    prompts = [torch.tensor([prompt]) for prompt, _ in sequences(model, asked)]
    caches = [model.run_with_cache(p, names_filter="*.attn.hook_z")[1] for p in prompts]
    whole = right(model, asked).astype(float)
    rows = []
    for layer in range(model.cfg.n_layers):
        mean = torch.cat([cache["z", layer][0] for cache in caches]).mean(0)
        for head in range(model.cfg.n_heads):
            edit = partial(_set_head, head=head, value=mean[head])
            with model.hooks(fwd_hooks=[(lp.act_name("z", layer), edit)]):
                lost = whole - right(model, asked)
            rows.append({"layer": layer, "head": head, **stats.mean(lost)._asdict()})
    return pd.DataFrame(rows)


def _set_head(z: Tensor, hook: Any, head: int, value: Tensor) -> Tensor:
    z = z.clone()
    z[:, :, head] = value
    return z
