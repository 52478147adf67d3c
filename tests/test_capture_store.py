"""Stores of activations: whole or resumable, lazily read, and nobody else's."""

import errno
import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import contents, run_script
from safetensors import SafetensorError
from safetensors.torch import load_file

import llama_probe as lp
from llama_probe.capturing import plan, store
from llama_probe.errors import CheckpointError, OutputError
from llama_probe.files import locked

TEXTS = [f"The number is {'one ' * n}and Mary has {n}." for n in range(12)]
HOOKS = ["blocks.*.hook_resid_pre", "blocks.1.attn.hook_z"]


@pytest.fixture(scope="module")
def model() -> lp.Llama:
    return lp.load("tiny-moe", device="cpu", progress=False)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "SHARD_TOKENS", 60)


def to(folder: Path, model: lp.Llama, **changes: Any) -> lp.Activations:
    options = {"hooks": HOOKS, "positions": [-1, 0], "batch_tokens": 60, **changes}
    prompts = options.pop("prompts", TEXTS)
    return lp.capture(model, prompts, store=folder, **options)


def stop_after(monkeypatch: pytest.MonkeyPatch, shards: int) -> None:
    """Interrupt a capture when it has written so many shards."""
    write, written = store.write_shard, []

    def interrupted(*args: Any) -> Any:
        if len(written) == shards:
            raise KeyboardInterrupt
        written.append(args[3])
        return write(*args)

    monkeypatch.setattr(store, "write_shard", interrupted)


@pytest.mark.usefixtures("small_shards")
def test_a_store_reads_as_memory_does(model: lp.Llama, tmp_path: Path) -> None:
    kept = to(tmp_path, model)
    memory = lp.capture(model, TEXTS, HOOKS, [-1, 0], batch_tokens=60)
    opened = lp.Activations.open(tmp_path)
    assert len(kept.record["plan"]) == 4
    for acts in (kept, opened):
        assert acts.index.equals(memory.index) and acts.prompts.text.tolist() == TEXTS
        assert acts.record == memory.record
        for hook in memory.hooks:
            assert (acts[hook] == memory[hook]).all()
        some = acts.select(prompts=[7, 2], at="0", layers=1)
        same = memory.select(prompts=[7, 2], at="0", layers=1)
        assert some.hooks == ("blocks.1.attn.hook_z", "blocks.1.hook_resid_pre")
        assert some.index.prompt.tolist() == [2, 7]
        for hook in some.hooks:
            assert (some[hook] == same[hook]).all()
            parts = list(some.batches(hook, size=1))
            assert (torch.cat(parts) == same[hook]).all() and len(parts) == 2


