from __future__ import annotations

from datetime import UTC, datetime

import pytest

from kvist.errors import ModelLoadError, PromptTooLong, RequestError
from kvist.text.chat import ChatTemplate

HELLO = [{"role": "user", "content": "a <b> & 'c'"}]


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, special_tokens={"bos_token": "<s>"}, now=lambda: datetime(2026, 2, 3, tzinfo=UTC))


def test_template_blocks_are_trimmed_as_in_transformers() -> None:
    source = "{% for m in messages %}\n    {% if true %}\n{{ m.role }}\n    {% endif %}\n{% endfor %}\n"
    assert template(source).render(HELLO) == "user\n"


def test_templates_have_the_names_that_hugging_face_provides() -> None:
    source = "{{ bos_token }}{{ strftime_now('%Y-%m-%d') }}{% if add_generation_prompt %}A:{% endif %}{{ flag }}"
    assert template(source).render(HELLO, options={"flag": 1}) == "<s>2026-02-03A:1"
    assert template(source).render(HELLO, add_generation_prompt=False) == "<s>2026-02-03"


def test_tojson_does_not_escape_html() -> None:
    assert template("{{ messages[0].content | tojson }}").render(HELLO) == "\"a <b> & 'c'\""


def test_an_exception_of_the_template_is_a_request_error() -> None:
    with pytest.raises(RequestError, match="roles must alternate") as caught:
        template("{{ raise_exception('roles must alternate') }}").render(HELLO)
    assert caught.value.param == "messages"


def test_a_type_error_in_the_template_is_a_request_error() -> None:
    with pytest.raises(RequestError):
        template("{{ 'x' + messages[0]['content'] }}").render([{"role": "user", "content": None}])


@pytest.mark.parametrize("source", ["{{ messages.append(1) }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}"])
def test_templates_cannot_leave_the_sandbox(source: str) -> None:
    with pytest.raises(RequestError):
        template(source).render(HELLO)


def test_a_broken_template_is_a_load_error() -> None:
    with pytest.raises(ModelLoadError, match="chat template"):
        template("{% if %}")


def test_a_template_that_writes_far_too_much_is_stopped() -> None:
    long = [{"role": "user", "content": "x" * 1000}] * 50
    repeated = template("{% for m in messages %}{% for n in messages %}{{ m.content }}{% endfor %}{% endfor %}")
    with pytest.raises(PromptTooLong, match="far too long"):
        repeated.render(long, max_chars=100_000)
    with pytest.raises(PromptTooLong):  # writes an empty text a hundred million times
        template("{% for m in range(10000) %}{% for n in range(10000) %}{{ '' }}{% endfor %}{% endfor %}").render(HELLO)
    assert len(repeated.render(long[:5], max_chars=100_000)) == 25_000
