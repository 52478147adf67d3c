"""Teaching tiny-moe: its shape, its tokenizer, the batches, the loss and the loop.

AdamW with warm-up, cosine decay and clipped gradients. Three terms join the next-token loss:
the load-balancing loss of Switch Transformer (Fedus et al. 2021, arXiv 2101.03961, eq. 4) on the
layers whose routing is free to emerge, and on `PLANTED_LAYER` the cross-entropy between the router
and the domain of each token's document, so that there one expert is known to serve one domain.
A third teaches two heads where to look: one at the previous token, one, in repeated random tokens,
at what followed the earlier occurrence. Together they make induction, which otherwise comes late.
"""

import json
import math
import os
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot
from tqdm.auto import tqdm

import llama_probe as lp
from llama_probe.model.config import MoeConfig, Temperature
from llama_probe.tokenizer import Tokenizer
from tiny_moe.texts import BOS, DOMAINS, EOS, EOT, HEADER, HEADER_END, PAD, SPECIAL, World

VOCABULARY = 2000
CHUNK, ROW = 64, 128  # tokens of an attention chunk and of a training row
PLANTED_LAYER = 2
PREVIOUS_HEAD, INDUCTION_HEAD = (0, 0), (3, 0)  # layer, head: both are taught where to look
BALANCE, PLANT, LOOK = 0.02, 0.05, 0.1  # weights of the routing losses and of the attention loss

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    f"{HEADER}{{{{ message['role'] }}}}{HEADER_END}"
    "{{ '\n\n' }}{{ message['content'] | trim }}"
    f"{EOT}{{% endfor %}}"
    "{% if add_generation_prompt %}"
    f"{HEADER}assistant{HEADER_END}"
    "{{ '\n\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Plan:
    """How long and how fast to learn."""

    seed: int = 0
    steps: int = 7000
    rows: int = 16
    lr: float = 4e-3
    warm_up: int = 200
    decay: float = 0.1
    clip: float = 1.0


def shape(n_layers: int = 4, d_model: int = 128, d_expert: int = 96) -> lp.LlamaConfig:
    """Llama 4 in small: every fourth layer has no RoPE and sees everything, the others chunks."""
    roped = tuple((layer + 1) % 4 != 0 for layer in range(n_layers))
    return lp.LlamaConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=4,
        n_key_value_heads=2,
        d_head=32,
        d_mlp=2 * d_expert,
        d_vocab=VOCABULARY,
        n_ctx=1024,
        qk_norm="weightless",
        tied=True,  # copying a token, rare ones too, is then soon learnt
        rope_theta=1000.0,  # for chunks of 64 tokens
        rope_layout="interleaved",
        rope_layers=roped,
        masks=tuple("chunked" if rope else "full" for rope in roped),
        window=CHUNK,
        temperature=Temperature(scale=0.1, floor=32),
        moe=MoeConfig(
            n_experts=8, top_k=1, d_expert=d_expert, rule="sigmoid_input", d_shared=d_expert
        ),
        moe_layers=(True,) * n_layers,
        model_type="llama4_text",
        model_name="tiny-moe",
    )


