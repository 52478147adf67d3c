"""Hugging Face folders: written, read back, read by transformers, and refused."""

import json
import pickle
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tiny
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import llama_probe as lp
from llama_probe.checkpoints import save as save_module
from llama_probe.model.llama import Llama
from llama_probe.tokenizer import Tokenizer

TOLERANCE = 2e-5  # largest absolute difference of a logit
FAMILIES = list(tiny.FAMILIES)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@cache
def hf_model(family: str) -> Any:
    return tiny.make_hf(family)


@cache
def own_model(family: str) -> Llama:
    return lp.from_transformers(hf_model(family))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder, not to be changed, that `save` wrote for a family."""
    return cache(
        lambda family: lp.save(own_model(family), tmp_path_factory.mktemp("saved") / family)
    )


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A folder to be damaged."""
    return shutil.copytree(saved("llama-gqa"), tmp_path / "tiny")


def load(path: str | Path, **options: Any) -> Llama:
    return lp.load(path, device="cpu", progress=False, **options)


def distance(a: Llama, b: Any) -> float:
    """Between the logits of our model and of another one of ours or transformers'."""
    other = b(tiny.tokens())
    return float((a(tiny.tokens()) - getattr(other, "logits", other)).abs().max())


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite the one file of weights after a change of the dictionary that it is."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def refused(path: str | Path, error: type[Exception], *parts: str, **options: Any) -> None:
    """Loading is exactly this error, and its message has all these parts."""
    with pytest.raises(error) as caught:
        lp.load(path, **{"device": "cpu", "progress": False, **options})
    assert caught.type is error
    for part in parts:
        assert part in str(caught.value)


