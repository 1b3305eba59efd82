"""A tokenizer from the metadata of a GGUF file: byte-level BPE (`tokenizer.ggml.model` = "gpt2").

GGUF names the pre-tokenizer by a word (`tokenizer.ggml.pre`), not by its rules; the rules for the words we know are
here, each one the pre-tokenizer of that model family's published tokenizer.json. A word we do not know is an error: a
wrong split would not crash, it would quietly make every answer worse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from kvist.checkpoint import read_gguf_header
from kvist.errors import ModelLoadError
from kvist.text.config import TextConfig
from kvist.text.template_source import find_chat_template
from kvist.text.tokenizer import Alphabet, Tokenizer

PreTokenizer = pre_tokenizers.PreTokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # tokenizer.ggml.token_type

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _split(*patterns: str) -> PreTokenizer:
    """Each pattern cuts further what the former ones left; then bytes become GPT-2's printable alphabet."""
    steps: list[PreTokenizer] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_PRE_TOKENIZERS: dict[str, Callable[[], PreTokenizer]] = {
    "default": lambda: _split(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": lambda: _split(_GPT2),
    "smollm": lambda: _split(r"\p{N}", _GPT2),
    "starcoder": lambda: _split(r"\p{N}", _GPT2),
    "llama-bpe": lambda: _split(_LLAMA3),
    "qwen2": lambda: _split(_QWEN2),
}
_IGNORE_MERGES = frozenset({"llama-bpe"})  # a piece that is a whole token needs no merges
_NFC = frozenset({"qwen2"})


def tokenizer_from_gguf(path: Path, options: TextConfig) -> Tokenizer:
    metadata = read_gguf_header(path).metadata
    try:
        return _build(metadata, options)
    except ModelLoadError as error:
        raise ModelLoadError(f"{path}: {error.message}") from error
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ModelLoadError(f"{path}: its tokenizer metadata is broken: {error!r}") from error


def _build(metadata: Mapping[str, Any], options: TextConfig) -> Tokenizer:
    model = metadata.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise ModelLoadError(
            f"tokenizer.ggml.model is {model!r}; from GGUF only byte-level BPE ('gpt2') can be read. "
            "Use the model's Hugging Face folder instead"
        )
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in _PRE_TOKENIZERS:
        raise ModelLoadError(
            f"tokenizer.ggml.pre is {pre!r}; known are {', '.join(sorted(_PRE_TOKENIZERS))}. "
            "Use the model's Hugging Face folder instead"
        )
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    try:
        backend = Backend(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in _IGNORE_MERGES))
    except Exception as error:  # the library raises bare Exception
        raise ModelLoadError(f"its vocabulary and merges do not fit: {error}") from error
    backend.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    if pre in _NFC:
        backend.normalizer = normalizers.NFC()
    _add_special(backend, tokens, metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens)))
    chat_template, no_chat_template = find_chat_template(
        options, metadata.get("tokenizer.chat_template"), _template_tokens(metadata, tokens)
    )
    return Tokenizer(
        backend,
        alphabet=Alphabet.BYTE_LEVEL,
        chat_template=chat_template,
        no_chat_template=no_chat_template,
        content_is_text=options.special_tokens_in_content == "text",
        # llama.cpp's rule: the flag when it is there, else only Llama 3 starts with bos
        prompt_start_id=metadata.get("tokenizer.ggml.bos_token_id")
        if metadata.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe")
        else None,
    )


def _add_special(backend: Backend, tokens: list[str], kinds: list[int]) -> None:
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (_CONTROL, _UNKNOWN):
            backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == _USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False, special=False)])


def _template_tokens(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, str]:
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _TEMPLATE_NAMES.items()}
    return {name: tokens[i] for name, i in ids.items() if i is not None}


_TEMPLATE_NAMES = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
