"""LoRA adapters: against the formula, against PEFT, and on bases of every form."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import test_gguf_llama
import tiny
import torch
from lora import CONFIG, WEIGHTS, Q, base, change_config, change_weights, gap, load, small, write
from safetensors.torch import load_file
from torch import Tensor

import llama_probe as lp
from llama_probe.checkpoints import catalogue
from llama_probe.checkpoints.adapters import load_adapter
from llama_probe.checkpoints.fingerprint import model_hash
from llama_probe.checkpoints.save import keep_in_memory
from llama_probe.errors import InputError

TOLERANCE = 1e-4  # largest absolute difference of a logit
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return small(tmp_path)


def product(folder: Path, layer: str = Q) -> Tensor:
    held = load_file(folder / WEIGHTS)
    return held[f"{layer}.lora_B.weight"].double() @ held[f"{layer}.lora_A.weight"].double()


# --- what is merged


def test_a_merged_weight_is_the_formula_and_the_rest_is_untouched(folder):
    model, merged = base(), load(folder, base=base())
    before, after = dict(model.named_parameters()), dict(merged.named_parameters())
    changed = "blocks.1.attn.q.weight"
    expected = before[changed].double() + 1.5 * product(folder)
    assert (after[changed] - expected).abs().max() < 1e-6
    assert (after[changed] - (before[changed] + product(folder))).abs().max() > 0.01  # unscaled
    assert list(before) == list(after)
    assert all(torch.equal(after[name], before[name]) for name in before if name != changed)
    assert not merged.training and not any(p.requires_grad for p in merged.parameters())


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({}, 6 / 4),
        ({"lora_alpha": 0.5}, 0.5 / 4),
        ({"use_rslora": True}, 6 / 2),
        ({"alpha_pattern": {"q_proj": 10}}, 10 / 4),
        ({"alpha_pattern": {"layers.0.self_attn.q_proj": 10}}, 6 / 4),
        ({"alpha_pattern": {r"model.layers.[12]\.self_attn.q_proj": 10, "q_proj": 20}}, 10 / 4),
        ({"alpha_pattern": {"proj": 10}}, 6 / 4),  # whole names only
        ({"r": 8, "rank_pattern": {"q_proj": 4}}, 6 / 4),
        ({"r": 9, "rank_pattern": {"q_proj": 4}, "use_rslora": True}, 6 / 2),
        ({"init_lora_weights": "gaussian", "bias": "none", "modules_to_save": None}, 6 / 4),
        ({"target_modules": ["q_proj"], "loftq_config": {}, "lora_dropout": 0.1}, 6 / 4),
    ],
)
def test_what_the_product_is_multiplied_by(changes, scale, folder):
    change_config(folder, **changes)
    merged = load_adapter(base(), folder)
    delta = merged.blocks[1].attn.q.weight.double() - base().blocks[1].attn.q.weight
    assert (delta - scale * product(folder)).abs().max() < 1e-6


def test_names_with_the_default_adapter_in_them(folder):
    expected = load(folder, base=base())

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace(".weight", ".default.weight")] = tensors.pop(name)

    change_weights(folder, rename)
    assert model_hash(load(folder, base=base())) == model_hash(expected)
    change_weights(folder, lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 64)}))
    with pytest.raises(lp.CheckpointError, match="has both .* only one can be meant"):
        load(folder, base=base())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_sum_is_taken_in_float32_at_least_and_kept_in_the_bases_dtype(dtype, folder):
    change_weights(folder, lambda t: [t.update({n: v.bfloat16()}) for n, v in list(t.items())])
    start = lp.from_transformers(tiny.make_hf("llama-gqa").to(dtype))
    merged = load(folder, base=start)
    assert {p.dtype for p in merged.parameters()} == {merged.cfg.dtype} == {dtype}
    expected = start.blocks[1].attn.q.weight.double() + 1.5 * product(folder)
    found = merged.blocks[1].attn.q.weight.double()
    one_rounding = 2**-8 if dtype == torch.bfloat16 else 1e-12
    assert ((found - expected).abs() <= one_rounding * expected.abs() + 1e-6 * one_rounding).all()


def test_a_given_base_stays_as_it_is_with_its_hooks(folder):
    start = tiny.make("llama-gqa")
    before, name = model_hash(start), start.cfg.model_name
    with start.hooks(fwd_hooks=[("hook_embed", lambda x, hook: 0 * x)]):
        merged = load(folder, base=start)
        assert gap(merged, load(folder, base=base())) == 0
    assert model_hash(start) == before != model_hash(merged)
    assert start.cfg.model_name == name and merged.cfg.model_name == f"{name} + small"
    wide = load(folder, base=start, dtype=torch.float64)
    assert wide.cfg.dtype == torch.float64 and model_hash(start) == before


def test_what_must_not_be_saved_must_not_be_saved_with_an_adapter(folder, tmp_path):
    start = keep_in_memory(tiny.make("llama-gqa"), "it is a check's")
    with pytest.raises(InputError, match="it is a check's"):
        lp.save(load(folder, base=start), tmp_path / "saved")
    lp.save(load(folder, base=base()), tmp_path / "saved")


# --- PEFT's own merge


def peft_merge(hf: Any, folder: Path, **config: Any) -> Any:
    """PEFT's merge of an adapter of random factors, which it has also written to a folder."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    made = peft.get_peft_model(hf, peft.LoraConfig(task_type="CAUSAL_LM", **config))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    made.save_pretrained(folder, save_embedding_layers=False)
    return made.merge_and_unload().eval()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama-gqa", {"target_modules": ATTENTION + MLP, "r": 4, "lora_alpha": 12}),
        ("llama-gqa", {"target_modules": ["lm_head"], "r": 2, "lora_alpha": 1}),
        ("llama-tied", {"target_modules": "all-linear", "use_rslora": True, "r": 3}),
        (
            "llama-biased",
            {
                "target_modules": ["o_proj", "down_proj"],
                "layers_to_transform": [1],
                "lora_alpha": 12,
            },
        ),
        (
            "mistral",
            {
                "target_modules": ATTENTION,
                "rank_pattern": {"q_proj": 6, "layers.1.self_attn.k_proj": 3},
                "alpha_pattern": {r"layers\.[02]\.self_attn\.v_proj": 20, "v_proj": 5},
            },
        ),
        ("qwen2", {"target_modules": ATTENTION + MLP, "r": 5, "init_lora_weights": "gaussian"}),
        ("qwen3", {"target_modules": ATTENTION, "r": 4}),
        ("qwen2-moe", {"target_modules": [*ATTENTION, "shared_expert_gate"], "r": 2}),
        ("llama4-scout", {"target_modules": ATTENTION, "r": 2}),
    ],
)
def test_the_logits_are_those_of_pefts_merge(family, config, tmp_path):
    start, adapter = base(family), tmp_path / "adapter"
    theirs = peft_merge(tiny.make_hf(family), adapter, **config)
    assert gap(load(adapter, base=start), theirs) < TOLERANCE
    assert gap(start, theirs) > 100 * TOLERANCE
    change_config(adapter, lora_alpha=config.get("r", 8), alpha_pattern={}, use_rslora=False)
    unscaled = gap(load(adapter, base=start), theirs)
    assert unscaled > 100 * TOLERANCE