# --- what was saved


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_every_bit_is_the_same(family, saved):
    model, again = own_model(family), load(saved(family))
    assert again.cfg == model.cfg.but(model_name=family)
    state = again.state_dict()
    assert list(state) == list(model.state_dict())
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, state[name]), name
    assert distance(again, model) <= TOLERANCE
    assert not again.training
    assert not any(weight.requires_grad for weight in again.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_what_was_saved(family, saved):
    hf, info = transformers.AutoModelForCausalLM.from_pretrained(
        saved(family), output_loading_info=True
    )
    assert type(hf) is type(hf_model(family))
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert distance(own_model(family), hf) <= TOLERANCE


def test_another_weight_would_be_seen(folder):
    change_weights(folder, lambda t: t["model.layers.1.mlp.up_proj.weight"].mul_(1.01))
    assert distance(load(folder), own_model("llama-gqa")) > 50 * TOLERANCE


@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe", "llama4-scout"])
def test_experts_are_written_as_they_are_published(family, saved):
    """Each apart in [out, in], or all in [expert, in, out] for Llama 4."""
    with safe_open(saved(family) / WEIGHTS, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    place = "model.layers.0"
    expected = {
        "mixtral": {f"{place}.block_sparse_moe.experts.5.w1.weight": (96, 64)},
        "qwen2-moe": {f"{place}.mlp.experts.7.down_proj.weight": (64, 48)},
        "llama4-scout": {
            f"{place}.feed_forward.experts.gate_up_proj": (4, 64, 192),
            f"{place}.feed_forward.experts.down_proj": (4, 96, 64),
        },
    }
    assert expected[family].items() <= shapes.items()


def test_in_shards(tmp_path, monkeypatch):
    whole = save_module.save_torch_state_dict
    monkeypatch.setattr(
        save_module,
        "save_torch_state_dict",
        lambda weights, folder: whole(weights, folder, max_shard_size="100KB"),
    )
    folder = lp.save(own_model("mixtral"), tmp_path / "sharded")
    assert len(list(folder.glob("*.safetensors"))) > 1 and (folder / INDEX).is_file()
    again, model = load(folder), own_model("mixtral")
    for ours, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_rope_divisors_survive_and_transformers_has_them_too(tmp_path):
    plain = own_model("llama-gqa")
    model = Llama(plain.cfg.but(rope_divisors=(1.0, 1.7, 3.3333332538604736, 8.0)))
    model.load_state_dict(plain.state_dict())
    folder = lp.save(model, tmp_path / "divided")
    again = load(folder)
    assert again.cfg.rope_divisors == model.cfg.rope_divisors
    assert distance(again, model) <= TOLERANCE
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert distance(model, hf) <= TOLERANCE
    assert distance(plain, hf) > 50 * TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_stored_dtype_is_kept_unless_another_is_asked_for(dtype, tmp_path, saved):
    folder = lp.save(load(saved("llama4-scout"), dtype=dtype), tmp_path / "other")
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype)[6:]
    kept, widened = load(folder), load(folder, dtype=torch.float32)
    assert {weight.dtype for weight in kept.parameters()} == {dtype}
    assert kept.cfg.dtype == dtype
    assert {weight.dtype for weight in widened.parameters()} == {torch.float32}
    assert widened.cfg.dtype == torch.float32
    for ours, theirs in zip(kept.parameters(), own_model("llama4-scout").parameters(), strict=True):
        assert torch.equal(ours, theirs.to(dtype))


def test_a_tokenizer_goes_with_it(tmp_path):
    vocabulary = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["<s>", "</s>", "a", "b", "ab"],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.token_type": [3, 3, 1, 1, 1],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    model = Llama(tiny.tiny_config(), Tokenizer.from_gguf(vocabulary))
    again = load(lp.save(model, tmp_path / "spoken"))
    assert again.tokenizer is not None and model.tokenizer is not None
    assert again.tokenizer.encode("abba") == model.tokenizer.encode("abba") == [4, 3, 2]
    without = load(lp.save(Llama(tiny.tiny_config()), tmp_path / "mute"))
    assert without.tokenizer is None


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_there_is_not_written_over(kind, tmp_path):
    taken = tmp_path / "taken"
    inner = taken / "mine.txt" if kind == "folder" else taken
    inner.parent.mkdir(exist_ok=True)
    inner.write_text("mine")
    with pytest.raises(lp.InputError, match="taken exists and is not an empty folder"):
        lp.save(own_model("llama-gqa"), taken)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [inner]
    assert inner.read_text() == "mine"


def test_an_empty_folder_and_missing_parents_are_no_obstacle(tmp_path):
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        assert load(lp.save(own_model("llama-gqa"), target)).cfg.n_layers == 3
        assert [path.name for path in target.parent.iterdir() if ".part" in path.name] == []


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_nothing_behind(error, tmp_path, monkeypatch):
    def fail(weights: object, folder: Path) -> None:
        (folder / WEIGHTS).write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(save_module, "save_torch_state_dict", fail)
    with pytest.raises(type(error)):
        lp.save(own_model("llama-gqa"), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_no_family_cannot_be_saved(tmp_path):
    model = Llama(tiny.tiny_config(qk_norm="learned"))
    with pytest.raises(lp.ConfigError, match="no model of type 'llama'"):
        lp.save(model, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_save_and_load_know_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    lp.save(own_model("llama-gqa"), "~/mine")
    assert (tmp_path / "mine" / WEIGHTS).is_file()
    assert load("~/mine").cfg.model_name == "mine"


# --- what transformers saved


@pytest.mark.parametrize("shard_size", [None, "100KB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saved(family, shard_size, tmp_path):
    options = {} if shard_size is None else {"max_shard_size": shard_size}
    hf_model(family).save_pretrained(tmp_path, **options)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size is not None)
    model = load(tmp_path)
    assert distance(model, hf_model(family)) <= TOLERANCE
    assert model.cfg == own_model(family).cfg.but(model_name=tmp_path.name)


def test_without_an_unembedding_it_is_the_embedding(folder):
    untied = load(folder)
    assert not untied.cfg.tied
    change_weights(folder, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(lp.CheckpointError, match="no tensor 'lm_head.weight'"):
        load(folder)  # config.json says that it is there
    change_config(folder, tie_word_embeddings=None)
    model = load(folder)
    assert model.cfg.tied
    assert model.unembed.weight is model.embed.weight
    assert distance(model, untied) > 50 * TOLERANCE


def test_a_model_without_its_head_is_refused():
    with pytest.raises(lp.CheckpointError, match="no tensor 'lm_head.weight'"):
        lp.from_transformers(tiny.make_hf("llama-gqa").model)


def test_weights_of_mixed_precision_get_one(folder):
    change_weights(
        folder,
        lambda t: t.update({n: v.bfloat16() for n, v in t.items() if "norm" not in n}),
    )
    model = load(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(tiny.tokens()).dtype == torch.bfloat16


def test_a_tied_folder_has_no_unembedding(saved):
    with safe_open(saved("llama-tied") / WEIGHTS, framework="pt") as file:
        assert "lm_head.weight" not in file.keys()


@pytest.mark.parametrize("same", [True, False])
def test_an_unembedding_beside_a_configuration_that_is_tied(same, folder):
    """As transformers does it: only one that differs is used."""
    change_config(folder, tie_word_embeddings=True)
    if same:
        change_weights(
            folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
        )
    model = load(folder)
    assert model.cfg.tied == same
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert distance(model, hf) <= TOLERANCE
    assert distance(lp.from_transformers(hf), hf) <= TOLERANCE


VISION = {
    "vision_model.class_embedding": torch.zeros(3),
    "model.vision_model.layers.0.weight": torch.zeros(3),
    "multi_modal_projector.linear_1.weight": torch.zeros(2, 3),
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
}


@pytest.mark.parametrize(
    ("model_prefix", "head_prefix"),
    [("language_model.model.", "language_model."), ("model.language_model.", ""), ("", "")],
)
def test_names_of_multimodal_checkpoints(model_prefix, head_prefix, folder):
    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            inner = name.removeprefix("model.")
            prefix = head_prefix if inner == name else model_prefix
            tensors[prefix + inner] = tensors.pop(name)
        tensors |= VISION

    change_weights(folder, rename)
    model = load(folder)
    assert not model.cfg.tied
    assert distance(model, own_model("llama-gqa")) <= TOLERANCE


def test_the_text_part_of_a_multimodal_llama4(tmp_path):
    _, sizes = tiny.FAMILIES["llama4-scout"]
    sizes = {key: value for key, value in sizes.items() if key != "rope_parameters"}
    vision = {
        **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"intermediate_size": 64, "image_size": 28, "patch_size": 14, "vision_output_dim": 32},
        **{"projector_input_dim": 32, "projector_output_dim": 32},
    }
    config = transformers.Llama4Config(
        text_config={**tiny._BASE, **sizes}, vision_config={**vision}
    )
    hf = transformers.Llama4ForConditionalGeneration(config).eval()
    for weight in hf.parameters():
        weight.normal_(std=0.15)
    hf.save_pretrained(tmp_path)
    for model in (load(tmp_path), lp.from_transformers(hf)):
        assert not model.cfg.tied
        assert distance(model, hf) <= TOLERANCE


# --- the model of transformers that is probed


def test_probing_twice_and_training_afterwards():
    hf = tiny.make_hf("llama-gqa")
    frozen = next(iter(hf.parameters())).requires_grad_(False)
    first, second = lp.from_transformers(hf), lp.from_transformers(hf)
    assert distance(first, second) == 0
    trainable = [weight for weight in hf.parameters() if weight is not frozen]
    assert not frozen.requires_grad and all(weight.requires_grad for weight in trainable)
    hf.train()
    optimiser = torch.optim.SGD(hf.parameters(), lr=0.1)
    with torch.enable_grad():
        hf(tiny.tokens(), labels=tiny.tokens()).loss.backward()
    before = first(tiny.tokens())
    assert all(weight.grad is not None for weight in trainable)
    optimiser.step()
    assert float((first(tiny.tokens()) - before).abs().max()) > 50 * TOLERANCE
    assert distance(first, hf) <= TOLERANCE  # the weights are the same ones


# --- folders that are no model


def test_no_config(folder):
    (folder / "config.json").unlink()
    refused(folder, lp.CheckpointError, str(folder), "config.json")


@pytest.mark.parametrize("text", [b"{", b"", b"\xff\xfe", b"[" * 100_000])
def test_a_config_that_is_no_json(text, folder):
    (folder / "config.json").write_bytes(text)
    refused(folder, lp.CheckpointError, "config.json cannot be read as JSON")


@pytest.mark.parametrize("value", [[], "llama", None])
def test_a_config_that_is_no_object(value, folder):
    (folder / "config.json").write_text(json.dumps(value))
    parts = ("config.json should hold a JSON object", type(value).__name__)
    refused(folder, lp.CheckpointError, *parts)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model_type": "lama"}, ["'lama'", "did you mean 'llama'"]),
        ({"attention_multiplier": 0.3}, ["'attention_multiplier'"]),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, ["'yarn'"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["quantization_config", "awq"]),
        ({"hidden_act": "gelu"}, ["'gelu'", "'silu'"]),
        ({"hidden_size": None}, ["'hidden_size'"]),
    ],
)
def test_a_config_that_is_not_implemented(changes, parts, folder):
    change_config(folder, **changes)
    refused(folder, lp.ConfigError, *parts)


# --- tensors that do not fit


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def replaced(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: tensor})


Q = "model.layers.2.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            renamed(Q, Q.replace("q_proj", "q_porj")),
            ["no tensor 'layers.2.self_attn.q_proj.weight'; did you", "q_porj.weight'"],
        ),
        (lambda t: t.pop("model.embed_tokens.weight"), ["no tensor 'model.embed_tokens.weight'"]),
        (replaced(Q, torch.zeros(64, 60)), ["self_attn.q_proj", "(64, 60)", "(64, 64)"]),
        (replaced(Q, torch.zeros(64)), ["self_attn.q_proj", "(64,)", "(64, 64)"]),
        (replaced("lm_head.weight", torch.zeros(200, 64)), ["lm_head", "(200, 64)", "(199, 64)"]),
        (replaced("model.layers.3.x", torch.zeros(1)), ["1 tensors", "'layers.3.x'"]),
        (replaced(Q, torch.zeros(64, 64, dtype=torch.int8)), ["self_attn.q_proj", "torch.int8"]),
        (replaced("model.layers.0.self_attn.q_proj.bias", torch.zeros(64)), ["q_proj.bias"]),
    ],
)
def test_tensors_that_do_not_fit(change, parts, folder):
    change_weights(folder, change)
    refused(folder, lp.CheckpointError, str(folder), *parts)


