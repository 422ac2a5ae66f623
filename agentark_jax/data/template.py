"""A model's own chat template: from messages to text, rendered as transformers renders it.

Templates are programs that come with the model, so they run in Jinja's sandbox and see nothing but plain data.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from agentark_jax.errors import UsageError
from agentark_jax.records import stable_hash

Message = Mapping[str, str]
_FILE, _CONFIG, _KEY = "chat_template.jinja", "tokenizer_config.json", "chat_template"


class ChatTemplate:
    """The chat template of a model directory.

    `hash` identifies everything that its text depends on beside the messages.

    Args:
        source: the template's text.
        where: file and key, for error messages.
        variables: what the template sees beside the messages: special tokens by name, `enable_thinking` …
        today: what `strftime_now` takes for today.

    Raises:
        UsageError: the template is not valid Jinja.
    """

    def __init__(self, source: str, where: str, variables: Mapping[str, Any], today: date):
        self.where = where
        self._variables = {"tools": None, "documents": None, **variables}
        self.hash = stable_hash([source, self._variables, today.isoformat()])
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": today.strftime,
            "namespace": _Namespace,
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        }
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise UsageError(f"{where}: not a valid template ({error}). {_FIX}") from error

    def render(self, messages: Sequence[Message], *, reply: bool) -> str:
        """The text of a conversation; `reply` opens the assistant's next message.

        Raises UsageError for whatever the template raises.
        """
        try:
            return self._template.render(messages=messages, add_generation_prompt=reply, **self._variables)
        except Exception as error:  # a template is a program: any exception can come out of it
            roles = ", ".join(message["role"] for message in messages)
            raise UsageError(f"{self.where}: fails on messages of {roles} ({error}). {_FIX}") from error


_FIX = "Repair the template, or set prompt.format to plain."


def find_template(directory: Path) -> tuple[str, str] | None:
    """Where a model directory keeps its chat template (file and key), and the template; None where it has none.

    As in transformers, `chat_template.jinja` wins over `tokenizer_config.json`; of several named ones, `default` is it.
    """
    path = directory / _FILE
    if path.is_file():
        return str(path), path.read_text(encoding="utf-8")
    path = directory / _CONFIG
    found = json.loads(path.read_text(encoding="utf-8")).get(_KEY)
    if isinstance(found, list):
        named = {entry["name"]: entry["template"] for entry in found}
        if "default" not in named:
            raise UsageError(f"{path}: {_KEY} has no template named default, only {', '.join(named)}. Name one so.")
        found = named["default"]
    return (f"{path}: {_KEY}", found) if found else None


class _Generation(Extension):
    """`{% generation %}` marks what the assistant says, for masks made from text; ours are made from ids."""

    tags = {"generation"}  # noqa: RUF012  (the attribute that Jinja reads)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """A namespace without attributes that begin with an underscore, which could reach out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be one of the names
        self, *given = args
        for name in dict(*given, **kwargs):
            _refuse_private(name)
        Namespace.__init__(self, *given, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"the namespace attribute {name!r} is private")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
