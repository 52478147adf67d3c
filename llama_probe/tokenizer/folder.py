"""Tokenizers from Hugging Face's folders, and back."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_probe.errors import CheckpointError
from llama_probe.tokenizer.fast import Fast, bos_of, engine_of, mark_special
from llama_probe.tokenizer.spm import Spm, extended
from llama_probe.tokenizer.tokenizer import Tokenizer

_ROLES = ("bos", "eos", "pad", "unk")


def from_folder(folder: Path) -> Tokenizer:
    """Read a folder; see `Tokenizer.from_folder`."""
    config = {**_json(folder / "special_tokens_map.json"), **_set(_json(folder / _CONFIG))}
    if (folder / "tokenizer.json").is_file():
        return _from_json(folder, config)
    if (folder / "tokenizer.model").is_file():
        return _from_model(folder, config)
    raise CheckpointError(f"{folder} has neither tokenizer.json nor tokenizer.model")


_CONFIG = "tokenizer_config.json"


def _from_json(folder: Path, config: Mapping[str, Any]) -> Tokenizer:
    engine = engine_of(folder / "tokenizer.json")
    contents = {role: _content(config.get(f"{role}_token")) for role in _ROLES}
    mark_special(engine, [content for content in contents.values() if content])
    ids = {role: engine.token_to_id(c) if c else None for role, c in contents.items()}
    first = bos_of(engine)
    if ids["bos"] is None:
        ids["bos"] = first
    # A post-processor that puts something else first does not count.
    add_bos = first is not None and first == ids["bos"]
    return _tokenizer(folder, config, Fast(engine), ids, add_bos=add_bos)


def _from_model(folder: Path, config: Mapping[str, Any]) -> Tokenizer:
    path = folder / "tokenizer.model"
    model = extended(path.read_bytes(), _added(folder, config), where=str(path))
    backend = Spm(model, where=str(path))
    ids = {role: backend.special(role) for role in _ROLES}
    for role in _ROLES:
        named = backend.added.get(_content(config.get(f"{role}_token")) or "")
        ids[role] = ids[role] if named is None else named
    # Llama's own code always begins with BOS, and so do the libraries that read such files.
    return _tokenizer(folder, {"add_bos_token": True, **config}, backend, ids, add_bos=False)


def _tokenizer(
    folder: Path,
    config: Mapping[str, Any],
    backend: Fast | Spm,
    ids: Mapping[str, int | None],
    *,
    add_bos: bool,
) -> Tokenizer:
    stops = _stops(folder)
    return Tokenizer(
        backend,
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"] if ids["eos"] is not None else next(iter(stops), None),
        pad_token_id=ids["pad"],
        unk_token_id=ids["unk"],
        add_bos=add_bos or config.get("add_bos_token") is True,
        stop_ids=stops,
        chat_template=_template(folder, config),
    )


def _stops(folder: Path) -> list[int]:
    """The ids that the configurations of generation and of the model name as EOS."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        ids = _json(folder / name).get("eos_token_id")
        for token_id in ids if isinstance(ids, list) else [ids]:
            if isinstance(token_id, int) and token_id >= 0:
                found.append(token_id)
    return found


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except ValueError as error:
            raise CheckpointError(f"{file} is no text in UTF-8: {error}") from None
    template = config.get("chat_template")
    if isinstance(template, list):  # several, each with a name
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _added(folder: Path, config: Mapping[str, Any]) -> dict[int, tuple[str, bool]]:
    """Content and kind of the tokens that a folder adds to its tokenizer.model, by id."""
    found: dict[int, tuple[str, bool]] = {}
    try:
        for content, token_id in _json(folder / "added_tokens.json").items():
            found[int(token_id)] = (content, True)
        for token_id, token in config.get("added_tokens_decoder", {}).items():
            found[int(token_id)] = (str(token["content"]), bool(token.get("special", False)))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder} lists added tokens in an unknown form: {error}") from None
    return found


def _content(token: Any) -> str | None:
    """The text of a token that is written as a string or as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _set(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if value is not None}


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} should hold a JSON object, not {type(found).__name__}")
    return found


def save_configs(tokenizer: Tokenizer, folder: Path, kind: str) -> None:
    """Write what `from_folder` reads besides the vocabulary.

    Args:
        tokenizer: Whose rules to write.
        folder: Where to.
        kind: Hugging Face's name for the class of tokenizer.
    """
    ids = {role: getattr(tokenizer, f"{role}_token_id") for role in _ROLES}
    tokens = {
        f"{role}_token": tokenizer.str_tokens(token_id)[0]
        for role, token_id in ids.items()
        if token_id is not None
    }
    config = {
        "tokenizer_class": kind,
        "add_bos_token": tokenizer.add_bos,
        **tokens,
        "clean_up_tokenization_spaces": False,
        "padding_side": tokenizer.padding_side,
    }
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    _write(folder / _CONFIG, config)
    if tokenizer.stop_ids:
        generation = {f"{role}_token_id": i for role, i in ids.items() if i is not None}
        generation["eos_token_id"] = sorted(tokenizer.stop_ids)
        generation.pop("unk_token_id", None)
        _write(folder / "generation_config.json", generation)


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
