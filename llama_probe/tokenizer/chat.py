"""Chat templates, as Hugging Face writes them: Jinja, run in a sandbox."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llama_probe.errors import CheckpointError, InputError


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    tokens: Mapping[str, str],
) -> str:
    """Render a conversation.

    Args:
        template: Comes with a checkpoint, so it is not trusted.
        messages: Each with a role and a content.
        add_generation_prompt: End with the beginning of the model's reply.
        tokens: The special tokens that the template may name ("bos_token", …).

    Raises:
        InputError: The template refuses the messages, or does what the sandbox forbids.
        CheckpointError: It is no valid Jinja.
    """
    compiled = _compiled(template)
    try:
        return compiled.render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **tokens,
        )
    # A template fails on odd messages in any way that Python code can.
    except Exception as error:
        raise InputError(f"the chat template refuses these messages: {error}") from error


@lru_cache(maxsize=16)
def _compiled(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(template)
    except TemplateSyntaxError as error:
        raise CheckpointError(
            f"the chat template is no valid Jinja (line {error.lineno}): {error.message}"
        ) from None


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks the model's own words: rendered as they are."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which models were not trained on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
