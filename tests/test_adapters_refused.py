"""LoRA adapters that are refused: switches, tensors, layers, files, bases."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tiny
import torch
from conftest import unchecked
from lora import CONFIG, WEIGHTS, Q, base, change_config, change_weights, gap, load, small, write
from torch import Tensor

import llama_probe as lp
from llama_probe.errors import CheckpointError, DownloadError, InputError


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return small(tmp_path)


def refused(path: Path, *parts: str, error: type[Exception] = CheckpointError, **options: Any):
    """Loading onto `base()` is exactly this error, one sentence that has all these parts."""
    with pytest.raises(error) as caught:
        load(path, **{"base": base(), **options})
    assert caught.type is error
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"peft_type": "IA3"}, ["peft_type 'IA3'", "'LORA'"]),
        ({"peft_type": None}, ["peft_type None"]),
        ({"use_dora": True}, ["use_dora True", "not implemented"]),
        ({"fan_in_fan_out": True}, ["fan_in_fan_out"]),
        ({"bias": "lora_only"}, ["bias 'lora_only'"]),
        ({"lora_bias": True}, ["lora_bias"]),
        ({"modules_to_save": ["lm_head"]}, ["modules_to_save ['lm_head']"]),
        ({"init_lora_weights": "pissa"}, ["init_lora_weights 'pissa'"]),
        ({"layer_replication": [[0, 1]]}, ["layer_replication"]),
        ({"target_parameters": ["experts.down_proj"]}, ["target_parameters"]),
        ({"alora_invocation_tokens": [1]}, ["alora_invocation_tokens"]),
        ({"some_new_switch": 1}, ["some_new_switch"]),
        ({"r": 5}, ["(4, 64)", "(5, 64)", "q_proj.lora_A"]),
        ({"rank_pattern": {"q_proj": 8}}, ["(8, 64)"]),
        ({"r": 10**15}, [str(10**15)]),
        ({"r": 0}, ["r of", "is 0", "whole number"]),
        ({"r": None}, ["is None"]),
        ({"r": True}, ["is True"]),
        ({"r": 4.0}, ["is 4.0"]),
        ({"rank_pattern": {"q_proj": -1}}, ["rank_pattern['q_proj']", "is -1"]),
        ({"rank_pattern": ["q_proj"]}, ["rank_pattern ['q_proj']"]),
        ({"alpha_pattern": {"q_(": 1}}, ["alpha_pattern", "q_("]),
        ({"lora_alpha": float("nan")}, ["lora_alpha", "finite"]),
        ({"lora_alpha": 10**400}, ["lora_alpha", "finite"]),
        ({"lora_alpha": "16"}, ["is '16'"]),
        ({"lora_alpha": None}, ["is None"]),
    ],
)
def test_a_configuration_that_is_not_plain_lora(changes, parts, folder):
    change_config(folder, **changes)
    refused(folder, *parts)


def extra(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: torch.zeros(64)})


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda t: t.pop(f"{Q}.lora_B.weight"), ["lora_A.weight' without its lora_B"]),
        (lambda t: t.pop(f"{Q}.lora_A.weight"), ["lora_B.weight' without its lora_A"]),
        (lambda t: t.clear(), ["no tensors"]),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 63)}), ["(4, 63)", "(4, 64)"]),
        (lambda t: t.update({f"{Q}.lora_B.weight": torch.zeros(4, 64)}), ["(4, 64)", "(64, 4)"]),
        (lambda t: t.update({f"{Q}.lora_B.weight": torch.zeros(64, 3)}), ["(64, 3)", "(64, 4)"]),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 64).int()}), ["I32"]),
        (extra(f"{Q}.lora_magnitude_vector"), ["lora_magnitude_vector"]),
        (extra(f"{Q}.lora_B.bias"), ["lora_B.bias"]),
        (extra("base_model.model.lm_head.weight"), ["lm_head.weight"]),
        (extra("base_model.model.model.embed_tokens.lora_embedding_A"), ["lora_embedding_A"]),
        (extra("model.layers.0.self_attn.q_proj.lora_A.weight"), ["'model.layers.0", "before it"]),
    ],
)
def test_tensors_that_are_no_pairs_of_the_right_shape(change, parts, folder):
    change_weights(folder, change)
    refused(folder, *parts)


@pytest.mark.parametrize(
    ("family", "layer", "parts"),
    [
        ("llama-gqa", "model.layers.3.mlp.up_proj", ["did you mean 'model.layers.2.mlp.up_proj'"]),
        ("llama-gqa", "model.layers.1.self_attn.qkv_proj", ["qkv_proj"]),
        ("llama-gqa", "model.embed_tokens", ["embeddings"]),
        ("llama-gqa", "model.norm", ["'model.norm'"]),
        ("llama-tied", "lm_head", ["'lm_head'", "tied"]),
        ("mixtral", "model.layers.0.mlp.experts", ["experts"]),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.0.w1", ["experts"]),
    ],
)
def test_layers_that_the_base_does_not_have(family, layer, parts, tmp_path):
    adapter = write(tmp_path / "other", {f"base_model.model.{layer}": (4, 64, 64)})
    refused(adapter, "no linear layer of", *parts, base=base(family))


def test_files_that_are_missing_or_damaged(folder, tmp_path):
    held = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(held[: len(held) // 2])
    refused(folder, WEIGHTS, "damaged or cut short")
    (folder / WEIGHTS).unlink()
    refused(folder, f"has no {WEIGHTS}")
    (folder / "adapter_model.bin").write_bytes(held)
    refused(folder, "adapter_model.bin is a pickle", "convert it")
    (folder / CONFIG).write_text("[")
    refused(folder, CONFIG, "JSON")


def test_a_base_that_cannot_be_found(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    refused(folder, "base_model_name_or_path None", "base=...", base=None)
    asked = f"the base that {folder} asks for cannot be loaded (base=... names another): "
    change_config(folder, base_model_name_or_path="tiny-mo")
    refused(folder, asked, "did you mean 'tiny-moe'", base=None, error=lp.UnknownNameError)
    change_config(folder, base_model_name_or_path="/nowhere/at/all")
    refused(folder, asked, "/nowhere/at/all", base=None)
    change_config(folder, base_model_name_or_path="tiny-moe", revision="v2")
    refused(folder, "revision 'v2'", base=None)

    def offline(name: str, **_: Any) -> None:
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    change_config(folder, base_model_name_or_path="org/name", revision=None)
    refused(folder, asked, "'org/name'", "no route", base=None, error=DownloadError)
    with pytest.raises(lp.UnknownNameError, match="^'tiny-mo' is no folder"):
        load(folder, base="tiny-mo")


def test_a_base_that_is_no_base(folder, tmp_path):
    change_config(folder, base_model_name_or_path=str(folder))
    refused(folder, "is an adapter itself", base=None)
    refused(folder, "is an adapter itself", base=str(folder))
    refused(Path("tiny-moe"), "no adapter_config.json", error=InputError)
    with unchecked():
        hf = tiny.make_hf("llama-gqa")
        refused(folder, "LlamaForCausalLM", "from_transformers", error=InputError, base=hf)


def test_a_model_and_an_adapter_in_one_folder(folder, tmp_path):
    tiny.make_hf("llama-gqa").save_pretrained(tmp_path / "whole")
    change_config(folder, base_model_name_or_path=str(tmp_path / "whole"))
    expected = load(folder)
    shutil.copy(tmp_path / "whole" / "model.safetensors", folder)
    refused(folder, "both a model (model.safetensors) and an adapter", base=None)
    assert gap(load(folder, base=tmp_path / "whole"), expected) == 0
