"""Arrays as text: rounded to whole numbers of few bits, compressed, in base64."""

import base64
import gzip
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
from plotly.offline import get_plotlyjs

# More numbers than this are rounded to 8 bits instead of 16.
_MANY = 2**20


def packed(arrays: Mapping[str, np.ndarray | list[Any]]) -> tuple[dict[str, Any], str]:
    """What a page needs to read the arrays, and the numbers themselves.

    Numbers are spread evenly over the whole numbers that the bits can hold, the largest of which
    stands for a missing one (NaN); amounts, which are never below 0, by their square root, so that
    small ones stay apart.

    Args:
        arrays: Numbers, or nested lists of texts, which go into the description as they are.

    Returns:
        By name the `shape`, `bits`, first byte (`start`), `low`, `high` and whether `root`s are
        stored; and all numbers, compressed, in base64.
    """
    about: dict[str, Any] = {}
    blob = bytearray()
    for name, array in arrays.items():
        if isinstance(array, list):
            about[name] = array
            continue
        bits = 8 if array.size > _MANY else 16
        codes, scale = _rounded(np.asarray(array, dtype=np.float32), bits)
        about[name] = {"shape": list(array.shape), "bits": bits, "start": len(blob), **scale}
        blob += codes.tobytes()
        blob += b"\0" * (-len(blob) % 2)  # 16-bit numbers begin at even bytes
    return about, text(bytes(blob))


def _rounded(array: np.ndarray, bits: int) -> tuple[np.ndarray, dict[str, Any]]:
    most = 2**bits - 2
    known = array[np.isfinite(array)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
    root = low >= 0
    low = 0.0 if root else low
    share = (array - low) / (high - low or 1.0)
    share = np.sqrt(np.clip(share, 0, 1)) if root else share
    codes = np.where(np.isfinite(share), np.rint(share * most), most + 1)
    kind = np.uint8 if bits == 8 else np.dtype("<u2")
    return codes.astype(kind), {"low": low, "high": high, "root": root}


def text(raw: bytes) -> str:
    """Bytes, compressed, in base64; the same bytes give the same text."""
    return base64.b64encode(gzip.compress(raw, 9, mtime=0)).decode()


@cache
def plotly_script() -> bytes:
    """Plotly's own script, compressed."""
    return gzip.compress(get_plotlyjs().encode(), 9, mtime=0)


@cache
def plotly_text() -> str:
    """The same in base64."""
    return base64.b64encode(plotly_script()).decode()