@pytest.mark.usefixtures("small_shards")
def test_only_the_shards_that_are_asked_for_are_read(model: lp.Llama, tmp_path: Path) -> None:
    acts = to(tmp_path, model)
    first = acts.record["plan"][0][0]
    for shard in range(1, len(acts.record["plan"])):
        store.shard_path(tmp_path, shard).unlink()
    assert len(acts.select(prompts=first)[acts.hooks[0]]) == 2 * len(first)
    with pytest.raises(FileNotFoundError):
        acts[acts.hooks[0]]


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("shards", [0, 1, 3])
def test_an_interrupted_store_goes_on_where_it_stopped(
    model: lp.Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    to(tmp_path / "whole", model)
    with monkeypatch.context() as patched:
        stop_after(patched, shards)
        with pytest.raises(KeyboardInterrupt):
            to(tmp_path / "store", model)
    with pytest.raises(CheckpointError, match=r"is not finished: \d of its \d shards are missing"):
        lp.Activations.open(tmp_path / "store")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*.safetensors")}
    assert len(before) == shards
    to(tmp_path / "store", model)
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


@pytest.mark.usefixtures("small_shards")
def test_a_finished_store_is_not_computed_again(
    model: lp.Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = to(tmp_path, model)
    stop_after(monkeypatch, 0)
    again = to(tmp_path, model)
    assert (again[HOOKS[1]] == first[HOOKS[1]]).all()


@pytest.mark.usefixtures("small_shards")
def test_a_damaged_shard_is_written_again(model: lp.Llama, tmp_path: Path) -> None:
    to(tmp_path, model)
    whole = contents(tmp_path)
    path = store.shard_path(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:-7])
    (tmp_path / "shards" / ".00002.safetensors.1.part").touch()
    with pytest.raises(CheckpointError, match="is not finished: 1 of its"):
        lp.Activations.open(tmp_path)
    to(tmp_path, model)
    assert contents(tmp_path) == whole


OTHER: list[tuple[dict[str, Any], str]] = [
    ({"hooks": HOOKS[:1]}, "made with other hooks .*not blocks.0.hook_resid_pre"),
    ({"positions": [-1]}, r"other positions \(-1, 0, not -1\)"),
    ({"pool": "max"}, r"another pooling \(None, not max\)"),
    ({"template": "chat"}, r"another template \(None, not chat\)"),
    ({"prepend_bos": False}, r"another rule for BOS \(None, not False\)"),
    ({"dtype": "bfloat16"}, r"another precision \(float32, not bfloat16\)"),
    ({"prompts": TEXTS[1:]}, "other prompts"),
    ({"prompts": [{"text": text, "label": 1} for text in TEXTS]}, "other prompts"),
]


@pytest.mark.parametrize(("changes", "sentence"), OTHER, ids=[sentence for _, sentence in OTHER])
def test_a_store_of_another_capture_is_refused(
    model: lp.Llama, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    to(tmp_path, model)
    before = contents(tmp_path)
    with pytest.raises(lp.InputError, match=sentence):
        to(tmp_path, model, **changes)
    assert contents(tmp_path) == before


def test_a_store_of_another_model_is_refused(model: lp.Llama, tmp_path: Path) -> None:
    to(tmp_path, model)
    twin = lp.load("tiny-moe", pretrained=False, seed=1, device="cpu", progress=False)
    with pytest.raises(lp.InputError, match="was made with another model"):
        to(tmp_path, twin)


def test_other_threads_are_warned_of(model: lp.Llama, tmp_path: Path) -> None:
    to(tmp_path, model)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"threads": 1,', '"threads": 64,'))
    with pytest.warns(UserWarning, match="begun with other threads: .* may differ in its last"):
        to(tmp_path, model)


def test_a_full_disk_loses_nothing(
    model: lp.Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_shards: None
) -> None:
    to(tmp_path / "whole", model)
    calls = []

    def fsync(_: int) -> None:
        calls.append(1)
        if len(calls) > 5:  # prompts, index, manifest, two shards
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        with pytest.raises(OutputError, match=r"the disk is full: .*00002\.safetensors"):
            to(tmp_path / "store", model)
    assert len(list((tmp_path / "store" / "shards").iterdir())) == 2
    to(tmp_path / "store", model)
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_a_full_disk_as_safetensors_tells_it(
    model: lp.Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(store, "save_file", full)
    with pytest.raises(OutputError, match="the disk is full"):
        to(tmp_path, model)


def test_two_captures_into_one_store(model: lp.Llama, tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(OutputError, match="another process is writing to"):
        to(tmp_path, model)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("manifest.json", None, "is no store of activations: it has no manifest.json"),
        ("manifest.json", "{", "the store .* is damaged"),
        ("manifest.json", '{"format": 99}', "has format 99, but this version .* reads format 1"),
        ("index.parquet", "", "the store .* is damaged"),
        ("prompts.parquet", None, "the store .* is damaged"),
    ],
)
def test_a_folder_that_is_no_store_gets_a_sentence(
    model: lp.Llama, tmp_path: Path, name: str, content: str | None, sentence: str
) -> None:
    to(tmp_path, model)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=sentence):
        lp.Activations.open(tmp_path)


def test_columns_that_cannot_be_stored(model: lp.Llama, tmp_path: Path) -> None:
    rows = [{"text": "a", "mixed": 1}, {"text": "b", "mixed": "two"}]
    with pytest.raises(lp.InputError, match="a column that cannot be stored"):
        to(tmp_path, model, prompts=rows)
    assert not (tmp_path / "manifest.json").exists()


def test_the_manifest_says_what_was_done(model: lp.Llama, tmp_path: Path) -> None:
    to(tmp_path, model, template="chat", system="Be brief")
    record = json.loads((tmp_path / "manifest.json").read_text())
    assert record["template"] == "chat" and record["system"] == "Be brief"
    assert record["versions"]["torch"] == torch.__version__
    assert len(record["tokenizer_hash"]) == len(record["prompts_hash"]) == 64
    shard = load_file(store.shard_path(tmp_path, 0))
    assert {name: list(x.shape[1:]) for name, x in shard.items()} == record["features"]


KILLED = """
import json, sys, torch
from pathlib import Path
torch.set_num_threads(1)
import llama_probe as lp
from llama_probe.capturing import plan
from killed import until_complete

plan.SHARD_TOKENS = 600
folder = Path(sys.argv[1])
model = lp.load("tiny-moe", device="cpu", progress=False)
tokens = torch.randint(5, 1999, (600, 120), generator=torch.Generator().manual_seed(0))

def work(store):
    lp.capture(model, tokens, "blocks.*.hook_resid_post", [-1, 5], store=store, batch_tokens=600,
               progress=False)

story = until_complete(work, folder / "whole", folder / "interrupted", kills=10, seed=3)
print(json.dumps(story._asdict()))
"""


@pytest.mark.slow
def test_killed_at_ten_random_moments_it_gives_the_same_bits(tmp_path: Path) -> None:
    story = run_script(KILLED, tmp_path)
    assert story["killed"] == 10
    interrupted = contents(tmp_path / "interrupted")
    assert len(interrupted) > 100
    assert not [name for name in interrupted if name.endswith(".part")]
    assert interrupted == contents(tmp_path / "whole")


# What one token leaves is so large that the whole set is ten times what the process may have.
LIMITED = """
import json, resource, sys, torch, warnings
from pathlib import Path
torch.set_num_threads(1)
import llama_probe as lp
from llama_probe.capturing import plan

cfg = lp.LlamaConfig(n_layers=1, d_model=4096, n_heads=8, d_mlp=8, d_vocab=64, n_ctx=4096)
model = lp.Llama(cfg)
tokens = torch.randint(0, 64, (320, 100), generator=torch.Generator().manual_seed(0))
# What is imported on the way is not what is measured.
lp.capture(model, tokens[:1, :5], "hook_embed", "all", store=Path(sys.argv[1]) / "first")
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
allowed = 48 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (used + allowed, used + allowed))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    acts = lp.capture(model, tokens, "hook_embed", "all", store=Path(sys.argv[1]) / "store",
                      progress=False)
    last = lp.capture(model, tokens, "hook_embed", -1, batch_tokens=16000, progress=False)
sums = sum(part.double().sum(0) for part in acts.batches("hook_embed", 200))
right = model.embed.weight.detach().double()[tokens.flatten()[:800]].sum(0)
some = acts.select(prompts=range(8)).batches("hook_embed", 199)
first = sum(part.double().sum(0) for part in some)
print(json.dumps({
    "times": acts.record["features"]["hook_embed"][0] * len(acts) * 4 / allowed,
    "wrong": float((first - right).abs().max()),
    "rows": len(acts),
    "halved": sum("did not fit into memory" in str(one.message) for one in caught),
    "last": bool((last["hook_embed"] == model.embed.weight[tokens[:, -1]]).all()),
    "finite": bool(sums.isfinite().all()),
}))
"""


@pytest.mark.slow
def test_a_set_ten_times_larger_than_memory_allows(tmp_path: Path) -> None:
    # Without it glibc keeps freed blocks, and what is left of the limit is in pieces.
    found = run_script(LIMITED, tmp_path, MALLOC_MMAP_THRESHOLD_="1000000")
    assert found["times"] >= 9.7
    assert found["rows"] == 32_000 and found["finite"] and found["wrong"] < 1e-9
    assert found["halved"] == 1 and found["last"]  # only the second, whose batch does not fit


def test_nothing_is_warned_of_where_nothing_is_wrong(model: lp.Llama, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to(tmp_path, model)
        to(tmp_path, model)
