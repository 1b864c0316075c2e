"""Templates render as transformers renders them, in a sandbox, within bounds, with clear errors."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from engine import chat
from engine.chat import ChatTemplate
from engine.errors import ChatTemplateError

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CONVERSATION = [
    {"role": "system", "content": "Be brief. <b>&amp;</b>"},
    {"role": "user", "content": "Grüße, 世界 'quoted' \"twice\""},
    {"role": "assistant", "content": "  spaced  \n"},
    {"role": "user", "content": "{{ not_a_template }}"},
]
TEMPLATES = {
    "plain": "{{ bos_token }}{% for m in messages %}{{ m.role }} {{ m.content }}{{ eos_token }}{% endfor %}",
    "blocks": """
{%- for message in messages %}
    {% if loop.first and message['role'] == 'system' %}
        {{- '<<SYS>>' + message['content'] }}
    {% else %}
{{ message['content'] | trim }}
    {% endif %}
{%- endfor %}
{% if add_generation_prompt %}
assistant:
{% endif %}
""",
    "json": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}\n{% endgeneration %}{% endfor %}!",
    "loops": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "namespace": "{% set n = namespace(i=0) %}{% for m in messages %}{% set n.i = 1 %}{% endfor %}{{ n.i }}",
    "defaults": "{{ tools is none }}{{ documents is none }}{{ enable_thinking is defined }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_equal_to_transformers(name: str, add_generation_prompt: bool) -> None:
    theirs, _ = render_jinja_template(
        conversations=[CONVERSATION],
        chat_template=TEMPLATES[name],
        add_generation_prompt=add_generation_prompt,
        **TOKENS,
    )
    ours = ChatTemplate(TEMPLATES[name], TOKENS).render(
        CONVERSATION, add_generation_prompt=add_generation_prompt
    )
    assert ours == theirs[0]


def test_variables_reach_the_template() -> None:
    template = ChatTemplate("{{ enable_thinking }} {{ add_generation_prompt }}", {})
    assert template.render([], variables={"enable_thinking": False}) == "False True"


def test_a_template_may_write_the_date() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", {}, now=lambda: datetime(2026, 3, 9))
    assert template.render([]) == "09 Mar 2026"


def test_what_the_template_refuses_is_told() -> None:
    source = "{% for m in messages %}{{ raise_exception('role ' + m.role + ' is not known') }}{% endfor %}"
    with pytest.raises(ChatTemplateError, match="role robot is not known"):
        ChatTemplate(source, {}).render([{"role": "robot", "content": ""}])


@pytest.mark.parametrize(
    "message", [{"role": "user"}, {"role": "user", "content": None}, {"role": "user", "content": ["a"]}]
)
def test_a_message_the_template_fails_on_is_a_clear_error(message: dict[str, Any]) -> None:
    with pytest.raises(ChatTemplateError, match="content the model expects"):
        ChatTemplate("{% for m in messages %}{{ 'x' + m['content'] }}{% endfor %}", {}).render([message])


@pytest.mark.parametrize("source", ["{% for %}", "{{", "{% unknown %}", "{% generation %}"])
def test_a_template_that_does_not_compile_is_a_clear_error(source: str) -> None:
    with pytest.raises(ChatTemplateError, match="not valid Jinja"):
        ChatTemplate(source, {})


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source, {}).render(messages)
    assert messages == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' * 1000000000000 }}",
        "{{ 1000000000000 * 'x' }}",
        "{{ messages * 1000000000000 }}",
        "{{ 9 ** 9 ** 9 ** 9 }}",
        "{{ range(100000000) | list }}",
        "{% for i in range(1000) %}{{ content }}{% endfor %}",
    ],
)
def test_what_a_render_makes_is_bounded(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setattr(chat, "RENDERED_CHARS_MAX", 100_000)
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source, {}).render([{}], variables={"content": "y" * 1000})


def test_renders_share_no_state() -> None:
    template = ChatTemplate("{% set x = (x or 0) + 1 %}{{ x }}", {})
    assert template.render([], variables={"x": 0}) == template.render([], variables={"x": 0}) == "1"
