"""Tokens that end an answer, beyond those that a model's configuration names.

A chat model's tokenizer often names its end-of-turn token while config.json still names the base model's token, or no
token. Some GGUF files name no end-of-turn token at all; there the known tokens are found by their text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvist.checkpoint import read_json

KNOWN_END_TOKENS = frozenset(
    {
        "</s>",
        "<end_of_turn>",
        "<|end|>",
        "<|end_of_sentence|>",
        "<|end_of_text|>",
        "<|end_of_turn|>",
        "<|endoftext|>",
        "<|eom_id|>",
        "<|eot_id|>",
        "<|eot|>",
        "<|im_end|>",
        "<｜end▁of▁sentence｜>",
    }
)
_ORDINARY = frozenset({1, 6})  # tokenizer.ggml.token_type of ordinary text: NORMAL and BYTE


def end_tokens_of_tokenizer(folder: Path) -> tuple[int, ...]:
    """Return the id of a Hugging Face tokenizer's `eos_token`, if it has one. Raises `ModelLoadError` for a broken
    file."""
    config = _optional_json(folder / "tokenizer_config.json")
    text = _content(config.get("eos_token")) or _content(
        _optional_json(folder / "special_tokens_map.json").get("eos_token")
    )
    if text is None:
        return ()
    token_id = _id_in_config(config, text)
    if token_id is None:
        token_id = _id_in_tokenizer(_optional_json(folder / "tokenizer.json"), text)
    return () if token_id is None else (token_id,)


def end_tokens_by_text(tokens: Sequence[object], kinds: Sequence[object]) -> tuple[int, ...]:
    """Return the known end tokens of a GGUF vocabulary that are not ordinary text. `kinds`:
    tokenizer.ggml.token_type."""
    return tuple(
        token_id
        for token_id, (token, kind) in enumerate(zip(tokens, kinds, strict=False))
        if token in KNOWN_END_TOKENS and kind not in _ORDINARY
    )


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _content(token: object) -> str | None:
    """Return the text of a token, which files write as a string or as {"content": string}."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) and content else None


def _id_in_config(config: Mapping[str, Any], text: str) -> int | None:
    added = config.get("added_tokens_decoder")
    if not isinstance(added, Mapping):
        return None
    return next((int(key) for key, token in added.items() if _content(token) == text and key.isdecimal()), None)


def _id_in_tokenizer(tokenizer: Mapping[str, Any], text: str) -> int | None:
    for token in tokenizer.get("added_tokens") or []:
        if _content(token) == text and isinstance(token.get("id"), int):
            return int(token["id"])
    vocabulary = (tokenizer.get("model") or {}).get("vocab")
    if isinstance(vocabulary, Mapping):
        found = vocabulary.get(text)
        return found if isinstance(found, int) else None
    pieces = vocabulary if isinstance(vocabulary, list) else []  # Unigram: [piece, score] in the order of the ids
    return next((number for number, piece in enumerate(pieces) if piece and piece[0] == text), None)
