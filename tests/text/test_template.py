"""Chat templates are data from outside: what they may not do, and how that is reported."""

from __future__ import annotations

import threading
import time

import pytest

from stateful_kv.errors import InvalidRequestError, ModelLoadError
from stateful_kv.text.template import MAX_SOURCE, ChatTemplate

MESSAGES = [{"role": "user", "content": "hello"}]
HOSTILE = {
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "huge range": "{% for i in range(10**30) %}x{% endfor %}",
    "nested ranges": "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
    "nested loops over text": "{% set s = 'x' * 9999 %}{% for i in s %}{% for j in s %}"
    "{% endfor %}{% endfor %}",
    "calls that double": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(64) }}",
    "recursive loop": "{% for x in [[[]]] recursive %}{{ loop([[[]]]) }}{% endfor %}",
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
    "bytes that are no text": "{{ '\ud800'.encode('utf-8') }}",
    "endless iterator": "{% for x in cycler(1).next %}{% endfor %}",
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


def test_two_threads_have_a_budget_each() -> None:
    """Both have begun when the first one works: neither takes from the other."""
    template = ChatTemplate("{{ tools[0].wait }}{% for i in range(600000) %}{% endfor %}ok")
    arrived, errors = threading.Barrier(2), []

    class Waiting(dict):
        """Its item is there when the other thread asks for one, too."""

        def __getitem__(self, key: str) -> str:
            arrived.wait(60)
            return ""

    def render() -> None:
        try:
            assert template.render(MESSAGES, [Waiting()]) == "ok"
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=render) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_another_thread_gives_no_new_budget() -> None:
    """A render that starts and ends in the middle of another does not refill its budget."""
    template = ChatTemplate(
        "{% for i in range(600000) %}{% endfor %}{{ tools[0].wait }}"
        "{% for i in range(600000) %}{% endfor %}"
    )

    class Rendering(dict):
        def __getitem__(self, key: str) -> str:
            thread = threading.Thread(target=lambda: ChatTemplate("").render(MESSAGES, None))
            thread.start()
            thread.join()
            with pytest.raises(InvalidRequestError):
                template.render(MESSAGES, [{}])
            return ""

    with pytest.raises(InvalidRequestError, match="too much work"):
        template.render(MESSAGES, [Rendering()])


INVALID = {
    "no loop": "{% for %}",
    "cut": "{{",
    "tag": "{% unknown %}",
    "filter": "{{ x | no_filter }}",
    "nested blocks": "{% for i in x %}" * 30 + "{% endfor %}" * 30,
    "nested parentheses": "{{ " + "(" * 10_000 + "1" + ")" * 10_000 + " }}",
    "huge": "x" * (MAX_SOURCE + 1),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_templates(case: str) -> None:
    with pytest.raises(ModelLoadError, match="chat template"):
        ChatTemplate(INVALID[case])


def test_loops_keep_what_templates_use() -> None:
    source = """{% for k, v in tools[0].items() %}{{ loop.index }}/{{ loop.length }}{{ k }}
{%- if not loop.last %},{% endif %}{% else %}none{% endfor %}|
{%- for m in messages if m.role == 'user' %}{{ loop.first }}{{ loop.nextitem }}{% endfor %}|
{%- for x in [] %}{% else %}none{% endfor %}|{% for x in missing %}{% endfor %}
{%- for x in [1, [2, 3]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}"""
    got = ChatTemplate(source).render(MESSAGES, [{"a": 1, "b": 2}])
    assert got == "1/2a,2/2b|True|none|123"


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
