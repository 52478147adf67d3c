"""Fixtures that several files share. What they return is read-only."""

import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

# On tiny models and short prompts threads mostly wait for each other; kernels and commands that
# tests start inherit it. Before numpy and torch, which read it when they are imported.
os.environ["OMP_NUM_THREADS"] = "1"

import jaxtyping
import numpy as np
import pytest
import torch

from llama_probe.checkpoints import catalogue
from llama_probe.errors import DownloadError

if TYPE_CHECKING:
    from llama_probe import Llama
    from llama_probe.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent


def lacking(reason: str) -> NoReturn:
    """Skip a test for want of something; on CI, where it must be there, fail."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@contextmanager
def unchecked() -> Iterator[None]:
    """Shapes unchecked, which takes more than half of a tiny model's time.

    For the many plain passes that a result is compared with: what is under test stays checked.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        yield


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data that lies beside the repository where it is developed."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"no reference data: {folder} does not exist")
    return folder


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The GGUF file of SmolLM2."""
    try:
        return catalogue.pull("smollm2-135m-instruct", progress=False)
    except DownloadError as error:
        lacking(f"SmolLM2 could not be had: {error}")


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> "Llama":
    """SmolLM2 in float32."""
    import llama_probe as lp

    return lp.load(str(smollm2_path), device="cpu", dtype=torch.float32)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> "Tokenizer":
    """A byte-level vocabulary of 260 tokens: bytes, " Mary", " John", BOS and EOS."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    from llama_probe.tokenizer import Tokenizer
    from llama_probe.tokenizer.fast import Fast

    backend = Backend(models.BPE(_byte_vocabulary(), []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(" Mary", special=False), AddedToken(" John", special=False)])
    backend.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    bos, eos = backend.token_to_id("<s>"), backend.token_to_id("</s>")
    return Tokenizer(Fast(backend), bos_token_id=bos, eos_token_id=eos)


def _byte_vocabulary() -> dict[str, int]:
    from tokenizers import pre_tokenizers

    return {symbol: id for id, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of a Chromium to drive headless."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if (found := shutil.which(name)) is not None:
            return found
    lacking("no Chromium: install Debian's package chromium")
