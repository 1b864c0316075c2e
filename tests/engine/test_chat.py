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


QWEN = """
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- '<tools>' }}
    {%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\n</tools><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, open=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.open and message.role == 'user' and message.content is string and
           not (message.content.startswith('<tool>') and message.content.endswith('</tool>')) %}
        {%- set ns.open = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content %}{%- set thought = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {%- if call.function %}{%- set call = call.function %}{%- endif %}
            {{- '{"name": "' ~ call.name ~ '", "arguments": ' }}
            {%- if call.arguments is string %}{{ call.arguments }}
            {%- else %}{{ call.arguments | tojson }}{%- endif %}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role != 'system' or not loop.first %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""
MISTRAL = """
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}{%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- set calls = message.tool_calls is defined and message.tool_calls is not none %}
    {%- if not (message.role == "tool" or calls) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("roles must alternate") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- for key, value in tool.function.items() if key != "return" %}
                    {{- '"' + key + '": ' + (value | tojson) + ('' if loop.last else ', ') }}
                {%- endfor %}
            {%- endfor %}
            {{- "][/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "parameters": {"properties": {"städte": {"type": "array"}}}},
    }
]
CALLING = [
    {"role": "user", "content": "Is it raining in Köln?"},
    {"role": "assistant", "content": "<think>\nI must look.\n</think>\n\nLooking.", "tool_calls": None},
    {"role": "user", "content": "<tool>{}</tool>"},
    {"role": "assistant", "content": "<think>\nIt is.\n</think>\n\nYes."},
    {"role": "user", "content": "Thank you"},
]


@pytest.mark.parametrize("template", [QWEN, MISTRAL], ids=["qwen", "mistral"])
@pytest.mark.parametrize("messages", [CONVERSATION, CALLING], ids=["plain", "calling"])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["", "tools"])
@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}], ids=["", "no-thinking"])
def test_what_the_families_templates_use_is_there(
    template: str, messages: list[Any], tools: list[Any] | None, variables: dict[str, Any]
) -> None:
    """Slices, namespaces, string methods, filters, tools, thoughts: what theirs are made of."""
    theirs, _ = render_jinja_template(
        conversations=[messages],
        chat_template=template,
        tools=tools,
        add_generation_prompt=True,
        **TOKENS,
        **variables,
    )
    ours = ChatTemplate(template, TOKENS).render(messages, variables={"tools": tools, **variables})
    assert ours == theirs[0]
    assert ours.strip()


def test_mistral_refuses_roles_that_do_not_alternate() -> None:
    with pytest.raises(ChatTemplateError, match="roles must alternate"):
        ChatTemplate(MISTRAL, TOKENS).render([{"role": "user", "content": "a"}] * 2)


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
