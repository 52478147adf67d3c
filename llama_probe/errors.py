"""The exceptions of this package: each says what was wrong, where, and what would be right."""

from collections.abc import Iterable
from difflib import get_close_matches


class LlamaProbeError(Exception):
    """Whatever this package raises on purpose."""


class InputError(LlamaProbeError, ValueError):
    """An argument that cannot be used: a prompt, a token, a shape, a value returned by a hook."""


class ConfigError(LlamaProbeError, ValueError):
    """A model configuration that is contradictory, or that this package does not implement."""


class CheckpointError(LlamaProbeError, ValueError):
    """A file of weights or a tokenizer that is missing, damaged, or does not fit its model."""


class DownloadError(LlamaProbeError, OSError):
    """Something could not be fetched, or is not what it should be."""


class OutputError(LlamaProbeError, OSError):
    """Something could not be written: a full disk, a folder that another process holds."""


class UnknownNameError(LlamaProbeError, LookupError):
    """A name that stands for nothing here."""


class HookNameError(UnknownNameError):
    """A hook name or pattern that matches no hook of the model."""


def near(name: str, names: Iterable[str], most: int = 3) -> str:
    """The names closest to a mistyped one, as the end of a sentence; empty if none is close.

    >>> near("hook_resid_pots", ["hook_resid_post", "hook_embed"])
    "; did you mean 'hook_resid_post'"
    """
    found = get_close_matches(name, list(names), n=most, cutoff=0.6)
    return f"; did you mean {' or '.join(map(repr, found))}" if found else ""
