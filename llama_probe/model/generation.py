"""Text from the model, one token at a time, through the same forward pass that is probed."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from llama_probe.errors import InputError
from llama_probe.model.cache import KVCache

if TYPE_CHECKING:
    from llama_probe.model.llama import Llama


@torch.no_grad()
def generate(
    model: "Llama",
    prompts: Any,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_tokens: Iterable[int] | None = None,
    template: str | None = None,
    system: str | None = None,
    attention_mask: Tensor | None = None,
    fwd_hooks: Iterable[tuple[Any, Any]] = (),
    prepend_bos: bool | None = None,
    return_type: Literal["text", "tokens"] = "text",
    progress: bool | None = None,
) -> Any:
    """Continue prompts; hooks act in every step, on the prompt and on each new token.

    Args:
        model: The model.
        prompts: A text, a list of texts, tokens [batch pos], or conversations: lists of messages
            `{"role": …, "content": …}`.
        max_new_tokens: At most this many tokens each.
        temperature: 0 takes the likeliest token; otherwise logits are divided by it and sampled.
        top_k: Sample among the k likeliest tokens.
        top_p: Sample among the likeliest tokens that together have at least this probability.
        seed: Of the sampling; None draws one.
        stop_tokens: Ids that end a continuation; None: the tokenizer's. An empty list never stops.
        template: "chat" wraps each text as a user's message in the model's chat template.
        system: A system message to put first, with `template="chat"`.
        attention_mask: Which tokens of `prompts` are no padding, if they are given as tokens.
        fwd_hooks: Hooks or edits to put in place meanwhile.
        prepend_bos: Whether texts begin with BOS; None: the checkpoint's own rule.
        return_type: "text" for the continuations as text, special tokens left out; "tokens" for a
            list of id tensors, with the stop token where there is one.
        progress: Show a progress bar; None: when more than 64 tokens are asked for.

    Returns:
        A list with a continuation for each prompt; for a single text, its continuation alone.

    Raises:
        InputError: An argument cannot be used, or prompt and continuation exceed the context.
    """
    _check(max_new_tokens, temperature, top_k, top_p)
    if return_type not in ("text", "tokens"):
        raise InputError(f"return_type is {return_type!r}, but should be 'text' or 'tokens'")
    if return_type == "text" and model.tokenizer is None:
        raise InputError("this model has no tokenizer: ask for return_type='tokens'")
    tokens, mask = _prompt_tokens(model, prompts, attention_mask, template, system, prepend_bos)
    if not mask[:, -1].all():
        raise InputError("prompts should be padded on the left: the last token of a row is padding")
    if (total := tokens.shape[1] + max_new_tokens) > model.cfg.n_ctx:
        raise InputError(
            f"prompt and continuation may have {total} tokens, "
            f"but the context is {model.cfg.n_ctx}: lower max_new_tokens"
        )
    if stop_tokens is None:
        stop_tokens = model.tokenizer.stop_ids if model.tokenizer is not None else ()
    stops = torch.tensor(sorted(stop_tokens), dtype=torch.long, device=tokens.device)
    random = torch.Generator(tokens.device)
    random.manual_seed(seed) if seed is not None else random.seed()

    cache = KVCache(model.cfg.n_layers)
    new: list[Int[Tensor, " batch"]] = []
    done = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    hidden = max_new_tokens <= 64 if progress is None else not progress
    with model.hooks(fwd_hooks):
        for _ in tqdm(range(max_new_tokens), desc="generate", unit="token", disable=hidden):
            logits = model(tokens, attention_mask=mask, kv_cache=cache, logits_at=-1)[:, -1]
            chosen = _choose(logits, temperature, top_k, top_p, random)
            new.append(chosen)
            done = done | torch.isin(chosen, stops)
            if done.all():
                break
            tokens, mask = chosen[:, None], None
    rows = [_until_stop(row, stops) for row in torch.stack(new, dim=1)]
    if return_type == "tokens":
        return rows
    texts = [model._tokenizer().decode(row.tolist(), skip_special=True) for row in rows]
    return texts[0] if isinstance(prompts, str) else texts


def _check(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}, but should be at least 1")
    if temperature < 0:
        raise InputError(f"temperature is {temperature}, but should be 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k is {top_k}, but should be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}, but should be above 0 and at most 1")


def _prompt_tokens(
    model: "Llama",
    prompts: Any,
    mask: Any,
    template: str | None,
    system: str | None,
    prepend_bos: bool | None,
) -> tuple[Int[Tensor, "batch pos"], Tensor]:
    if template not in (None, "chat"):
        raise InputError(f"template is {template!r}, but should be 'chat' or None")
    if not isinstance(prompts, list | tuple | str):
        if template is not None:
            raise InputError("template='chat' goes with prompts that are texts")
        return model.tokens_and_mask(prompts, mask)
    if isinstance(prompts, str):
        prompts = [prompts]
    if any(isinstance(prompt, Mapping) for prompt in prompts):
        raise InputError("a conversation is a list of messages: put it into a list of prompts")
    chats = [prompt for prompt in prompts if _is_chat(prompt)]
    if chats and len(chats) < len(prompts):
        raise InputError("prompts are all texts or all conversations, not a mixture")
    if template == "chat" and not chats and all(isinstance(text, str) for text in prompts):
        first = [{"role": "system", "content": system}] if system is not None else []
        chats = [[*first, {"role": "user", "content": text}] for text in prompts]
    elif system is not None:
        raise InputError("system goes with template='chat' and prompts that are texts")
    if not chats:
        return model.tokens_and_mask(prompts, mask, prepend_bos=prepend_bos)
    rendered = [model._tokenizer().render_chat([dict(part) for part in chat]) for chat in chats]
    return model.tokens_and_mask(rendered, prepend_bos=False)


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and any(isinstance(part, Mapping) for part in prompt)


def _choose(
    logits: Float[Tensor, "batch d_vocab"],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    random: torch.Generator,
) -> Int[Tensor, " batch"]:
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None:
        logits = logits.masked_fill(~_nucleus(logits, top_p), -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=random)[:, 0]


def _nucleus(logits: Float[Tensor, "batch d_vocab"], top_p: float) -> Bool[Tensor, "batch d_vocab"]:
    """The fewest tokens that together reach top_p (Holtzman et al. 2020, arXiv 1904.09751)."""
    ordered, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before < top_p)


def _until_stop(row: Int[Tensor, " pos"], stops: Int[Tensor, " stop"]) -> Int[Tensor, " length"]:
    """Up to and including the first stop token."""
    at = torch.isin(row, stops).nonzero()
    return row[: int(at[0]) + 1] if len(at) else row
