"""The splits of each named pre-tokenizer; pieces are shown as text, not in GPT-2's alphabet."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from kvist.text.gguf_pre_tokenizers import RULES
from tests.budget import budget

ALL = sorted(RULES)


@functools.cache
def made(name: str) -> pre_tokenizers.PreTokenizer:
    return RULES[name].pre_tokenizer()


def pieces(name: str, text: str) -> list[str]:
    return [text[start:end] for _, (start, end) in made(name).pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("gpt-2", "I'm 1234 ok!!", ["I", "'m", " 1234", " ok", "!!"]),
        ("smollm", "a 12", ["a", " ", "1", "2"]),
        ("command-r", "a 12", ["a", " ", "1", "2"]),
        ("llama-bpe", "I'M 12345\n\n ok", ["I", "'M", " ", "123", "45", "\n\n", " ok"]),
        ("dbrx", "x=12345", ["x", "=", "123", "45"]),
        ("qwen2", "v 12.5", ["v", " ", "1", "2", ".", "5"]),
        ("deepseek-r1-qwen", "v 12", ["v", " ", "1", "2"]),
        ("qwen35", "नमस्ते 12", ["नमस्ते", " ", "1", "2"]),  # signs stay with their letters
        ("qwen2", "नम", ["नम"]),
        ("tekken", "camelCaseHTTPServer 12a//\n", ["camel", "Case", "HTTPServer", " ", "1", "2", "a", "//\n"]),
        ("gpt-4o", "camelCase's 1234//", ["camel", "Case's", " ", "123", "4", "//"]),
        ("llama4", "HELLOworld", ["HELLOworld"]),
        ("falcon", "a 1234, b", ["a", " ", "123", "4", ",", " b"]),
        ("bloom", "Hi, you 12", ["Hi", ",", " you", " 12"]),
        ("viking", "Hi 12", ["Hi", " ", "1", "2"]),
        ("deepseek-llm", "Hi 世界 123!\n", ["Hi", " ", "世界", " ", "123", "!", "\n"]),
        ("deepseek-coder", "Hi x12;\n", ["Hi", " x", "1", "2", ";", "\n"]),
        ("deepseek-v3", ".append 世界12345", [".append", " ", "世界", "123", "45"]),
        ("default", "a=12345", ["a", "=", "123", "45"]),
    ],
)
def test_texts_are_split_as_by_the_published_rules(name: str, text: str, expected: list[str]) -> None:
    assert pieces(name, text) == expected


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=budget(15, long=500))
@given(text=st.text(alphabet=st.characters(codec="utf-8"), max_size=40) | st.text(alphabet="aB 1\n'.,世é", max_size=40))
def test_the_pieces_contain_the_whole_text(name: str, text: str) -> None:
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    cut = made(name).pre_tokenize_str(text)
    assert "".join(piece for piece, _ in cut) == "".join(piece for piece, _ in in_bytes.pre_tokenize_str(text))


@pytest.mark.parametrize("name", ["gpt-2", "mpt", "olmo", "jais", "phi-2"])
@settings(max_examples=budget(15, long=500))
@given(text=st.text(alphabet=st.characters(codec="utf-8"), max_size=40) | st.text(alphabet="aB 1\n'sé", max_size=40))
def test_gpt2s_pattern_equals_the_librarys_own(name: str, text: str) -> None:
    theirs = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    assert made(name).pre_tokenize_str(text) == theirs.pre_tokenize_str(text)


@pytest.mark.parametrize("name", ["smollm", "starcoder", "refact", "command-r"])
@settings(max_examples=budget(15, long=500))
@given(text=st.text(alphabet="aB 12½٣\n'sé.", max_size=40))
def test_single_digits_equal_the_librarys_digits(name: str, text: str) -> None:
    theirs = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert made(name).pre_tokenize_str(text) == theirs.pre_tokenize_str(text)


GPT_4O = (  # as published by OpenAI
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
    r"""|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
    r"""|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)


@settings(max_examples=budget(15, long=500))
@given(text=st.text(alphabet="aBc 12\n'sé./世\u0301", max_size=40))
def test_gpt_4os_pattern_equals_the_published_one(text: str) -> None:
    theirs = pre_tokenizers.Split(Regex(GPT_4O), "isolated")
    assert pieces("gpt-4o", text) == [piece for piece, _ in theirs.pre_tokenize_str(text)]
