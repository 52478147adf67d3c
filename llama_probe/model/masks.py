"""Which keys each query sees."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from llama_probe.model.config import Mask


def visible(
    mask: Mask,
    window: int | None,
    positions: Int[Tensor, "#batch all"],
    n_queries: int,
    real: Bool[Tensor, "batch all"] | None,
) -> Bool[Tensor, "#batch 1 query key"] | None:
    """The keys that each of the last `n_queries` tokens sees.

    None stands for plainly causal: attention needs no mask of its own then. Every query sees real
    keys that are not after it: all of them ("full"), those fewer than `window` positions back
    ("sliding"), or those in the same block of `window` positions ("chunked"). Blocks are counted
    in positions, so left padding does not shift them.

    Args:
        mask: The kind of mask.
        window: Width of the window or block; ignored for "full".
        positions: Position of every token, read earlier or now; batch 1 where all rows agree.
        n_queries: Tokens read now.
        real: Which tokens are no padding; None where all are.
    """
    n_keys = positions.shape[1]
    # Without padding the last position is the largest, and there is one for each key.
    within = mask == "full" or (real is None and window is not None and n_keys <= window)
    if within and real is None and n_queries in (1, n_keys):
        return None
    index = torch.arange(n_keys, device=positions.device)
    seen = (index <= index[-n_queries:, None])[None]
    if not within:
        assert window is not None
        query, key = positions[:, -n_queries:, None], positions[:, None, :]
        seen = seen & (
            query - key < window if mask == "sliding" else query // window == key // window
        )
    if real is not None:
        seen = seen & real[:, None, :]
    return seen[:, None]
