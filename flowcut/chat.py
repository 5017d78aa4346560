"""Conversations to prompts, by the Jinja template that a checkpoint has for them.

A message is {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}, as
transformers has it. Templates are rendered with transformers' settings, in Jinja's sandbox: they come with checkpoints.
That keeps them from files and from the interpreter. What they write, count, and make with operators is limited, which
stops mistakes; but neither time nor memory is bounded against every template, as Jinja has more ways to take them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from flowcut.config import LlavaConfig
from flowcut.errors import CheckpointError, ConfigError, InputError
from flowcut.prompt import IMAGE, Tokenizer

if TYPE_CHECKING:
    import jinja2

Message = Mapping[str, Any]

FILE = "chat_template.jinja"
SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions. "
)
"""What LLaVA-NeXT's conversations begin with. LLaVA-1.5's on the Hub leave it out."""
LLAVA = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""LLaVA-1.5's conversation: USER: and ASSISTANT: in turn, a message's pictures before its text."""

_LONGEST = 256 * 1024
"""Characters of a template, and of what it writes."""
_COUNTED = 10_000
"""What its ranges may add up to."""
_WIDTH = re.compile(r"(?:[%)][#0 +-]*|[.])(\d+)")
"""In a text that % formats, or its precision."""
_PROBE = "flowcut-probe"


@dataclass(frozen=True)
class ChatTemplate:
    """A template ready to render.

    Attributes:
        source: in Jinja.
        begin: the token that the tokenizer puts before every prompt ("<s>"), which templates may write themselves.
        end: the one that ends an answer ("</s>").
    """

    source: str
    begin: str = ""
    end: str = ""

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt behind which the assistant's next answer follows, one `<image>` for each picture.

        Raises:
            CheckpointError: the template is wrong, or does not show the pictures.
            InputError: messages that it refuses.
        """
        shown = messages if self._takes_parts else [_plain(message) for message in messages]
        text = self._rendered(shown).removeprefix(self.begin)  # the tokenizer puts it there again
        wanted, got = sum(map(pictures_in, messages)), text.count(IMAGE) - _text(messages).count(IMAGE)
        if got != wanted:
            raise CheckpointError(
                f"the chat template must write one {IMAGE} for each picture ({wanted}), got {got}. Write the prompt "
                "yourself, or give the checkpoint another chat_template.jinja."
            )
        return text

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether it takes a message's parts, as those of multimodal models do, rather than its text."""
        try:
            text = self._rendered([user(_PROBE, 1)])
        except (CheckpointError, InputError):
            return False
        return _PROBE in text and "'type'" not in text and '"type"' not in text

    @cached_property
    def _template(self) -> jinja2.Template:
        from jinja2 import TemplateError

        if len(self.source) > _LONGEST:
            raise _wrong(f"{len(self.source)} characters, more than {_LONGEST}")
        try:
            return _environment().from_string(self.source)
        except (TemplateError, RecursionError) as error:
            raise _wrong(_said(error)) from None

    def _rendered(self, messages: Sequence[Message]) -> str:
        template, counter = self._template, _Counter()
        names = {"messages": messages, "bos_token": self.begin, "eos_token": self.end, "range": counter.range}
        pieces, length = [], 0
        try:
            for piece in template.generate(**names, add_generation_prompt=True, tools=None, documents=None):
                pieces.append(piece)
                length += len(piece)
                if length > _LONGEST:
                    raise _wrong(f"more than {_LONGEST} characters written by it")
        except (CheckpointError, _Refused):
            raise
        except Exception as error:  # what its expressions raise: TypeError, ZeroDivisionError, ..
            raise _wrong(_said(error)) from None
        return "".join(pieces)


class _Refused(InputError):
    """What a template says with raise_exception."""


class _Counter:
    def __init__(self) -> None:
        self._left = _COUNTED

    def range(self, *bounds: int) -> range:
        """Python's, until they add up to more than a template may count."""
        numbers = range(*bounds)
        self._left -= len(numbers)
        if self._left < 0:
            raise OverflowError(f"its ranges add up to more than {_COUNTED}")
        return numbers


def user(text: str, images: int = 0) -> dict[str, Any]:
    """A message of the user's, its pictures before the text."""
    return {"role": "user", "content": [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]}


def said(role: str, text: str) -> dict[str, Any]:
    """A message of text alone."""
    return {"role": role, "content": [{"type": "text", "text": text}]}