EXPERTS = "layers.0.feed_forward.experts.gate_up_proj"
EXPERT = "layers.1.block_sparse_moe.experts.3"


@pytest.mark.parametrize(
    ("family", "name", "shape", "asked"),
    [
        # As the file has them: [expert, in, out], and one expert's own.
        ("llama4-scout", EXPERTS, (4, 192, 64), "(4, 64, 192)"),
        ("llama4-scout", EXPERTS, (4, 64), "(4, 64, 192)"),
        ("mixtral", f"{EXPERT}.w3.weight", (96, 60), "(96, 64)"),
        ("mixtral", f"{EXPERT}.w3.weight", (97, 64), "(96, 64)"),
        ("mixtral", f"{EXPERT}.w2.weight", (96, 64), "(64, 96)"),
    ],
)
def test_a_wrong_shape_of_an_expert(family, name, shape, asked, saved, tmp_path):
    folder = shutil.copytree(saved(family), tmp_path / "tiny")
    change_weights(folder, replaced(f"model.{name}", torch.zeros(shape)))
    refused(folder, lp.CheckpointError, f"'{name}'", f"shape {shape},", f"asks for {asked}")


def test_an_expert_that_is_missing(saved, tmp_path):
    folder = shutil.copytree(saved("mixtral"), tmp_path / "tiny")
    change_weights(folder, lambda tensors: tensors.pop(f"model.{EXPERT}.w1.weight"))
    refused(folder, lp.CheckpointError, f"no tensor '{EXPERT}.w1.weight'")


