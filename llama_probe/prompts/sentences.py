"""Sentences with a known feeling, language, tense or number, in matched groups, written by us."""

import pandas as pd

from llama_probe.prompts.contrast import by_column, by_gap


def sentiment() -> pd.DataFrame:
    """Short reviews and remarks, one positive and one negative for each of 80 subjects.

    Returns:
        One row for each sentence: `text`, `label` ("positive", "negative"), `group` (what it is
        about), and `domain`, one of eight, so that a probe can be tried on another one.

    >>> sentiment().text[:2].tolist()
    ['The soup was rich and full of flavour.', 'The soup was thin and tasted of dishwater.']
    """
    return by_column("sentiment", ["positive", "negative"], group="subject")


def language() -> pd.DataFrame:
    """The same 60 sentences in English, French, German and Spanish.

    Returns:
        One row for each sentence and language: `text`, `label` (the language), and `group` (the
        sentence in English).

    >>> language().text[:2].tolist()
    ["The train leaves at eight o'clock.", 'Le train part à huit heures.']
    """
    return by_column("language", ["English", "French", "German", "Spanish"], group="English")


def tense() -> pd.DataFrame:
    """80 sentences in the present and the past, which differ in the verb alone.

    Returns:
        One row for each sentence: `text`, `label` ("present", "past"), `group` (the verb in the
        present), `word` (the verb as it stands there; no other group has it), and `form`
        ("regular", "irregular"), so that a probe can be tried on verbs without "-ed".

    >>> tense().text[:2].tolist()
    ['The postman walks along the canal.', 'The postman walked along the canal.']
    """
    return by_gap("tense", ["present", "past"])


def number() -> pd.DataFrame:
    """80 sentences about one thing and about several, which differ in the noun alone.

    Returns:
        One row for each sentence: `text`, `label` ("singular", "plural"), `group` (the noun in the
        singular), `word` (the noun as it stands there; no other group has it), and `form`
        ("regular", "irregular"), so that a probe can be tried on plurals without "-s".

    >>> number().text[4:6].tolist()
    ['She answered the letter from Vienna.', 'She answered the letters from Vienna.']
    """
    return by_gap("number", ["singular", "plural"])