def pictures_in(message: Message) -> int:
    """How many a message has."""
    return sum(part["type"] == "image" for part in message["content"])


@cache
def default_template(anyres: bool) -> ChatTemplate:
    """Of checkpoints without one: LLaVA-1.5's, or that of LLaVA-NeXT on Vicuna."""
    return ChatTemplate(SYSTEM + LLAVA if anyres else LLAVA)


def make_template(source: str | None, tokenizer: Tokenizer, config: LlavaConfig) -> ChatTemplate:
    """A checkpoint's own, or LLaVA's where it has none."""
    if source is None:
        return default_template(config.anyres)
    return ChatTemplate(source, tokenizer.begin, tokenizer.spelled(config.eos_token_ids[0]))


def read_template(directory: Path) -> str | None:
    """A checkpoint's chat template, found as transformers finds it; None where it has none.

    Raises:
        ConfigError: a file that cannot be read or that has several templates, none of them called default.
    """
    for name in ("processor_config.json", "chat_template.json", FILE, "tokenizer_config.json"):
        path = directory / name
        if path.is_file() and (found := _read(path) if name == FILE else _chosen(path)) is not None:
            return found
    return None


def _chosen(path: Path) -> str | None:
    """The default one of a JSON file's."""
    try:
        data = json.loads(_read(path))
        template = data.get("chat_template")
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}
        if isinstance(template, dict):
            template = template["default"]
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{path} must hold its chat_template as text, or one named default, got: {error!r}."
        ) from None
    if template is not None and not isinstance(template, str):
        raise ConfigError(f"chat_template in {path} must be text, got {type(template).__name__}.")
    return template


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} must be a readable text file, got: {error}.") from None


def _plain(message: Message) -> dict[str, Any]:
    """Its pictures and text as one string."""
    return {"role": message["role"], "content": f"{IMAGE}\n" * pictures_in(message) + _text([message])}


def _text(messages: Sequence[Message]) -> str:
    return "".join(part["text"] for message in messages for part in message["content"] if part["type"] == "text")


def _environment() -> jinja2.Environment:
    """As transformers.utils.chat_template_utils has it."""
    from jinja2 import ext, nodes, sandbox

    class Generation(ext.Extension):
        """{% generation %}, which marks what the assistant said for training, and is nothing here."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    class Sandbox(sandbox.ImmutableSandboxedEnvironment):
        """Refuses results of operators that would take much memory."""

        intercepted_binops = frozenset(("*", "**", "+", "%"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if _is_too_large(operator, left, right):
                raise OverflowError(f"a result of {operator} that is too large")
            return super().call_binop(context, operator, left, right)

    made = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    made.filters["tojson"] = _tojson
    made.globals |= {"raise_exception": _refuse, "strftime_now": lambda style: datetime.now().strftime(style)}
    return made


def _is_too_large(operator: str, left: Any, right: Any) -> bool:
    if operator == "**":
        return max(_size(left), _size(right)) > 64
    if operator == "*":
        return _size(left) * _size(right) > _LONGEST
    if operator == "%" and isinstance(left, str):  # it formats: widths stand in the text or, for *, beside it
        beside = right if isinstance(right, tuple) else (right,)
        counted = [each for each in beside if "*" in left or _has_length(each)]
        return sum(map(_size, (left, *counted, *map(int, _WIDTH.findall(left))))) > _LONGEST
    return _has_length(left) and _has_length(right) and len(left) + len(right) > _LONGEST


def _size(value: Any) -> float:
    return len(value) if _has_length(value) else abs(value)


def _has_length(value: Any) -> bool:
    return hasattr(value, "__len__")


def _tojson(value: Any, ensure_ascii: bool = False, **settings: Any) -> str:
    """Not Jinja's, which escapes what HTML needs to have escaped."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **settings)


def _refuse(message: str) -> NoReturn:
    raise _Refused(f"the conversation must be one that the chat template takes, got from it: {message}")


def _wrong(reason: str) -> CheckpointError:
    return CheckpointError(
        f"the chat template must be one that Jinja renders, got: {reason}. Write the prompt yourself, or give the "
        f"checkpoint another {FILE}."
    )


def _said(error: BaseException) -> str:
    line = f"line {number}: " if (number := getattr(error, "lineno", None)) else ""
    return line + (" ".join(str(error).split()).rstrip(".") or type(error).__name__)