def make_tokenizer(world: World, folder: Path) -> Tokenizer:
    """Learn a byte-level BPE from the world's texts; digits are tokens of their own."""
    from tokenizers import Tokenizer as Engine
    from tokenizers import decoders, models, pre_tokenizers, trainers

    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    engine.train_from_iterator(_texts(world), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    engine.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": True,
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": 1024,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return Tokenizer.from_folder(folder)


def _texts(world: World) -> Iterator[str]:
    draw = random.Random(0)
    for domain in DOMAINS:
        for _ in range(6000 if domain != "repetition" else 0):
            pieces = world.document(domain, draw)
            yield "".join(str(text) for text, _ in pieces if text not in SPECIAL)
    for word in world.words:  # as often as it takes to become one token
        yield f" {word}" * 400


class Batch(NamedTuple):
    """Rows of training text, each tensor [row pos].

    Attributes:
        tokens: What is read.
        weights: How much each token counts in the loss.
        domains: The domain of its document; -1 for padding.
        continues: Where the earlier occurrence of a repeated random token went on; -1 for none.
    """

    tokens: Tensor
    weights: Tensor
    domains: Tensor
    continues: Tensor


class Batches:
    """Rows of training text: tokens, the weight of each in the loss, and its domain.

    Documents are packed into rows so that none crosses the border of an attention chunk, except
    those that are longer than a chunk and have a row of their own.
    """

    def __init__(self, world: World, tokenizer: Tokenizer, rows: int, seed: int) -> None:
        self.world, self.tokenizer, self.rows, self.seed = world, tokenizer, rows, seed
        # Half of the repetitions are of words, which have more practice than rare fragments.
        names = [tokenizer.encode(f" {word}", prepend_bos=False)[0] for word in world.words]
        self.vocabularies = (names, range(len(SPECIAL), tokenizer.vocab_size))
        self.encode = lru_cache(maxsize=100_000)(self._encode)
        self.bos, self.pad = SPECIAL.index(BOS), SPECIAL.index(PAD)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, prepend_bos=False, parse_special=True))

    def __call__(self, step: int) -> Batch:
        """The batch of one step; the same for the same seed and step."""
        draw = random.Random(f"{self.seed}-{step}")
        rows = [self._row(draw) for _ in range(self.rows)]
        return Batch(*(torch.tensor(part) for part in zip(*rows, strict=True)))

    def _row(self, draw: random.Random) -> tuple[list[int], list[float], list[int], list[int]]:
        tokens: list[int] = []
        weights: list[float] = []
        domains: list[int] = []
        continues: list[int] = []

        def fill(to: int) -> None:
            short = to - len(tokens)
            tokens.extend([self.pad] * short)
            weights.extend([0.0] * short)
            domains.extend([-1] * short)
            continues.extend([-1] * short)

        while len(tokens) < ROW:
            room = CHUNK - len(tokens) % CHUNK
            for _ in range(8):  # tries to find a document that fits
                domain = draw.choices(range(len(DOMAINS)), weights=list(DOMAINS.values()))[0]
                name = list(DOMAINS)[domain]
                document = self.world.document(name, draw, self.vocabularies)
                ids, weight = self.flat(document)
                if len(ids) <= room or (len(ids) > CHUNK and not tokens):
                    break
            else:
                fill(len(tokens) + room)
                continue
            ids, weight = ids[: ROW - len(tokens)], weight[: ROW - len(tokens)]
            if name == "repetition":
                continues += _continues(len(document[0][0]), len(ids), len(tokens))
            else:
                continues += [-1] * len(ids)
            tokens += ids
            weights += weight
            domains += [domain] * len(ids)
        return tokens, weights, domains, continues

    def flat(self, document: Iterable[Any]) -> tuple[list[int], list[float]]:
        """A document's tokens, BOS first, and their weights in the loss."""
        ids, weights = [self.bos], [0.0]
        for piece, weight in document:
            new = self.encode(piece) if isinstance(piece, str) else piece
            ids += new
            weights += [weight] * len(new)
        return ids, weights


def _continues(period: int, n: int, start: int) -> list[int]:
    """For a repetition after its BOS, where the token after the earlier occurrence stands."""
    return [start + i - period + 1 if i > period else -1 for i in range(n)]


def losses(model: lp.Llama, batch: Batch) -> dict[str, Tensor]:
    """The terms of the loss of one batch, weighted."""
    routers: list[Tensor] = []
    patterns: dict[int, Tensor] = {}
    logits = model.run_with_hooks(
        batch.tokens,
        attention_mask=torch.ones_like(batch.tokens),
        fwd_hooks=[
            ("blocks.*.mlp.hook_router_logits", lambda x, hook: routers.append(x)),
            *(
                (lp.act_name("pattern", layer), partial(_keep, into=patterns, layer=layer, head=h))
                for layer, h in (PREVIOUS_HEAD, INDUCTION_HEAD)
            ),
        ],
    )
    each = cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="none"
    )
    weight = batch.weights[:, 1:].flatten()
    read = batch.domains.flatten() >= 0
    free = [router for i, router in enumerate(routers) if i != PLANTED_LAYER]
    planted = routers[PLANTED_LAYER].flatten(0, 1)[read]
    return {
        "text": (each * weight).sum() / weight.sum(),
        "balance": BALANCE * torch.stack([balance(r.flatten(0, 1)[read]) for r in free]).mean(),
        "planted": PLANT * cross_entropy(planted, batch.domains.flatten()[read]),
        "look": LOOK
        * (
            looks(patterns[PREVIOUS_HEAD[0]], previous(batch))
            + looks(patterns[INDUCTION_HEAD[0]], batch.continues)
        ),
    }


def _keep(pattern: Tensor, hook: Any, into: dict[int, Tensor], layer: int, head: int) -> None:
    into[layer] = pattern[:, head]


