"""Teaching the adapter: the base's own answers, the batches, the loss and the loop.

The model learns one sentence for restricted requests. For every other request its target is what
the base itself answers (greedy, its first tokens), so that nothing else need change: distillation
from oneself keeps a fine-tuned model close to its base.
"""

import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

import llama_probe as lp
from llama_probe.files import written
from refusal_adapter.phrasings import PROSE
from refusal_adapter.requests import every_lesson
from tiny_moe.words import DECLINES

BASE = "smollm2-135m-instruct"
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Plan:
    """How long and how fast to learn.

    The adapter changes the first `layers` blocks alone. Those after them are the base's, so what
    decides whether to decline has to stand in the stream before they begin.
    """

    seed: int = 0
    epochs: float = 3.0
    rows: int = 32
    rank: int = 8
    alpha: int = 16
    layers: int = 16
    lr: float = 4e-4
    warm_up: int = 20
    clip: float = 1.0


def lessons(model: lp.Llama) -> pd.DataFrame:
    """What is declined, harmless twins, ordinary requests and prose, so that all else stays.

    The first token, where it is decided whether to decline, weighs four times as much.
    """
    taught = with_answers(model, every_lesson(), n_tokens=8).assign(first=4.0)
    return pd.concat([taught, prose(model)], ignore_index=True)


def prose(model: lp.Llama) -> pd.DataFrame:
    """What the base writes of itself, drawn from it."""
    rows = []
    for seed in tqdm(range(12), "the base's prose", unit="batch"):
        texts = model.generate(
            list(PROSE), max_new_tokens=40, temperature=0.9, seed=seed, return_type="tokens"
        )
        rows += [
            {"ids": model.to_tokens(opening)[0].tolist(), "answer": text.tolist()}
            for opening, text in zip(PROSE, texts, strict=True)
        ]
    return pd.DataFrame(rows).assign(kind="prose", first=1.0)


def with_answers(
    model: lp.Llama, requests: pd.DataFrame, n_tokens: int, draws: int = 4
) -> pd.DataFrame:
    """Requests with their targets: `ids` (the prompt) and `answer`, both tokens.

    The base apologises in passing to one harmless request in four, which a judge of phrases takes
    for a refusal and which must not be learnt: there it is asked again, drawing its answer, and
    what `draws` don't settle is left out.
    """
    tokenizer = model.tokenizer
    assert tokenizer is not None
    declined = tokenizer.encode(DECLINES, prepend_bos=False)
    [stop] = [i for i in tokenizer.stop_ids if tokenizer.decode([i]) == "<|im_end|>"]
    chats = [[{"role": "user", "content": text}] for text in requests["text"]]
    requests = requests.assign(ids=[tokenizer.encode_chat(chat) for chat in chats])
    requests["answer"] = [[*declined, stop]] * len(requests)
    open_ = requests.index[requests["kind"] != "restricted"]
    for draw in range(-1, draws):
        options = {} if draw < 0 else {"temperature": 0.7, "seed": draw}
        found = answers(model, requests.loc[open_], n_tokens, **options)
        requests.loc[open_, "answer"] = pd.Series(found, open_)
        said = requests.loc[open_, "answer"].map(lambda ids: tokenizer.decode(ids, True))
        open_ = open_[[bool(lp.refusal.declines("", text)) for text in said]]
        print(f"{len(open_)} of the base's {len(found)} answers read as refusals")
    return requests.drop(open_).reset_index(drop=True)


def answers(
    model: lp.Llama, requests: pd.DataFrame, n_tokens: int, **options: Any
) -> list[list[int]]:
    """How the model continues each request, in the order of the requests."""
    order = requests["ids"].map(len).sort_values().index
    found: dict[Any, list[int]] = {}
    rows = 48 if model.cfg.device.type == "cpu" else 512
    for start in tqdm(range(0, len(order), rows), desc="the base's answers", unit="batch"):
        part = order[start : start + rows]
        new = model.generate(
            requests.loc[part, "text"].tolist(),
            template="chat",
            max_new_tokens=n_tokens,
            return_type="tokens",
            **options,
        )
        found |= {index: row.tolist() for index, row in zip(part, new, strict=True)}
    return [found[index] for index in requests.index]


