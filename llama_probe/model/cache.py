"""Keys and values of the tokens that a model has read already."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llama_probe.errors import InputError


class KVCache:
    """What attention needs of earlier tokens, for `model(tokens, kv_cache=cache)`.

    A forward pass reads `length` tokens from the cache and adds its own; they count only when the
    pass has ended, so that one which raises leaves the cache as it was.

    Attributes:
        length: Tokens in the cache, padding included.
        real: Which of them are no padding [batch, length]; None where all are real.

    >>> KVCache(n_layers=2).length
    0
    """

    def __init__(self, n_layers: int) -> None:
        self.length = 0
        self.real: Bool[Tensor, "batch length"] | None = None
        self._keys: list[Tensor | None] = [None] * n_layers
        self._values: list[Tensor | None] = [None] * n_layers

    def extend(
        self,
        layer: int,
        keys: Float[Tensor, "batch new head d_head"],
        values: Float[Tensor, "batch new head d_head"],
    ) -> tuple[Float[Tensor, "batch all head d_head"], Float[Tensor, "batch all head d_head"]]:
        """Add a layer's keys and values; returns those of all tokens so far.

        Raises:
            InputError: The layer has not seen the tokens before these, or the batch differs.
        """
        old_keys, old_values = self._keys[layer], self._values[layer]
        if self.length:
            if old_keys is None or old_values is None or old_keys.shape[1] < self.length:
                raise InputError(
                    f"layer {layer} has not seen the {self.length} tokens of the cache: "
                    "it was skipped by start_at_layer or stop_at_layer in an earlier pass"
                )
            if old_keys.shape[0] != keys.shape[0]:
                raise InputError(
                    f"the cache holds a batch of {old_keys.shape[0]}, not of {keys.shape[0]}"
                )
            keys = torch.cat((old_keys[:, : self.length], keys), dim=1)
            values = torch.cat((old_values[:, : self.length], values), dim=1)
        else:
            # Copies: what a hook or a caller holds of these must not be the cache itself.
            self._keys[layer], self._values[layer] = keys.clone(), values.clone()
            return keys, values
        self._keys[layer], self._values[layer] = keys, values
        return keys, values

    def repeated(self, batch: int) -> "KVCache":
        """This cache, of a batch of 1, for a batch of prompts that all begin with its tokens.

        It shares the keys and values; what is added to it is not added to this one.

        Raises:
            InputError: This cache is not of a batch of 1, or not every layer has seen its tokens.
        """
        wider = KVCache(len(self._keys))
        wider.length = self.length
        if self.real is not None:
            wider.real = self.real.expand(batch, -1)
        for mine, its in ((self._keys, wider._keys), (self._values, wider._values)):
            for layer, held in enumerate(mine):
                if held is None or held.shape[0] != 1 or held.shape[1] < self.length:
                    raise InputError(
                        "a cache can be repeated if it is of one prompt, which every layer has read"
                    )
                its[layer] = held[:, : self.length].expand(batch, -1, -1, -1)
        return wider

    def advance(self, new: int, real: Bool[Tensor, "batch all"] | None) -> None:
        """Count `new` tokens in, at the end of a forward pass."""
        self.length += new
        self.real = real
