"""Contrast sets: their facts and balance, what says nothing about a label, and a real model."""

from collections import Counter
from collections.abc import Callable
from difflib import SequenceMatcher
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier

import llama_probe as lp
from llama_probe.prompts import contrast_set, facts, language, number, sentiment, tense, true_false
from llama_probe.prompts.truth import TOPICS

SETS = {"true_false": true_false, "sentiment": sentiment, "language": language,
        "tense": tense, "number": number}  # fmt: skip
ROWS = {"text": ["Fire.", "Ice.", "Day.", "Night."], "label": [0, 1, 0, 1], "group": [0, 0, 1, 1]}


@pytest.fixture(scope="module")
def statements() -> pd.DataFrame:
    return true_false()


def known(topic: str) -> dict[str, str]:
    """The facts of a topic: what each subject's right answer is."""
    frame = true_false(topic)
    pairs = frame[["subject", "correct"]].drop_duplicates()
    assert pairs.subject.is_unique
    return dict(zip(pairs.subject, pairs.correct, strict=True))


def cross_validated(classifier: Any, x: Any, frame: pd.DataFrame, by: str = "group") -> float:
    folds = GroupKFold(5, shuffle=True, random_state=0)
    return cross_val_score(
        classifier, x, frame.label.tolist(), groups=frame[by].tolist(), cv=folds
    ).mean()


def n_grams(frame: pd.DataFrame, by: str = "group", *, characters: bool = False) -> float:
    """What one and two words say about the label, or one to three characters."""
    if characters:
        counts = CountVectorizer(analyzer="char", ngram_range=(1, 3))
    else:
        counts = CountVectorizer(ngram_range=(1, 2), token_pattern=r"\w+")
    return cross_validated(
        make_pipeline(counts, LogisticRegression()), frame.text.tolist(), frame, by
    )


def numbers_only(frame: pd.DataFrame, features: Callable[[Any], list[float]]) -> float:
    """The better of a linear and a nonlinear classifier on a few numbers for each row."""
    x = np.array([features(row) for row in frame.itertuples()], dtype=float)
    linear = make_pipeline(StandardScaler(), LogisticRegression())
    tree = DecisionTreeClassifier(max_depth=3, random_state=0)
    return max(cross_validated(classifier, x, frame) for classifier in (linear, tree))


@pytest.mark.parametrize("name", SETS)
def test_every_set_has_one_shape(name: str):
    frame = SETS[name]()
    assert len(frame) >= 100 and frame.equals(SETS[name]())
    assert list(frame)[:3] == ["text", "label", "group"]
    assert frame.equals(contrast_set(frame))
    assert not frame.isna().any(axis=None)
    for text in frame.text:
        assert text[0] == text[0].upper() and text.endswith(".") and text == text.strip()
        assert not any(part in text for part in ("  ", "{", "}", "_", ".."))


def test_topics_are_large_enough(statements: pd.DataFrame):
    sizes = statements[~statements.negated & (statements.template == 0)].groupby("topic")
    assert (sizes.size() >= 100).all() and (sizes.subject.nunique() >= 50).all()
    assert set(statements.topic) == set(TOPICS) and len(TOPICS) == 5
    assert (statements.groupby("topic").template.nunique() >= 2).all()


def test_subjects_and_answers_are_true_as_often_as_false(statements: pd.DataFrame):
    wording = ["topic", "template", "negated"]
    for part in ("subject", "answer", "group"):
        counts = pd.crosstab([statements[key] for key in [*wording, part]], statements.label)
        assert (counts[0] == counts[1]).all(), part
    within = pd.crosstab(
        [statements[key] for key in [*wording, "group", "answer"]], statements.label
    )
    assert (within == 1).all(axis=None)