# --- what it is merged into


def test_every_form_of_base_gives_the_same_model(tmp_path, folder):
    """q and k of a GGUF file have their rows in another order: an adapter knows nothing of it."""
    hf = tiny.make_hf("llama-gqa")
    heads = {n: (8 if "q" in n else 2) for n in ("q_proj", "k_proj")}
    layers = {f"{Q[:-6]}{name}": (4, 64, 8 * n) for name, n in heads.items()}
    adapter = write(tmp_path / "both", layers)
    hf.save_pretrained(tmp_path / "whole")
    gguf = test_gguf_llama.written(tmp_path)
    expected = load(adapter, base=lp.from_transformers(hf))
    assert gap(expected, base()) > 100 * TOLERANCE
    for place in (tmp_path / "whole", str(gguf)):
        assert gap(load(adapter, base=place), expected) < TOLERANCE
    for place in (tmp_path / "whole", gguf):
        change_config(adapter, base_model_name_or_path=str(place))
        merged = load(adapter)
        assert gap(merged, expected) < TOLERANCE
        assert merged.cfg.model_name == f"{place.name.removesuffix('.gguf')} + both"
    assert load(adapter, dtype=torch.bfloat16).cfg.dtype == torch.bfloat16
    assert gap(load(adapter, pretrained=False), load(place, pretrained=False)) == 0


