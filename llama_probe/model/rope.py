"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864).

A query or key head is a row of coordinate pairs. Pair i at position p is turned by the angle
`p * inverse_frequency[i]`, so that a query-key product depends on the distance of the two alone.
"""

import math
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama_probe.model.config import Llama3Scaling, LlamaConfig, RopeLayout

Rotation = tuple[Float[Tensor, "#batch pos 1 d_head"], Float[Tensor, "#batch pos 1 d_head"]]


@cache
def inverse_frequencies(cfg: LlamaConfig, device: torch.device) -> Float[Tensor, " pair"]:
    """The angle in radians by which each pair turns per position, in float32.

    Llama 3.1's scaling is applied where the configuration has one; it is static, so it changes
    position 0 as little as any other.
    """
    exponents = torch.arange(0, cfg.d_head, 2, dtype=torch.float32, device=device) / cfg.d_head
    frequencies = 1.0 / cfg.rope_theta**exponents
    if cfg.rope_divisors is not None:
        return frequencies / torch.tensor(cfg.rope_divisors, dtype=torch.float32, device=device)
    if cfg.rope_scaling is not None:
        return llama3_scaled(frequencies, cfg.rope_scaling)
    return frequencies


def llama3_scaled(
    frequencies: Float[Tensor, " pair"], scaling: Llama3Scaling
) -> Float[Tensor, " pair"]:
    """Llama 3.1's scaled frequencies, by the rule of Meta's reference code (llama-models).

    Wavelengths up to `original_context / high_freq_factor` are kept, those from
    `original_context / low_freq_factor` on are stretched by `factor`; between, the frequencies are
    mixed linearly in the number of turns within the original context.
    """
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    stretched = frequencies / scaling.factor
    # Llama 4 Scout has high == low: nothing lies between, and nothing may be divided by zero.
    kept = (scaling.original_context / wavelengths - low) / (high - low or 1.0)
    mixed = (1 - kept) * stretched + kept * frequencies
    frequencies = torch.where(wavelengths < scaling.original_context / high, frequencies, mixed)
    return torch.where(wavelengths > scaling.original_context / low, stretched, frequencies)


def rotation(
    positions: Int[Tensor, "#batch pos"], cfg: LlamaConfig, dtype: torch.dtype
) -> Rotation:
    """What `rotate` multiplies each coordinate and its partner by, at each position.

    Turning the pair (x, y) gives (x cos - y sin, y cos + x sin): every coordinate times the cosine,
    plus its partner times the sine, which is negative for the first of the pair.

    Angles are computed in float32. As in the references, the factors then take the model's
    precision in the half layout (transformers' Llama) and stay float32 in the interleaved one
    (Meta's code and transformers' Llama 4).
    """
    angles = positions[..., None, None].float() * inverse_frequencies(cfg, positions.device)
    cos, sin = angles.cos(), angles.sin()
    if cfg.rope_layout == "half":
        own, partner = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        return own.to(dtype), partner.to(dtype)
    own, partner = torch.stack((cos, cos), dim=-1), torch.stack((-sin, sin), dim=-1)
    factor_dtype = torch.promote_types(dtype, torch.float32)
    return own.flatten(-2).to(factor_dtype), partner.flatten(-2).to(factor_dtype)


def rotate(
    x: Float[Tensor, "batch pos head d_head"], by: Rotation, layout: RopeLayout
) -> Float[Tensor, "batch pos head d_head"]:
    """Turn every pair of coordinates of every head."""
    own, partner = by
    if layout == "half":
        swapped = x.roll(x.shape[-1] // 2, dims=-1)
    else:
        swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * own, swapped, partner).to(x.dtype)
