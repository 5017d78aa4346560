"""Conversations in a checkpoint's template, as transformers renders them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flowcut.aliases import ASSETS
from flowcut.chat import ChatTemplate, default_template, make_template, read_template, said, user
from flowcut.config import LlavaConfig
from flowcut.errors import CheckpointError, ConfigError, InputError
from flowcut.prompt import Tokenizer, question_prompt

# What llava-hf has published for LLaVA-1.5 and, behind a sentence, for LLaVA-NeXT on Vicuna.
PUBLISHED = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL = (  # LLaVA-NeXT's on Mistral
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ '<<SYS>>\n' + message['content'][0]['text']"
    " + '\n<</SYS>>\n\n' }}{% elif message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "{{' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'][0]['text'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
PLAIN = (  # of a language model: text only, with a few things that templates do
    "{{ bos_token }}\n{%- for m in messages %}\n    {%- if loop.first and m.role == 'system' %}"
    "{{ m['content'] | trim + '\n' }}{% continue %}{%- endif %}\n"
    "    {{- '<|' ~ m.role ~ '|>' + m['content'] + eos_token }}\n    {% if loop.last %}{% break %}{% endif %}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}<|assistant|>{% endif -%}"
)
TALK = [
    user("What is this? <b> & \"'", 2),
    said("assistant", "A cat."),
    user("What color is it?", 1),
    said("assistant", "Ünï 日本"),
    user("Why?"),
]


def theirs(source: str, messages: list[dict[str, Any]], **names: str) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    return str(render_jinja_template([messages], chat_template=source, add_generation_prompt=True, **names)[0][0])


@pytest.mark.parametrize("source", [PUBLISHED, MISTRAL, default_template(False).source, default_template(True).source])
@pytest.mark.parametrize("turns", [1, 3, 5])
@pytest.mark.parametrize("system", [None, "Be short."])
def test_prompts_equal_transformers(source: str, turns: int, system: str | None) -> None:
    messages = [*([said("system", system)] if system else []), *TALK[:turns]]
    template = ChatTemplate(source, "<s>", "</s>")
    assert template.render(messages) == theirs(source, messages, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("anyres", [False, True])
@pytest.mark.parametrize("turns", [1, 3, 5])
def test_the_default_is_what_llava_hf_has_published(anyres: bool, turns: int) -> None:
    sentence = question_prompt("?", 0, anyres=True).partition("USER:")[0] if anyres else ""
    assert sentence.endswith("human's questions. ") == anyres
    assert default_template(anyres).render(TALK[:turns]) == theirs(sentence + PUBLISHED, TALK[:turns])


def test_a_question_is_a_chat_of_one_turn() -> None:
    assert question_prompt("Why?", 2) == "USER: <image>\n<image>\nWhy? ASSISTANT:"
    assert question_prompt("Why?", 2, anyres=True).endswith("questions. USER: <image>\n<image>\nWhy? ASSISTANT:")


@pytest.mark.parametrize(
    "directory", sorted(path.parent for path in ASSETS.glob("*/config.json")), ids=lambda p: p.name
)
def test_the_bundled_templates_are_the_default(directory: Path) -> None:
    anyres = LlavaConfig.from_file(directory / "config.json").anyres
    assert read_template(directory) == default_template(anyres).source


def test_a_template_that_wants_text_gets_text() -> None:
    """As a user of transformers would have to give it, whose tokenizer adds no second <s>."""
    template = ChatTemplate(PLAIN, "<s>", "</s>")
    messages = [said("system", " Be short. "), *TALK]
    plain = [
        {"role": m["role"], "content": "<image>\n" * (len(m["content"]) - 1) + m["content"][-1]["text"]}
        for m in messages
    ]
    assert "<s>" + template.render(messages) == theirs(PLAIN, plain, bos_token="<s>", eos_token="</s>")


def test_a_template_that_prints_parts_is_given_text() -> None:
    assert ChatTemplate("{% for m in messages %}{{ m['content'] }}{% endfor %}").render([user("Why?", 1)]) == (
        "<image>\nWhy?"
    )


BAD = {
    "{% for": "line 1: ",
    "{{ 1 / 0 }}": "division by zero",
    "{{ nothing.there }}": "'nothing' is undefined",
    "{{ messages.append(1) }}": "unsafe",
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{% set a = namespace() %}{{ a.__init__.__globals__ }}": "no attribute",
    "{% include 'other' %}": "no loader",
    "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}": "add up to more than 10000",
    "{{ 'a' * 10 ** 9 }}": "too large",
    "{{ 9 ** 9 ** 9 }}": "too large",
    "{{ '%300000000d' % 1 }}": "a result of % that is too large",
    "{{ '%*d' % (300000000, 1) }}": "a result of % that is too large",
    "{{ '%(a)300000000s' % {'a': 1} }}": "a result of % that is too large",
    "{{ '%-9.300000000f' % 1.5 }}": "a result of % that is too large",
    "{% set n = namespace(a='a') %}{% for i in range(30) %}{% set n.a = n.a + n.a %}{% endfor %}": "a result of [+] ",
    "{% set n = namespace(a=[1]) %}{% for i in range(30) %}{% set n.a = n.a + n.a %}{% endfor %}": "a result of [+] ",
    "{% set n = namespace(a='a') %}{% for i in range(30) %}{% set n.a = '%s%s' % (n.a, n.a) %}{% endfor %}": "of % ",
    "{% for i in range(999) %}{{ 'a' * 999 }}{% endfor %}": "characters written by it",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recursion",
    "{{ '" + "a" * 300_000 + "' }}": "300008 characters",
}


@pytest.mark.parametrize("source", BAD, ids=lambda source: source[:40])
def test_a_bad_template_is_one_line(source: str) -> None:
    with pytest.raises(CheckpointError, match=BAD[source]) as caught:
        ChatTemplate(source).render([user("Why?")])
    assert "chat template must be one that Jinja renders" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 7 % 4 }} {{ 3000000 % 7 }} {{ 2000000 + 1.5 }}",
        "{{ '%s is %05.1f%% of %(a)d' | replace('%(a)d', '9') % ('x', 2.5) }} {{ 'a' + 'b' }} {{ [1] + [2] }}",
        "{{ '%(a)s' % {'a': 'b'} }} {{ (1,) + (2,) }} {{ '%d on 20240101' % 3000000 }}",
    ],
)
def test_operators_are_jinjas(source: str) -> None:
    assert ChatTemplate(source).render([user("?")]) == theirs(source, [user("?")])


def test_a_template_may_refuse_a_conversation() -> None:
    with pytest.raises(InputError, match="got from it: Only user and assistant roles are supported!"):
        ChatTemplate(MISTRAL).render([said("tool", "7")])


def test_a_template_that_forgets_pictures_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"one <image> for each picture \(2\), got 0"):
        ChatTemplate("{% for m in messages %}{{ m.content[-1].text }}{% endfor %}").render([user("Why?", 2)])


FILES: dict[str, tuple[dict[str, Any], str | None]] = {
    "none": ({}, None),
    "text": ({"chat_template.jinja": "a"}, "a"),
    "json": ({"chat_template.json": {"chat_template": "b"}}, "b"),
    "json wins": ({"chat_template.jinja": "a", "chat_template.json": {"chat_template": "b"}}, "b"),
    "processor": ({"processor_config.json": {"chat_template": "c"}, "chat_template.jinja": "a"}, "c"),
    "processor without": ({"processor_config.json": {"patch_size": 14}, "chat_template.jinja": "a"}, "a"),
    "tokenizer": ({"tokenizer_config.json": {"chat_template": "d"}}, "d"),
    "tokenizer last": ({"tokenizer_config.json": {"chat_template": "d"}, "chat_template.jinja": "a"}, "a"),
    "named": (
        {
            "tokenizer_config.json": {
                "chat_template": [{"name": "tools", "template": "e"}, {"name": "default", "template": "f"}]
            }
        },
        "f",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_the_template_is_found_where_transformers_finds_it(case: str, tmp_path: Path) -> None:
    files, expected = FILES[case]
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    assert read_template(tmp_path) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must hold its chat_template as text, or one named default"),
        ("[]", "must hold its chat_template as text"),
        ('{"chat_template": [{"name": "tools", "template": "e"}]}', "one named default, got: KeyError"),
        ('{"chat_template": 7}', "must be text, got int"),
    ],
)
def test_a_file_that_holds_none_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "chat_template.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_template(tmp_path)


def test_the_tokens_around_are_the_tokenizers() -> None:
    config = LlavaConfig.from_file(ASSETS / "llava-tiny" / "config.json")
    tokenizer = Tokenizer.from_file(ASSETS / "llava-tiny" / "tokenizer.json", config.image_token_id, 1024)
    assert make_template("x", tokenizer, config) == ChatTemplate("x", "<s>", "</s>")
    assert make_template(None, tokenizer, config) is default_template(False)
    prompt = make_template("{{ bos_token }}a{{ bos_token }}", tokenizer, config).render([said("user", "?")])
    assert tokenizer.encode(prompt, [], 1).input_ids.tolist().count(1) == 2
