"""Builds a tokenizer from the metadata of a GGUF file.

Supported are byte-level BPE (`tokenizer.ggml.model` = "gpt2"; gguf_pre_tokenizers.py has the rules that split a text)
and SentencePiece ("llama"; gguf_sentencepiece.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

from kvist.checkpoint import Checkpoint
from kvist.errors import ModelLoadError
from kvist.text.config import TextConfig
from kvist.text.gguf_pre_tokenizers import RULES
from kvist.text.gguf_sentencepiece import sentencepiece_backend
from kvist.text.template_source import find_chat_template
from kvist.text.tokenizer import Alphabet, Tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # tokenizer.ggml.token_type


def tokenizer_from_gguf(checkpoint: Checkpoint, options: TextConfig) -> Tokenizer:
    path, metadata = checkpoint.path, checkpoint.gguf_header.metadata
    try:
        return _build(metadata, options)
    except ModelLoadError as error:
        raise ModelLoadError(f"{path}: {error.message}") from error
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ModelLoadError(f"{path}: the tokenizer metadata is broken: {error!r}") from error


def _build(metadata: Mapping[str, Any], options: TextConfig) -> Tokenizer:
    model = metadata.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise ModelLoadError(
            f"tokenizer.ggml.model is {model!r}; supported in GGUF files are byte-level BPE ('gpt2') and "
            "SentencePiece ('llama'). Use the model's Hugging Face folder instead"
        )
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    kinds: list[int] = metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    try:
        if model == "gpt2":
            alphabet, adds_bos, backend = Alphabet.BYTE_LEVEL, *_byte_level(metadata, tokens)
        else:
            alphabet, adds_bos, backend = Alphabet.SENTENCEPIECE, True, sentencepiece_backend(metadata, tokens, kinds)
            bos = 1 if bos is None else bos
    except (ModelLoadError, KeyError, TypeError, ValueError):
        raise
    except Exception as error:  # the library raises bare Exception
        raise ModelLoadError(f"the vocabulary does not fit the merges: {error}") from error
    _add_special(backend, tokens, kinds)
    chat_template, no_chat_template_reason = find_chat_template(
        options, metadata.get("tokenizer.chat_template"), _template_tokens(metadata, tokens)
    )
    return Tokenizer(
        backend,
        alphabet=alphabet,
        chat_template=chat_template,
        no_chat_template_reason=no_chat_template_reason,
        content_is_text=options.special_tokens_in_content == "text",
        prompt_start_id=bos if metadata.get("tokenizer.ggml.add_bos_token", adds_bos) else None,
    )


def _byte_level(metadata: Mapping[str, Any], tokens: list[str]) -> tuple[bool, Backend]:
    """Return whether prompts begin with bos (unless the file decides otherwise), and the backend."""
    pre = metadata.get("tokenizer.ggml.pre", "default")
    rules = RULES.get(pre)
    if rules is None:
        raise ModelLoadError(
            f"tokenizer.ggml.pre is {pre!r}; supported: {', '.join(sorted(RULES))}. "
            "Use the model's Hugging Face folder instead"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rules.ignores_merges))
    backend.pre_tokenizer = rules.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    if rules.nfc:
        backend.normalizer = normalizers.NFC()
    return rules.adds_bos, backend


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