# --- damaged files


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_weights_that_are_cut_short(keep, folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: int(keep * len(data)) if 0 < keep < 1 else keep])
    refused(folder, lp.CheckpointError, WEIGHTS, "damaged or cut short")


@pytest.mark.parametrize("start", [b"\xff" * 8, b"\x10" + b"\0" * 7 + b"no JSON at all!!"])
def test_weights_with_a_wrong_header(start, folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(start + data[len(start) :])
    refused(folder, lp.CheckpointError, WEIGHTS, "damaged or cut short")


def test_no_weights(folder):
    (folder / WEIGHTS).unlink()
    refused(folder, lp.CheckpointError, str(folder), WEIGHTS, INDEX)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "ABSOLUTE", "none.safetensors", ""])
def test_an_index_that_leads_nowhere_or_out_of_the_folder(shard, folder):
    outside = folder.parent / "outside.safetensors"
    shutil.move(folder / WEIGHTS, outside)
    shard = str(outside) if shard == "ABSOLUTE" else shard
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))
    refused(folder, lp.CheckpointError, INDEX, repr(shard), "not in")


@pytest.mark.parametrize("index", [{}, {"weight_map": ["x"]}, {"weight_map": {"x": [1]}}])
def test_an_index_without_a_map(index, folder):
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, lp.CheckpointError, INDEX, "weight_map")