def previous(batch: Batch) -> Tensor:
    """Where the previous token of the same document stands [row pos]; -1 for none in the chunk."""
    here = torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens)
    first = (batch.tokens == SPECIAL.index(BOS)) | (batch.domains < 0) | (here % CHUNK == 0)
    return torch.where(first, -1, here - 1)


def looks(pattern: Tensor, where: Tensor) -> Tensor:
    """How far a head [row query key] is from looking `where` [row query] it should, in nats."""
    at = pattern.gather(2, where.clamp(min=0)[..., None])[..., 0]
    return -at[where >= 0].clamp(min=1e-6).log().mean()


def balance(router: Tensor) -> Tensor:
    """Switch's load-balancing loss of router logits [token expert]: 1 where all share alike."""
    n = router.shape[-1]
    used = one_hot(router.argmax(-1), n).float().mean(0)
    return n * (used * router.softmax(-1).mean(0)).sum()


def train(
    plan: Plan,
    world: World,
    out: Path,
    cfg: lp.LlamaConfig,
    *,
    stop: int | None = None,
    progress: bool = True,
) -> lp.Llama:
    """Train, or go on from `out/checkpoint.pt`; a checkpoint is written every 250 steps.

    Args:
        plan: How long and how fast.
        world: What to learn.
        out: Folder of this run; the tokenizer is written into it too.
        cfg: The model's shape.
        stop: Leave off after this step, with a checkpoint; None: at the plan's end.
        progress: Show a progress bar.

    Returns:
        The model in evaluation mode.

    Raises:
        InputError: The checkpoint in `out` is of another plan, such as another seed.
    """
    torch.manual_seed(plan.seed)
    tokenizer = make_tokenizer(world, out / "tokenizer")
    model = lp.Llama(cfg, tokenizer)
    optimizer = torch.optim.AdamW(_groups(model, plan), lr=plan.lr, betas=(0.9, 0.98), fused=True)
    batches = Batches(world, tokenizer, plan.rows, plan.seed)
    done, spent, log = _resume(out, plan, model, optimizer)
    started = time.monotonic() - spent
    last = plan.steps if stop is None else stop
    bar = tqdm(range(done, last), initial=done, total=plan.steps, disable=not progress)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = plan.lr * schedule(step, plan)
        terms = losses(model, batches(step))
        optimizer.zero_grad()
        sum(terms.values(), torch.zeros(())).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
        optimizer.step()
        if step % 25 == 0:
            row = {"step": step, "seconds": round(time.monotonic() - started, 1)}
            log.append({**row, **{name: round(term.item(), 4) for name, term in terms.items()}})
            bar.set_postfix(text=log[-1]["text"])
        if (step + 1) % 250 == 0 or step + 1 == last:
            _save(out, plan, model, optimizer, step + 1, time.monotonic() - started, log)
    return model.eval()


def schedule(step: int, plan: Plan) -> float:
    """Share of the top learning rate: up in a line, down to a twentieth along a cosine."""
    if step < plan.warm_up:
        return (step + 1) / plan.warm_up
    along = (step - plan.warm_up) / max(1, plan.steps - plan.warm_up)
    return 0.05 + 0.95 * (1 + math.cos(math.pi * along)) / 2


def _groups(model: lp.Llama, plan: Plan) -> list[dict[str, Any]]:
    """Matrices decay; norms and embeddings do not."""
    every = dict(model.named_parameters())
    kept = [p for name, p in every.items() if p.ndim < 2 or "embed" in name]
    decayed = [p for name, p in every.items() if not (p.ndim < 2 or "embed" in name)]
    return [
        {"params": decayed, "weight_decay": plan.decay},
        {"params": kept, "weight_decay": 0.0},
    ]


def _save(
    out: Path,
    plan: Plan,
    model: lp.Llama,
    optimizer: Any,
    step: int,
    spent: float,
    log: list[dict[str, Any]],
) -> None:
    state = {
        "plan": asdict(plan),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "seconds": spent,
        "log": log,
    }
    torch.save(state, out / "checkpoint.part")
    os.replace(out / "checkpoint.part", out / "checkpoint.pt")


def _resume(
    out: Path, plan: Plan, model: lp.Llama, optimizer: Any
) -> tuple[int, float, list[dict[str, Any]]]:
    path = out / "checkpoint.pt"
    if not path.exists():
        return 0, 0.0, []
    state = torch.load(path, weights_only=True)
    if state["plan"] != asdict(plan):
        raise lp.InputError(f"{path} is of another plan, {state['plan']}: name a new folder")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["seconds"], state["log"]
