"""Chat templates are data from outside: what they may not do, and how that is reported."""

from __future__ import annotations

import time

import pytest

from stateful_kv.errors import InvalidRequestError, ModelLoadError
from stateful_kv.text.template import ChatTemplate

MESSAGES = [{"role": "user", "content": "hello"}]
HOSTILE = {
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "huge range": "{% for i in range(10**30) %}x{% endfor %}",
    "nested ranges": "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
    "repeat": "{{ 'x' * 10**10 }}",
    "repeat list": "{{ ([1] * 10**10) | length }}",
    "doubling": "{% set n = namespace(s='x') %}{% for i in range(64) %}"
    "{% set n.s = n.s ~ n.s %}{% endfor %}",
    "adding": "{% set n = namespace(s='x') %}{% for i in range(64) %}"
    "{% set n.s = n.s + n.s %}{% endfor %}",
    "replacing": "{% set n = namespace(s='xx') %}{% for i in range(64) %}"
    "{% set n.s = n.s.replace('x', n.s) %}{% endfor %}",
    "replace filter": "{% set n = namespace(s='xx') %}{% for i in range(64) %}"
    "{% set n.s = n.s | replace('x', n.s) %}{% endfor %}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "long output": "{% for i in range(100000) %}{{ 'x' * 1000 }}{% endfor %}",
    "percent format": "{{ '%1000000000d' % 1 }}",
    "format method": "{{ '{:1000000000}'.format(1) }}",
    "center": "{{ 'x'.center(10**9) }}",
    "indent": "{{ messages | tojson(indent=10**9) }}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__.keys() }}",
    "mutation": "{{ messages.append(1) }}",
    "undefined attribute": "{{ nothing.at.all }}",
    "wrong type": "{{ 'a' + 1 }}",
    "division": "{{ 1 // 0 }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "own exception": "{{ raise_exception('roles must alternate') }}",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_templates_end_quickly_with_one_error(case: str) -> None:
    started = time.monotonic()
    with pytest.raises(InvalidRequestError, match="chat template"):
        ChatTemplate(HOSTILE[case]).render(MESSAGES, None)
    assert time.monotonic() - started < 30
    assert ChatTemplate("{{ messages[0].content }}").render(MESSAGES, None) == "hello"


def test_the_budget_is_per_render() -> None:
    template = ChatTemplate("{% for i in range(400000) %}{% endfor %}ok")
    assert [template.render(MESSAGES, None) for _ in range(5)] == ["ok"] * 5


@pytest.mark.parametrize("source", ["{% for %}", "{{", "{% unknown %}", "{{ x | no_filter }}"])
def test_invalid_templates(source: str) -> None:
    with pytest.raises(ModelLoadError, match="chat template"):
        ChatTemplate(source)


def test_what_templates_rely_on() -> None:
    source = """{%- for m in messages %}
    {%- if loop.index0 % 2 == 0 %}{{ bos_token ~ m.role }}{% endif %}
    {%- if m.content is string and not m.missing %}:{{ m['content'] | trim | tojson }}{% endif %}
    {%- continue %}
{%- endfor %}{{ [1, 2] + [3] }}{{ "é" | tojson }}{{ strftime_now("%Y") | length }}
{{- 'x' * 3 }}{{ 'a-b'.split('-') | join('+') }}{{ 'aXa'.replace('a', 'b') }}"""
    got = ChatTemplate(source, bos_token="<s>").render(MESSAGES, None)
    assert got == '<s>user:"hello"[1, 2, 3]"é"4xxxa+bbXb'


def test_mentions() -> None:
    assert ChatTemplate("{% if tools %}{% endif %}").mentions_tools
    assert not ChatTemplate("{{ mytools_x }}").mentions_tools
