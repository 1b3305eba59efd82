"""Chat templates with the features that published models use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from kvist.checkpoint import Checkpoint, CheckpointKind
from kvist.errors import RequestError
from kvist.text import load_tokenizer
from kvist.text.chat import ChatTemplate

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ja, ü <b>"}]


def render(source: str, messages: list[dict[str, Any]] = CHAT, **options: Any) -> str:
    return ChatTemplate(source, special_tokens={}).render(messages, **options)


def model_folder(folder: Path, chat_template: str | None) -> Checkpoint:
    """Return a tokenizer with one token per byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": chat_template}))
    return Checkpoint(path=folder, kind=CheckpointKind.HF, name="m")


@pytest.mark.case("template-generation-tag")
def test_the_generation_tag_has_no_effect(tmp_path: Path) -> None:
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    template = load_tokenizer(model_folder(tmp_path, source)).chat_template
    assert template is not None
    assert template.render(CHAT) == "hija, ü <b>"


@pytest.mark.case("template-generation-tag")
def test_the_generation_tag_has_its_own_scope_and_loop_controls_work_in_it() -> None:
    source = (
        "{% set x = 1 %}{% for m in messages %}{%- generation -%}{% set x = 2 %}{{ x }}"
        "{% if m.role == 'user' %}{% continue %}{% endif %}{% endgeneration %}!{% endfor %}{{ x }}"
    )
    assert render(source) == "22!1"


@pytest.mark.case("template-generation-tag")
def test_a_model_with_a_broken_template_serves_completions_and_refuses_chats(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(model_folder(tmp_path, "{% unknown %}"))
    assert tokenizer.chat_template is None
    assert "unknown" in tokenizer.no_chat_template_reason
    assert "--chat-template" in tokenizer.no_chat_template_reason
    assert tokenizer.encode("ab")


TOJSON = [
    "{{ messages | tojson }}",
    "{{ messages | tojson(ensure_ascii=False) }}",
    "{{ messages | tojson(ensure_ascii=True) }}",
    "{{ messages | tojson(indent=2) }}",
    "{{ messages | tojson(indent='\t') }}",
    "{{ messages[0] | tojson(separators=(',', ':')) }}",
    "{{ messages[0] | tojson(sort_keys=True) }}",
    "{{ messages[0] | tojson(True, 4, None, True) }}",
    "{{ '𐐀é\\n<&>' | tojson(ensure_ascii=True) }}",
]


@pytest.mark.case("template-tojson")
@pytest.mark.parametrize("arguments", ["", "ensure_ascii=False", "separators=(',', ':')", "sort_keys=True", "indent=4"])
def test_tojson_accepts_the_arguments_of_json_dumps(arguments: str) -> None:
    expected = eval(f"json.dumps(CHAT, **{{'ensure_ascii': False, **dict({arguments})}})")
    assert render(f"{{{{ messages | tojson({arguments}) }}}}") == expected


@pytest.mark.case("template-tojson")
@pytest.mark.model
@pytest.mark.parametrize("source", TOJSON)
def test_tojson_equals_transformers(source: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    theirs: Any = render_jinja_template([CHAT], chat_template=source)[0]
    assert render(source) == theirs[0]


@pytest.mark.case("template-tools-none")
@pytest.mark.parametrize("name", ["tools", "documents"])
def test_tools_and_documents_are_none_in_templates(name: str) -> None:
    source = "{% if " + name + " is not none %}You may use: {% endif %}{{ messages[0].content }}"
    assert render(source) == "hi"


def test_any_exception_of_a_template_is_a_request_error() -> None:
    for source in ("{{ messages[7].content.x }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ 1 // 0 }}"):
        with pytest.raises(RequestError, match="chat template rejects"):
            render(source)
