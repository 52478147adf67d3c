"""`lp.capture`: prompts in, activations out, however many there are.

1. Prompts become tokens, hooks names, positions rows; all of it is checked before anything runs.
2. Prompts of like length form batches, batches form shards: the plan, which a store keeps.
3. Each batch runs as far as its deepest hook, and leaves only the rows that were asked for.
4. A shard is written whole or not at all. What is killed goes on from the last whole one.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_probe.capturing.activations import Activations, in_memory
from llama_probe.capturing.answers import answers
from llama_probe.capturing.collect import OF_TWO_TOKENS, Halved, feature_shapes
from llama_probe.capturing.job import Job, Told, checked_dtype, prompts_hash, record_of
from llama_probe.capturing.plan import planned
from llama_probe.capturing.positions import name_of
from llama_probe.capturing.prompts import as_frame, continued, encode, of_tokens
from llama_probe.capturing.shown import shown
from llama_probe.capturing.store import Shards, local, missing
from llama_probe.checkpoints.fingerprint import model_hash, tokenizer_hash
from llama_probe.errors import InputError
from llama_probe.files import locked, sweep
from llama_probe.hooks import NamesFilter
from llama_probe.model.llama import Llama

_SHOWN_FROM = 100  # prompts


# Who computes the shards of a store: called with the model, the job, the store's folder, the shards
# to write, in any order, and a function to call with the number of tokens that have just been run;
# yields of each shard the sizes of the batches that had to be halved. See `store.local`.
Engine = Callable[[Llama, Job, Path, Sequence[int], Told], Iterator[Halved]]


def capture(
    model: Llama,
    prompts: Any,
    hooks: NamesFilter = "blocks.*.hook_resid_post",
    positions: Any = -1,
    *,
    pool: str | None = None,
    template: str | None = None,
    system: str | None = None,
    prepend_bos: bool | None = None,
    text: str = "text",
    response: str | None = None,
    max_new_tokens: int | None = None,
    dtype: Any = None,
    store: str | Path | None = None,
    batch_tokens: int | None = None,
    engine: Engine = local,
    progress: bool | None = None,
) -> Activations:
    """Activations of many prompts, in memory or in a store on disk.

    A store is a folder of safetensors shards with a Parquet index and a JSON manifest. The same
    call on a store that is not finished goes on from its last whole shard, and gives the bits of a
    run that was never interrupted, on the same machine with as many threads. A batch that does not
    fit into memory is halved until it does, with a warning; the result then agrees to 1e-5 of its
    scale.

    Args:
        model: The model; it is run as far as the deepest hook.
        prompts: Texts, conversations (lists of messages), token ids [prompt pos], a DataFrame or
            dictionaries with a column of texts, or the path of a CSV, JSONL or Parquet file.
        hooks: Names or globs; None for all but scores and patterns, which are of two tokens, and
            those that multiply memory.
        positions: Which tokens: a number (negative ones count from the end), a slice, "all", "last
            of the instruction", "last of the template" (the last token before the answer),
            "response", or a list of these.
        pool: "mean" or "max": one row over the tokens of each of `positions`.
        template: "chat" to wrap texts in the model's chat template, as a user's message.
        system: A system message to put first.
        prepend_bos: Whether texts begin with BOS; None: the checkpoint's own rule.
        text: The column of a table that has the prompts.
        response: The column of a table that has answers, to put after the prompts.
        max_new_tokens: Let the model answer first, greedily, with at most so many tokens; the
            answers stand in the prompts' column `response`. This part is not resumed.
        dtype: "float32", "bfloat16" or "float16" to keep activations in; None: the model's own.
        store: The folder; None keeps them in memory.
        batch_tokens: Tokens in a batch, padding counted; None: what fits into a quarter of the
            free memory, at most 2,048 on a CPU and 16,384 on a GPU.
        engine: Who computes the shards of a store.
        progress: Show sizes and a bar; None: for 100 prompts and more.

    Returns:
        One row for each prompt and position, or pooled range.

    Raises:
        InputError: An argument or a prompt cannot be used, or the store was made for another
            capture (the message says what differs).
        HookNameError: A name matches nothing.
        OutputError: The disk is full, or another process is writing to the store.

    >>> from llama_probe.model.config import LlamaConfig
    >>> cfg = LlamaConfig(n_layers=2, d_model=16, n_heads=4, d_mlp=32, d_vocab=50)
    >>> acts = capture(Llama(cfg), torch.tensor([[1, 2, 3], [4, 5, 6]]), positions="all")
    >>> acts.hooks, acts["blocks.1.hook_resid_post"].shape
    (('blocks.0.hook_resid_post', 'blocks.1.hook_resid_post'), torch.Size([6, 16]))
    """
    names = model.hook_names(hooks)
    if hooks is None:
        names = [name for name in names if not name.endswith(OF_TWO_TOKENS)]
    features = feature_shapes(model, names)
    asked = list(positions) if isinstance(positions, list | tuple) else [positions]
    if isinstance(prompts, Tensor):
        _only_texts(template, system, prepend_bos, response)
        frame, encoded = of_tokens(model, prompts)
    else:
        frame = as_frame(prompts, text)
        encoded = encode(
            model,
            frame,
            template=template,
            system=system,
            prepend_bos=prepend_bos,
            response=response,
        )
    if max_new_tokens is not None and response is not None:
        raise InputError("answers are either given (response=) or generated (max_new_tokens=)")
    record = record_of(
        model=model.cfg.model_name,
        model_hash=model_hash(model),
        tokenizer_hash=tokenizer_hash(model.tokenizer),
        positions=list(map(name_of, asked)),
        pool=pool,
        template=template,
        system=system,
        prepend_bos=prepend_bos,
        response=response,
        max_new_tokens=max_new_tokens,
        prompts_hash=prompts_hash([one.ids for one in encoded], frame),
        features=features,
        dtype=model.cfg.dtype if dtype is None else checked_dtype(dtype),
        device=str(model.cfg.device),
        threads=torch.get_num_threads(),
    )
    shows = len(encoded) >= _SHOWN_FROM if progress is None else progress

    def make() -> Job:
        if max_new_tokens is None:
            return planned(model, record, frame, encoded, asked, batch_tokens)
        new = answers(model, encoded, max_new_tokens, shows)
        texts = [model.to_string(ids) if ids else "" for ids in new]
        whole = [continued(one, ids) for one, ids in zip(encoded, new, strict=True)]
        return planned(model, record, frame.assign(response=texts), whole, asked, batch_tokens)

    if store is None:
        job = make()
        with shown(job, range(len(job.plan)), None, shows, model.cfg.device) as (told, halved):
            parts = (job.compute(model, shard, halved, told) for shard in range(len(job.plan)))
            return in_memory(job, parts)
    return _to_store(model, Path(store), record, make, engine, shows)


def _to_store(
    model: Llama,
    folder: Path,
    record: dict[str, Any],
    make: Callable[[], Job],
    engine: Engine,
    shows: bool,
) -> Activations:
    with locked(folder):
        sweep(folder)
        if (folder / "manifest.json").exists():
            job = Job.read(folder)
            job.check_same(record, folder)
        else:
            job = make()
            job.write(folder)
        todo = missing(job, folder)
        with shown(job, todo, folder, shows, model.cfg.device) as (told, halved):
            for sizes in engine(model, job, folder, todo, told):
                halved += sizes
        return Activations(Shards(job, folder), job)


def _only_texts(*arguments: Any) -> None:
    if any(argument is not None for argument in arguments):
        raise InputError(
            "template, system, prepend_bos and response go with texts, but the prompts are tokens"
        )