def test_denying_a_statement_turns_its_label(statements: pd.DataFrame):
    key = ["topic", "subject", "answer", "template"]
    affirmed, denied = (statements[statements.negated == side] for side in (False, True))
    both = affirmed.merge(denied, on=key, suffixes=("", "_denied"), validate="one_to_one")
    assert len(both) == len(affirmed) == len(denied)
    assert (both.label + both.label_denied == 1).all()
    assert (affirmed.label == (affirmed.answer == affirmed.correct)).all()
    assert denied.text.str.contains(" not ").all() and not affirmed.text.str.contains(" not ").any()


def test_two_facts_make_a_group(statements: pd.DataFrame):
    for group, rows in statements.groupby("group"):
        assert rows.subject.nunique() == rows.correct.nunique() == rows.answer.nunique() == 2
        assert rows.topic.nunique() == 1 and group == " / ".join(rows.subject.unique())


@pytest.mark.parametrize("topic", ["capitals", "elements", "translations"])
def test_no_two_subjects_have_one_answer(topic: str):
    assert max(Counter(known(topic).values()).values()) == 1


def test_facts_that_can_be_computed_or_are_known_elsewhere():
    for subject, answer in known("sums").items():
        one, other = map(int, subject.split(" and "))
        assert one + other == int(answer)
    assert sorted(map(int, known("elements").values())) == list(range(1, 81))
    capitals = {country: capital for country, (capital, _, _) in facts.COUNTRIES.items()}
    for topic, others in [("capitals", capitals), ("animals", facts._KINDS)]:
        ours = known(topic)
        shared = ours.keys() & others.keys()
        assert len(shared) >= 8
        assert all(ours[subject] == others[subject] for subject in shared)


def test_a_wrong_sum_is_not_absurd():
    frame = true_false("sums")
    parts = frame.subject.str.split(" and ", expand=True).astype(int)
    assert (frame.answer.astype(int) > parts.max(axis=1)).all()
    assert ((frame.answer.astype(int) - frame.correct.astype(int)).abs() <= 10).all()


@pytest.mark.parametrize("topic", TOPICS)
def test_the_surface_of_a_statement_says_nothing(topic: str):
    frame = true_false(topic, negated=False)
    assert n_grams(frame) == pytest.approx(0.5, abs=0.02)
    assert n_grams(frame, characters=True) == pytest.approx(0.5, abs=0.02)
    assert n_grams(true_false(topic)) == pytest.approx(0.5, abs=0.02)
    assert numbers_only(frame, lambda row: [len(row.text), len(row.text.split())]) <= 0.55

    def likeness(row: Any) -> list[float]:
        match = SequenceMatcher(None, row.answer.lower(), row.subject.lower())
        return [match.ratio(), match.find_longest_match().size, row.answer[0] == row.subject[0]]

    assert numbers_only(frame, likeness) <= 0.6


@pytest.mark.parametrize("topic", TOPICS)
def test_folds_by_subject_leak_backwards(topic: str):
    assert n_grams(true_false(topic, negated=False), by="subject") <= 0.4


def test_topics_and_denials_can_be_had_alone(statements: pd.DataFrame):
    for topic in TOPICS:
        rows = statements[statements.topic == topic].reset_index(drop=True)
        assert true_false(topic).equals(rows)
        for negated in (True, False):
            part = rows[rows.negated == negated].reset_index(drop=True)
            assert true_false(topic, negated).equals(part)


def test_words_do_not_give_sentences_away():
    assert n_grams(sentiment()) <= 0.6
    for frame in (tense(), number()):
        assert n_grams(frame) == pytest.approx(0.5, abs=0.02)
    for frame in (sentiment(), tense(), number()):
        assert numbers_only(frame, lambda row: [len(row.text), len(row.text.split())]) <= 0.6


@pytest.mark.parametrize("draw", [tense, number])
def test_one_word_differs_and_no_other_sentence_has_it(draw: Callable[[], pd.DataFrame]):
    frame = draw()
    words = Counter(word for text in frame.text for word in text.lower().strip(".").split())
    assert all(words[word] == 1 for word in frame.word)
    for _, rows in frame.groupby("group"):
        one, other = (text.split() for text in rows.text)
        differing = [pair for pair in zip(one, other, strict=True) if pair[0] != pair[1]]
        assert differing == [tuple(rows.word)] or differing == [tuple(rows.word + ".")]


