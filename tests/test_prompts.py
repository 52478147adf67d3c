"""Prompts that we wrote: token counts, positions, splits, and whether a real model solves them."""

from importlib import import_module
from io import BytesIO
from itertools import product
from typing import Any

import pandas as pd
import pytest
import sentencepiece
import torch

import llama_probe as lp
from llama_probe import stats
from llama_probe.model.llama import Llama
from llama_probe.prompts import factual_pairs, indirect_object, planted
from llama_probe.prompts.tokens import token_of, tokenizer_of
from llama_probe.tokenizer import Tokenizer

# Each function hides the module of the same name.
stories = import_module("llama_probe.prompts.indirect_object")
facts = import_module("llama_probe.prompts.facts")

NAMES = ["Mary", "John", "Tom", "Anna", "Peter", "Lucy", "James", "Emma", "David", "Sarah"]


TEMPLATE = " Now {a} and {b} wait, and {giver} at the {place} gives a {gift} to"


@pytest.fixture(scope="module")
def model() -> Llama:
    return lp.load("tiny-moe", device="cpu")


@pytest.fixture(scope="module")
def sentencepiece_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A SentencePiece vocabulary learnt from the prompts, which puts a space before each text."""
    texts = [
        template.format(a=a, b=b, giver=a, place=place, gift=gift)
        for template, (a, b), (place, gift) in product(
            stories.TEMPLATES,
            zip(NAMES, NAMES[1:] + NAMES[:1], strict=True),
            [("store", "drink"), ("park", "ring")],
        )
    ]
    texts += [
        template.format(country) + f" {capital}"
        for (country, (capital, _, _)), template in product(
            facts.COUNTRIES.items(), facts.RELATIONS["capital"].templates
        )
    ]
    learnt = BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore
        sentence_iterator=iter(texts),
        model_writer=learnt,
        vocab_size=900,
        model_type="bpe",
        minloglevel=2,
    )
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "tokenizer.model").write_bytes(learnt.getvalue())
    return Tokenizer.from_folder(folder)


def refused(match: str, call: Any, *args: Any, **options: Any) -> None:
    with pytest.raises(lp.InputError, match=match):
        call(*args, **options)


@pytest.mark.parametrize("prepend_bos", [None, True, False])
@pytest.mark.parametrize("corruption", stories.CORRUPTIONS)
def test_positions_and_token_counts_of_indirect_objects(
    model: Llama, corruption: str, prepend_bos: bool | None
):
    pairs = indirect_object(model, 60, corruption=corruption, prepend_bos=prepend_bos)
    assert len(pairs) == pairs.clean.nunique() == 60
    for pair in pairs.itertuples():
        clean = model.to_str_tokens(pair.clean, prepend_bos)
        assert clean[pair.IO] == pair.answer and clean.count(pair.answer) == 1
        assert clean[pair.S1] == clean[pair.S2] == pair.foil and clean.count(pair.foil) == 2
        assert pair.S1 < pair.S2 < pair.end == len(clean) - 1
        assert (pair.IO < pair.S1) == (pair.order == "ABBA")
        corrupted = model.to_str_tokens(pair.corrupted, prepend_bos)
        assert len(corrupted) == len(clean)
        differing = [pos for pos in range(len(clean)) if clean[pos] != corrupted[pos]]
        match corruption:
            case "swap":
                assert differing == [pair.S2] and corrupted[pair.S2] == pair.answer
            case "new_name":
                assert differing == [pair.S2]
                assert corrupted[pair.S2] not in (pair.answer, pair.foil)
            case "new_names":
                assert differing == sorted([pair.IO, pair.S1, pair.S2])
                people = {corrupted[pos] for pos in differing}
                assert len(people) == 3 and not people & {pair.answer, pair.foil}


def test_answers_are_tokens_of_the_model(model: Llama):
    pairs = pd.concat([indirect_object(model, 30), factual_pairs(model, 30)])
    for text in [*pairs.answer, *pairs.foil]:
        model.to_single_token(text)


def test_the_clean_prompts_do_not_depend_on_the_corruption(model: Llama):
    cleans = [indirect_object(model, 20, corruption=kind).clean for kind in stories.CORRUPTIONS]
    assert cleans[0].equals(cleans[1]) and cleans[0].equals(cleans[2])


@pytest.mark.parametrize("draw", [indirect_object, factual_pairs])
def test_the_seed_decides(model: Llama, draw: Any):
    pairs = draw(model, 40)
    assert pairs.equals(draw(model, 40)) and pairs[:15].equals(draw(model, 15))
    assert not pairs.equals(draw(model, 40, seed=1))
    assert pairs.equals(draw(model.tokenizer, 40))


def test_templates_and_orders_take_turns(model: Llama):
    pairs = indirect_object(model, 2 * len(stories.TEMPLATES))
    assert (pairs.groupby(["template", "order"]).size() == 1).all()
    assert set(indirect_object(model, 30, order="BABA").order) == {"BABA"}
    assert len(stories.TEMPLATES) >= 15


def test_training_and_test_prompts_share_neither_template_nor_name(model: Llama):
    train, test = (indirect_object(model, 300, split=split) for split in ("train", "test"))
    people = [
        {word for text in frame.corrupted for word in text.replace(",", " ").split()}
        & set(stories.NAMES)
        for frame in (train, test)
    ]
    assert all(people) and not people[0] & people[1]
    assert set(train.template) == set(range(len(stories.TRAIN)))
    assert set(test.template) == set(range(len(stories.TRAIN), len(stories.TEMPLATES)))
    assert {text.rstrip(".,:") for text in stories.TRAIN}.isdisjoint(stories.TEST)


def test_the_split_of_the_names_is_the_same_for_every_tokenizer(model: Llama, tiny_tokenizer):
    of_tiny_moe, of_bytes = (
        stories._usable(tokenizer, "names", None, stories.NAMES, "train")
        for tokenizer in (tokenizer_of(model), tiny_tokenizer)
    )
    assert set(of_bytes) == {"Mary"} < set(of_tiny_moe)


def test_every_template_is_well_formed():
    parts = dict(a="Ada", b="Bob", giver="Sue", place="pond", gift="gem")
    for template in stories.TEMPLATES:
        text = template.format(**parts)
        assert all(f" {word}" in text for word in parts.values())
        assert template.index("{a}") < template.index("{b}") < template.index("{giver}")
        assert "a {gift}" in template and "the {place}" in template
    assert not [gift for gift in stories.GIFTS if gift[0] in "aeiou"]
    for words in (stories.NAMES, stories.PLACES, stories.GIFTS, stories.TEMPLATES):
        assert len(set(words)) == len(words)


def test_words_of_ones_own(model: Llama):
    truth = planted()
    own = {kind: truth[kind] for kind in ("names", "places", "gifts")}
    pairs = indirect_object(model, 200, **own)
    assert {f" {name}" for name in truth["names"]} >= {*pairs.answer, *pairs.foil}
    assert any("harbour" in text for text in pairs.clean)
    few = indirect_object(model, 20, places=["zoo"], gifts=["ring"], names=NAMES)
    assert all("zoo" in text and "ring" in text for text in few.clean)


def test_templates_of_ones_own(model: Llama):
    # One story begins with a name, which is another token there.
    own = [story for story in planted()["stories"] if not story.startswith("{")]
    pairs = indirect_object(model, 100, templates=own)
    assert set(pairs.template) == set(range(len(own)))
    sides = [indirect_object(model, 20, templates=own, split=side) for side in ("train", "test")]
    assert [set(side.template) for side in sides] == [{0, 2, 4}, {1, 3}]
    difference = pd.Series(logit_differences(model, pairs))
    assert (difference > 0).mean() > 0.9


def test_every_different_prompt_can_be_had_and_no_more(model: Llama):
    own = dict(names=NAMES, places=["zoo"], gifts=["ring"], order="ABBA", split="all")
    most = len(stories.TEMPLATES) * 90
    refused(rf"n is {most + 1}, but there are {most} different prompts", indirect_object,
            model, most + 1, **own)  # fmt: skip
    assert indirect_object(model, most, **own).clean.nunique() == most


def test_patching_takes_the_columns(model: Llama):
    pairs = indirect_object(model, 6, split="test")
    frame = lp.patch(
        model,
        pairs.clean.tolist(),
        pairs.corrupted.tolist(),
        metric=lp.logit_diff(pairs.answer.tolist(), pairs.foil.tolist()),
        positions={"S1": pairs.S1.tolist(), "S2": pairs.S2.tolist()},
    )
    # Before the first layer the pair differs at S2 alone.
    first = frame[frame.layer == 0].set_index("pos").effect
    assert first["S2"] == pytest.approx(1, abs=1e-3) and first["S1"] == pytest.approx(0, abs=1e-3)


def test_sentencepiece(sentencepiece_tokenizer: Tokenizer):
    own = dict(names=NAMES, places=["store", "park"], gifts=["drink", "ring"])
    pairs = indirect_object(sentencepiece_tokenizer, 40, **own)
    for pair in pairs.itertuples():
        tokens = sentencepiece_tokenizer.str_tokens(sentencepiece_tokenizer.encode(pair.clean))
        assert (tokens[pair.IO], tokens[pair.S2]) == (pair.answer, pair.foil)
    for pair in factual_pairs(sentencepiece_tokenizer, 20, "capital").itertuples():
        ids = sentencepiece_tokenizer.encode(pair.clean)[pair.subject_first : pair.subject_last + 1]
        assert sentencepiece_tokenizer.decode(ids).strip() == pair.subject


@pytest.mark.parametrize("prepend_bos", [None, False])
@pytest.mark.parametrize("relation", [None, *facts.RELATIONS])
def test_facts(model: Llama, relation: str | None, prepend_bos: bool | None):
    pairs = factual_pairs(model, 100, relation, prepend_bos=prepend_bos)
    assert len(pairs.drop_duplicates(["clean", "corrupted"])) == 100
    assert set(pairs.relation) == (set(facts.RELATIONS) if relation is None else {relation})
    for pair in pairs.itertuples():
        template = facts.RELATIONS[pair.relation].templates[pair.template]
        assert pair.clean == template.format(pair.subject)
        assert pair.corrupted == template.format(pair.corrupted_subject)
        answers = facts.RELATIONS[pair.relation].answers
        assert pair.answer == f" {answers[pair.subject]}" != pair.foil
        assert pair.foil == f" {answers[pair.corrupted_subject]}"
        for text, subject in [(pair.clean, pair.subject), (pair.corrupted, pair.corrupted_subject)]:
            tokens = model.to_str_tokens(text, prepend_bos)
            span = tokens[pair.subject_first : pair.subject_last + 1]
            assert "".join(span) == f" {subject}"
            assert len(tokens) == pair.end + 1


def test_subjects_of_several_tokens(tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    answers = {"oak": "Mary", "elm": "John", "willow": "John", "pine": "Paul"}
    relation = facts.Relation(("Under the {} sits",), answers)
    monkeypatch.setitem(facts.RELATIONS, "sits", relation)
    pairs = factual_pairs(tiny_tokenizer, 2, "sits")  # " Paul" is no single token of this one
    assert set(pairs.subject) == {"oak", "elm"}
    assert (pairs.subject_last - pairs.subject_first + 1 == len(" oak")).all()
    refused("n is 3, but this tokenizer has 2 pairs of sits", factual_pairs,
            tiny_tokenizer, 3, "sits")  # fmt: skip


def test_facts_agree_with_what_tiny_moe_was_taught():
    ours = {
        (name, subject): answer
        for name, relation in facts.RELATIONS.items()
        for subject, answer in relation.answers.items()
    }
    taught = {(fact["relation"], fact["subject"]): fact["answer"] for fact in planted()["facts"]}
    both = ours.keys() & taught.keys()
    assert len(both) > 100
    assert {key: ours[key] for key in both} == {key: taught[key] for key in both}


def test_token_of(tiny_tokenizer: Tokenizer, sentencepiece_tokenizer: Tokenizer):
    assert tiny_tokenizer.str_tokens([token_of(tiny_tokenizer, "Mary")]) == [" Mary"]
    assert token_of(tiny_tokenizer, "Paul") is None
    mary = token_of(sentencepiece_tokenizer, "Mary")
    assert sentencepiece_tokenizer.str_tokens([mary]) == [" Mary"]


@pytest.mark.parametrize("draw", [indirect_object, factual_pairs])
def test_wrong_models_and_numbers(model: Llama, draw: Any):
    without = Llama(lp.LlamaConfig(n_layers=1, d_model=8, n_heads=2, d_mlp=8, d_vocab=9))
    refused("this model has no tokenizer", draw, without)
    refused("of type str, but should be a model or a Tokenizer", draw, "tiny-moe")
    for n in (0, -1):
        refused(f"n is {n}, but should be a whole number of prompts", draw, model, n)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"order": "AABB"}, "order is 'AABB', but should be one of both, ABBA, BABA"),
        (
            {"corruption": "noise"},
            "corruption is 'noise', but should be one of swap, new_name",
        ),
        ({"split": "dev"}, "split is 'dev', but should be one of all, train, test"),
        ({"names": [*NAMES, "Zebulon"]}, "names should be one token each.* not so 'Zebulon'"),
        ({"names": [f"Zebulon {i}" for i in range(12)]}, "'Zebulon 7' and 4 more"),
        (
            {"names": NAMES[:9]},
            r"names \(split 'all'\) 9 can be used, but .* least 10: pass",
        ),
        ({"names": NAMES, "split": "test"}, r"\(split 'test'\) 5 can be used"),
        ({"places": []}, "of the places .* 0 can be used, but it takes at least 1"),
        ({"gifts": ["Mary"], "names": NAMES}, "or a name is also another word of the prompt"),
        ({"gifts": "ring"}, "gifts is the text 'ring', but should be a list"),
        ({"templates": "When {a}"}, "templates is the text 'When {a}', but should be a list"),
        ({"templates": ["When {a"]}, "template 'When {a' is malformed: expected '}'"),
        ({"templates": ["Now {a} and {b}"]}, "has the parts a, b, but should have {a}, {b} and {g"),
        ({"templates": ["{a} and" + TEMPLATE]}, "parts a, a, b, giver, place, gift"),
        ({"templates": [TEMPLATE.replace("{b}", "{giver}")]}, "parts a, giver, giver, place"),
        ({"templates": [TEMPLATE.removeprefix(" Now ")]}, "no space before it, but should"),
        ({"templates": [TEMPLATE], "split": "test"}, "templates has none for the split 'test'"),
    ],
)
def test_wrong_arguments_for_indirect_objects(model: Llama, options: Any, match: str):
    refused(match, indirect_object, model, **options)


def test_a_vocabulary_with_too_few_names(tiny_tokenizer: Tokenizer):
    refused(r"2 can be used.*; no single token are 'Tom', 'Anna'.* more: pass names=",
            indirect_object, tiny_tokenizer)  # fmt: skip


def test_an_unknown_relation(model: Llama):
    refused("relation is 'captial', .*opposite, kind; did you mean 'capital'",
            factual_pairs, model, 5, "captial")  # fmt: skip


@torch.no_grad()
def logit_differences(model: Llama, pairs: pd.DataFrame) -> list[float]:
    found = []
    for start in range(0, len(pairs), 48):
        part = pairs[start : start + 48]
        tokens, mask = model.tokens_and_mask(part.clean.tolist())
        logits = model(tokens, attention_mask=mask, logits_at=-1)[:, -1]
        answers, foils = (
            torch.tensor([[model.to_single_token(text)] for text in texts])
            for texts in (part.answer, part.foil)
        )
        found += (logits.gather(1, answers) - logits.gather(1, foils)).flatten().tolist()
    return found


@pytest.mark.slow
def test_smollm2_solves_held_out_indirect_objects(smollm2: Llama):
    pairs = indirect_object(smollm2, 240, split="test")
    difference = pd.Series(logit_differences(smollm2, pairs))
    right = stats.share(int((difference > 0).sum()), len(pairs))
    assert right.value >= 0.9
    assert stats.mean(difference.to_numpy()).ci_low > 3