@pytest.mark.parametrize("text", ["{", "[]"])
def test_an_index_that_is_no_json_object(text, folder):
    (folder / INDEX).write_text(text)
    refused(folder, lp.CheckpointError, INDEX, "JSON")


def test_a_shard_that_is_missing_from_the_map(folder):
    """What no shard holds is missing, whatever the index says."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    save_file({name: t for name, t in tensors.items() if name != Q}, folder / "a.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "a.safetensors")}))
    refused(folder, lp.CheckpointError, "no tensor 'layers.2.self_attn.q_proj.weight'")


# --- nothing is executed


class Bomb:
    """Whoever unpickles this writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.marker, "executed"))


def test_nothing_is_executed(folder, tmp_path):
    marker = tmp_path / "marker"
    bomb = pickle.dumps(Bomb(marker))
    pickle.loads(bomb)
    assert marker.exists()  # that is what a bomb does
    marker.unlink()
    (folder / "modeling_own.py").write_text(f"open({str(marker)!r}, 'w')")
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling_own.Model"})
    for name in ("pytorch_model.bin", "consolidated.00.pth", "tokenizer.pkl"):
        (folder / name).write_bytes(bomb)
    assert distance(load(folder), own_model("llama-gqa")) <= TOLERANCE
    refused(folder / "pytorch_model.bin", lp.CheckpointError, "no sound GGUF file")
    for name in ("tokenizer.model", "tokenizer.json", WEIGHTS):
        (folder / name).write_bytes(bomb)
        refused(folder, lp.CheckpointError)
        (folder / name).unlink()
    refused(folder, lp.CheckpointError, WEIGHTS, "pickled .bin and .pth files) are not read")
    assert not marker.exists()


# --- names


def test_a_name_that_is_almost_right():
    name = "smollm2-135m-instrukt"
    refused(name, lp.UnknownNameError, repr(name), "did you mean 'smollm2-135m-instruct'")


@pytest.mark.parametrize("name", ["./nothing", "~/nothing", "~nobody-has-this-name/x", "no.gguf"])
def test_a_path_that_does_not_exist(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    refused(name, lp.CheckpointError, "there is no folder or file", Path(name).name)
    refused(tmp_path / "nothing", lp.CheckpointError, str(tmp_path / "nothing"))


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "xpu"])
def test_a_device_that_cannot_be_used(device, folder):
    refused(folder, lp.InputError, repr(device), device=device)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_a_dtype_that_weights_cannot_have(dtype, folder):
    refused(folder, lp.InputError, str(dtype), dtype=dtype)


def test_the_hub_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    refused("nobody/no-such-model", lp.DownloadError, "'nobody/no-such-model'", "Hugging Face hub")


@pytest.mark.parametrize("error", [OSError("no route"), ValueError(""), RuntimeError("a\nb")])
def test_whatever_the_hub_client_raises(error, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    said = str(error).split("\n")[0] or type(error).__name__
    refused("org/name", lp.DownloadError, "'org/name'", said)


def test_a_model_from_the_hub(saved, monkeypatch):
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(saved("llama-gqa"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = load("org/name")
    assert model.cfg.model_name == asked["name"] == "org/name"
    assert distance(model, own_model("llama-gqa")) <= TOLERANCE

    def fetched(file: str) -> bool:
        return any(fnmatch(file, pattern) for pattern in asked["allow_patterns"])

    assert all(map(fetched, ("config.json", WEIGHTS, INDEX, "tokenizer.json", "tokenizer.model")))
    assert not any(
        map(fetched, ("pytorch_model.bin", "consolidated.00.pth", "modeling_own.py", "x.pkl"))
    )


def test_a_folder_comes_before_the_hub(saved, tmp_path, monkeypatch):
    shutil.copytree(saved("llama-gqa"), tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked"))
    assert load("org/name").cfg.model_name == "name"
