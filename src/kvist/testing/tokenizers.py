"""A tokenizer with one token for each byte: small, exact, and without a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from kvist.text.chat import ChatTemplate
from kvist.text.tokenizer import Alphabet, Tokenizer

END = "<|end|>"


def byte_tokenizer(
    *,
    special_tokens: Sequence[str] = (END,),
    merges: Sequence[tuple[str, str]] = (),
    chat_template: str | None = None,
) -> Tokenizer:
    """Return a tokenizer of 256 bytes (ids 0 to 255), then one token for each of `merges`, then the special tokens.

    The bytes are in the order of their printable characters. `merges` are pairs of tokens, in these characters.
    """
    template = None if chat_template is None else ChatTemplate(chat_template, special_tokens={})
    return Tokenizer(_backend(special_tokens, merges), alphabet=Alphabet.BYTE_LEVEL, chat_template=template)


def write_byte_tokenizer(folder: Path) -> int:
    """Write the default `byte_tokenizer` into a model folder; return the size of its vocabulary."""
    backend = _backend((END,), ())
    backend.save(str(folder / "tokenizer.json"))
    return int(backend.get_vocab_size())


def _backend(special_tokens: Sequence[str], merges: Sequence[tuple[str, str]]) -> Backend:
    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    backend = Backend(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in special_tokens])
    return backend