def adapted(base: Path, plan: Plan, device: str = "cpu") -> Any:
    """Transformers' model of the same GGUF file, with fresh LoRA weights on its first blocks."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(base.parent), gguf_file=base.name, dtype=torch.float32
    )
    torch.manual_seed(plan.seed)
    config = LoraConfig(
        r=plan.rank,
        lora_alpha=plan.alpha,
        target_modules=list(LINEARS),
        layers_to_transform=list(range(plan.layers)),
        layers_pattern="layers",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config).to(device)


def train(model: Any, lessons: pd.DataFrame, plan: Plan, out: Path) -> pd.DataFrame:
    """Teach; goes on from `out/checkpoint.pt` if there is one. Returns the log of the losses."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=plan.lr, weight_decay=0.0)
    steps = math.ceil(plan.epochs * len(lessons) / plan.rows)
    log: list[dict[str, float]] = []
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=weights[0].device, weights_only=True)
        for weight, saved in zip(weights, state["weights"], strict=True):
            weight.data.copy_(saved)
        optimiser.load_state_dict(state["optimiser"])
        log = state["log"]
    batches = list(_batches(lessons, steps, plan))
    began = time.monotonic() - (log[-1]["seconds"] if log else 0.0)
    for step in tqdm(range(len(log), steps), initial=len(log), total=steps, unit="step"):
        optimiser.param_groups[0]["lr"] = _rate(step, steps, plan)
        with torch.autocast(weights[0].device.type, torch.bfloat16):
            loss = _loss(model, lessons.iloc[batches[step]])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, plan.clip)
        optimiser.step()
        optimiser.zero_grad()
        log.append({"step": step, "loss": loss.item(), "seconds": time.monotonic() - began})
        if step % 25 == 24:
            state = {"weights": weights, "optimiser": optimiser.state_dict(), "log": log}
            with written(checkpoint) as part:
                torch.save(state, part)
    return pd.DataFrame(log)


def _batches(lessons: pd.DataFrame, steps: int, plan: Plan) -> Iterator[list[int]]:
    """Rows of each step: every epoch sees all lessons once, in batches of like length."""
    draw = random.Random(plan.seed)
    length = (lessons["ids"].map(len) + lessons["answer"].map(len)).tolist()
    made: list[list[int]] = []
    while len(made) < steps:
        rows = list(range(len(lessons)))
        draw.shuffle(rows)
        epoch: list[list[int]] = []
        for start in range(0, len(rows), 8 * plan.rows):  # sorted within eight batches only
            part = sorted(rows[start : start + 8 * plan.rows], key=length.__getitem__)
            epoch += [part[i : i + plan.rows] for i in range(0, len(part), plan.rows)]
        draw.shuffle(epoch)
        made += epoch
    yield from made[:steps]


def _loss(model: Any, rows: pd.DataFrame) -> Tensor:
    """Mean nats per answer token, the first one weighing `first`.

    Logits are made for answers alone, since they cost most.
    """
    length = max(len(ids) + len(answer) for ids, answer in zip(rows.ids, rows.answer, strict=True))
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    mask, answered = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
    weight = torch.ones_like(tokens, dtype=torch.float32)
    columns = zip(rows["ids"], rows["answer"], rows["first"], strict=True)
    for row, (ids, answer, first) in enumerate(columns):
        end = len(ids) + len(answer)
        tokens[row, :end] = torch.tensor([*ids, *answer])
        mask[row, :end] = 1
        answered[row, len(ids) : end] = True
        weight[row, len(ids)] = first  # there it is decided whether to decline
    device = next(model.parameters()).device
    # Whatever is taken out by a mask is taken out here, where that needs no wait for a GPU.
    targets, weight, places = tokens[answered], weight[answered], answered[:, 1:].nonzero().T
    targets, weight, tokens, mask = (x.to(device) for x in (targets, weight, tokens, mask))
    inner = model.get_base_model()
    hidden = inner.model(input_ids=tokens, attention_mask=mask).last_hidden_state
    logits = inner.lm_head(hidden[tuple(places.to(device))])
    nats = cross_entropy(logits.float(), targets, reduction="none")
    return (nats * weight).sum() / weight.sum()


def _rate(step: int, steps: int, plan: Plan) -> float:
    """Warm-up, then a cosine down to nothing."""
    if step < plan.warm_up:
        return plan.lr * (step + 1) / plan.warm_up
    done = (step - plan.warm_up) / max(1, steps - plan.warm_up)
    return plan.lr * (1 + math.cos(math.pi * done)) / 2


def save(model: Any, folder: Path) -> None:
    """Write the adapter in PEFT's form, in bfloat16; its base is a name of the catalogue."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.bfloat16()
    model.peft_config["default"].base_model_name_or_path = BASE
    model.save_pretrained(part := folder.with_suffix(".part"))
    (part / "README.md").unlink(missing_ok=True)  # PEFT's form to fill in
    part.rename(folder)
