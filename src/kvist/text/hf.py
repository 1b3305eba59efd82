"""Builds a tokenizer from a Hugging Face model folder.

The folder needs tokenizer.json; tokenizer_config.json, special_tokens_map.json and chat_template.jinja are optional.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from kvist.checkpoint import read_json
from kvist.errors import ModelLoadError
from kvist.text.config import TextConfig
from kvist.text.template_source import find_chat_template
from kvist.text.tokenizer import Alphabet, Tokenizer

_SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


def tokenizer_from_folder(folder: Path, options: TextConfig) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelLoadError(
            f"{folder} has no tokenizer.json. Create one with transformers: "
            "AutoTokenizer.from_pretrained(folder, use_fast=True).save_pretrained(folder)"
        )
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ModelLoadError(f"cannot read {path}: {error}") from error
    config = _optional_json(folder / "tokenizer_config.json")
    special = {**_named_tokens(_optional_json(folder / "special_tokens_map.json")), **_named_tokens(config)}
    bos = special.get("bos_token")
    chat_template, no_chat_template_reason = find_chat_template(
        options, _own_template(folder, config), special, config.get("response_template")
    )
    return Tokenizer(
        backend,
        alphabet=_alphabet(backend, path),
        chat_template=chat_template,
        no_chat_template_reason=no_chat_template_reason,
        content_is_text=options.special_tokens_in_content == "text",
        prompt_start_id=backend.token_to_id(bos) if bos and config.get("add_bos_token", False) else None,
    )


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens by name. A file has each token as a string or as {"content": string}."""
    named = {}
    for name in _SPECIAL_NAMES:
        value = config.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            named[name] = content
    return named


def _alphabet(backend: Backend, path: Path) -> Alphabet:
    spec = json.loads(backend.to_str()).get("decoder") or {}
    steps = [step.get("type") for step in spec.get("decoders", [spec])]
    if steps == ["ByteLevel"]:
        return Alphabet.BYTE_LEVEL
    if "ByteFallback" in steps or steps == ["Metaspace"]:
        return Alphabet.SENTENCEPIECE
    raise ModelLoadError(
        f"{path}: decoder {'+'.join(map(str, steps))} is not supported; supported: ByteLevel, ByteFallback, Metaspace"
    )


def _own_template(folder: Path, config: Mapping[str, Any]) -> object:
    file = folder / "chat_template.jinja"
    source: object = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    if isinstance(source, list):  # several named templates; "default" is for plain chats
        return next((entry["template"] for entry in source if entry.get("name") == "default"), None)
    return source