def test_regular_forms_have_the_ending_and_irregular_ones_do_not():
    past = tense().query("label == 'past'")
    assert (past.word.str.endswith("ed") == (past.form == "regular")).all()
    plural = number().query("label == 'plural'")
    for word, one, form in zip(plural.word, plural.group, plural.form, strict=True):
        assert (word in (one + "s", one + "es", one[:-1] + "ies")) == (form == "regular"), word
    for frame in (past, plural):
        assert Counter(frame.form) == {"regular": 40, "irregular": 40}


def test_translations_of_one_sentence_share_their_group():
    frame = language()
    assert set(frame.label) == {"English", "French", "German", "Spanish"}
    assert (frame.groupby("group").label.nunique() == 4).all()
    english = frame[frame.label == "English"]
    assert (english.text == english.group).all()


def test_sentiment_has_domains():
    frame = sentiment()
    assert frame.domain.nunique() == 8 and (frame.groupby("group").domain.nunique() == 1).all()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"label": None}, "lacks 'label'; it has 'text', 'group'"),
        ({"text": ["Fire.", " ", "Day.", "Night."]}, "row 1 of the contrast set has no text"),
        ({"text": ["Fire.", "Ice.", "Day.", None]}, "row 3 of the contrast set has no text"),
        ({"text": ["Fire.", "Ice.", "Fire.", "Night."]}, "stands there once, but not 'Fire.'"),
        ({"label": [0, 1, 0, None]}, "row 3 of the contrast set has no label or no group"),
        ({"group": [0, 0, None, 1]}, "row 2 of the contrast set has no label or no group"),
        ({"label": [1, 1, 1, 1]}, "needs two labels or more, but has 1"),
        ({"label": [0, 1, 0, 0]}, "every label equally often, but not these: '1'"),
        ({"group": [0, 1, 0, 1]}, "but not these: '0', '1'"),
    ],
)
def test_what_is_no_contrast_set(changes: dict[str, Any], match: str):
    columns = {key: value for key, value in (ROWS | changes).items() if value is not None}
    with pytest.raises(lp.InputError, match=match):
        contrast_set(pd.DataFrame(columns))


def test_other_columns_and_any_order_of_rows_are_kept():
    rows = pd.DataFrame({"kind": list("abcd"), **ROWS}).iloc[[2, 0, 1, 3]]
    frame = contrast_set(rows)
    assert list(frame) == ["text", "label", "group", "kind"]
    assert frame.kind.tolist() == list("cabd") and frame.index.tolist() == [0, 1, 2, 3]


def test_an_unknown_topic():
    with pytest.raises(lp.InputError, match="topic is 'capitols', .*; did you mean 'capitals'"):
        true_false("capitols")


@pytest.mark.slow
@torch.no_grad()
def test_smollm2_knows_animals_and_takes_denials_for_affirmations(smollm2: lp.Llama):
    frame = true_false("animals").query("template == 0").reset_index(drop=True)
    hook = lp.act_name("resid_pre", 12)
    parts = []
    for start in range(0, len(frame), 60):
        tokens, mask = smollm2.tokens_and_mask(frame.text[start : start + 60].tolist())
        _, cache = smollm2.run_with_cache(
            tokens, attention_mask=mask, names_filter=hook, stop_at_layer=13
        )
        parts.append(cache[hook][:, -1])
    x, y = torch.cat(parts).numpy(), frame.label.to_numpy()
    affirmed = ~frame.negated.to_numpy()
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    assert cross_validated(probe, x[affirmed], frame[affirmed]) >= 0.8
    held_out = frame.group.isin(frame.group.unique()[::2]).to_numpy()
    probe.fit(x[affirmed & ~held_out], y[affirmed & ~held_out])
    scores = probe.decision_function(x[~affirmed & held_out])
    assert roc_auc_score(y[~affirmed & held_out], scores) <= 0.25