ROUTED = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def on_tiny_moe(tmp_path: Path) -> Path:
    """An adapter whose configuration names tiny-moe."""
    cfg = lp.load("tiny-moe", device="cpu").cfg
    shape = {ROUTED: (4, cfg.d_model, cfg.n_heads * cfg.d_head)}
    return write(tmp_path / "nudged", shape, base_model_name_or_path="tiny-moe")


def test_a_base_of_the_catalogue_and_whose_tokenizer_it_is(on_tiny_moe):
    start, merged = load("tiny-moe"), load(on_tiny_moe)
    assert merged.cfg.model_name == "tiny-moe + nudged"
    assert model_hash(merged) == model_hash(load(on_tiny_moe, base=start)) != model_hash(start)
    assert merged.tokenizer is not None and start.tokenizer is not None
    assert merged.to_str_tokens("help") == start.to_str_tokens("help")
    assert merged.tokenizer.bos_token_id is not None
    lp.load("tiny-moe").tokenizer.save(on_tiny_moe)
    path = on_tiny_moe / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": "its own"}))
    for found in on_tiny_moe.glob("*.jinja"):
        found.write_text("its own")
    own = load(on_tiny_moe).tokenizer
    assert own.chat_template == "its own" != start.tokenizer.chat_template


def test_an_adapter_of_the_catalogue(on_tiny_moe, monkeypatch):
    entry = catalogue.Adapted(
        name="nudged-moe",
        summary="tiny-moe, nudged",
        licence="Apache-2.0",
        size=(on_tiny_moe / WEIGHTS).stat().st_size,
        base="tiny-moe",
        folder=on_tiny_moe,
    )
    monkeypatch.setitem(catalogue._CATALOGUE, entry.name, entry)
    assert entry.name in catalogue.names() and catalogue.entry(entry.name) == entry
    assert catalogue.path_of(entry.name) == catalogue.pull(entry.name) == on_tiny_moe
    merged = load("nudged-moe")
    assert merged.cfg.model_name == "tiny-moe + nudged-moe"
    assert model_hash(merged) == model_hash(load(on_tiny_moe))
    pulled = []
    monkeypatch.setitem(
        catalogue._CATALOGUE, entry.name, replace(entry, base="smollm2-135m-instruct")
    )
    monkeypatch.setattr(catalogue, "path_of", lambda name: pulled.append(name))
    monkeypatch.setattr(catalogue, "_download", lambda *_: pytest.fail("reached"))
    with pytest.raises(pytest.fail.Exception, match="reached"):
        catalogue.pull(entry.name, progress=False)  # goes on to fetch its base
    assert pulled == ["smollm2-135m-instruct"]


def test_an_adapter_whose_base_is_not_on_disk_is_not_on_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_PROBE_HOME", str(tmp_path / "empty"))
    entry = catalogue.Adapted(
        name="x", summary="", licence="", size=1, base="smollm2-135m-instruct", folder=tmp_path
    )
    monkeypatch.setitem(catalogue._CATALOGUE, "x", entry)
    assert catalogue.path_of("x") is None


@pytest.mark.parametrize("entry", catalogue._CATALOGUE.values(), ids=lambda entry: entry.name)
def test_the_catalogue_and_its_adapters_agree(entry):
    if isinstance(entry, catalogue.Adapted):
        config = json.loads((entry.folder / CONFIG).read_text())
        assert config["base_model_name_or_path"] == entry.base in catalogue.names()
        assert (entry.folder / WEIGHTS).stat().st_size == entry.size


def test_an_adapter_and_a_base_from_the_hub(folder, tmp_path, monkeypatch):
    tiny.make_hf("llama-gqa").save_pretrained(tmp_path / "whole")
    there = {"org/adapter": folder, "org/base": tmp_path / "whole"}
    patterns: list[str] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        patterns.extend(allow_patterns)
        return str(there[name])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    change_config(folder, base_model_name_or_path="org/base")
    assert load("org/adapter").cfg.model_name == "org/base + org/adapter"
    assert WEIGHTS in patterns and not any(pattern.endswith(".bin") for pattern in patterns)
