"""The tokenizer of one model: text → token ids → bytes, with the special tokens and the chat template.

`Tokenizer` owns a `tokenizers.Tokenizer`, built by gguf.py or hf.py. Every token stands for a fixed string of bytes,
which makes incremental detokenising exact; loading refuses a tokenizer with any other kind of decoder.

`clean_up_tokenization_spaces` is not supported: text that has been streamed cannot be corrected afterwards.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Sequence

import tokenizers

from kvist.text.chat import ChatTemplate
from kvist.text.plain_content import PlainContent


class Alphabet(enum.Enum):
    """How the spelling of a token in the vocabulary encodes its bytes."""

    BYTE_LEVEL = "byte_level"  # GPT-2: every byte has a printable character
    SENTENCEPIECE = "sentencepiece"  # ▁ is a space, <0xE4> is a byte


def _byte_level_alphabet() -> dict[str, int]:
    """Return GPT-2's alphabet, character → byte: printable Latin-1 is unchanged, other bytes map to U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return alphabet


_BYTE_OF = _byte_level_alphabet()


class Tokenizer:
    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        alphabet: Alphabet,
        chat_template: ChatTemplate | None,
        no_chat_template_reason: str = "this model has no chat template; use /v1/completions",
        prompt_start_id: int | None = None,  # the first token of every plain prompt
        content_is_text: bool = False,
    ) -> None:
        """`no_chat_template_reason` is the error for chats when there is no template. With
        `content_is_text`, special tokens spelled in the content of a chat are plain text (`protect`)."""
        self._backend = backend
        self.alphabet = alphabet
        self._prompt_start_id = prompt_start_id
        self.chat_template = chat_template
        self.no_chat_template_reason = no_chat_template_reason
        added = backend.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        self.special_token_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.special_tokens = {self._added[token_id]: token_id for token_id in self.special_token_ids}  # by text
        self.special_token_pattern = _any_of(self.special_tokens)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self._bytes_of: dict[int, bytes] = {}  # a cache, bounded by the vocabulary
        self._plain: PlainContent | None = None
        if content_is_text:
            self._plain = PlainContent(backend, self.special_tokens, self.special_token_pattern)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`, in which spelled special tokens are recognised. Releases the GIL."""
        if self._plain is None:
            ids = self._encode(text, add_special_tokens=add_special_tokens)
        else:
            ids = []
            for place, piece in enumerate(self._plain.split(text)):
                if place % 2:
                    ids += self._plain.ids_of(piece)
                elif piece or place == 0:
                    ids += self._encode(piece, add_special_tokens=add_special_tokens and place == 0)
        start = self._prompt_start_id
        if add_special_tokens and start is not None and ids[:1] != [start]:
            return [start, *ids]
        return ids

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # a batch of one: the library's `encode` holds the GIL, and a long prompt would delay every stream
        ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def protect(self, content: str) -> str:
        """Return message content for a template. With `content_is_text`, special tokens that the content spells reach
        `encode` as plain text."""
        return content if self._plain is None else self._plain.protect(content)

    def vocabulary(self) -> dict[str, int]:
        """Return spelling → id, including added tokens."""
        vocabulary: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        return vocabulary

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of a token; empty for an id without a token (models pad their vocabulary)."""
        known = self._bytes_of.get(token_id)
        if known is None:
            known = self._bytes_of[token_id] = self._spell(token_id)
        return known

    def _spell(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode("utf-8")
        spelling = self._backend.id_to_token(token_id) if token_id >= 0 else None
        if spelling is None:
            return b""
        if self.alphabet is Alphabet.BYTE_LEVEL:
            if all(char in _BYTE_OF for char in spelling):
                return bytes(_BYTE_OF[char] for char in spelling)
            return spelling.encode("utf-8")
        if len(spelling) == 6 and spelling.startswith("<0x") and spelling.endswith(">"):
            return bytes([int(spelling[3:5], 16)])
        return spelling.replace("▁", " ").encode("utf-8")

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of a whole sequence. Bytes that are not UTF-8 become U+FFFD."""
        skipped = self.special_token_ids if skip_special_tokens else frozenset()
        raw = b"".join([self.token_bytes(token_id) for token_id in token_ids if token_id not in skipped])
        return raw.decode("utf-8", "replace")

    def token_text(self, token_id: int) -> str:
        r"""Return the text of a single token, for logprobs. A partial character becomes `bytes:\xe4\xb8`, so that two
        different partial characters never have the same text."""
        raw = self.token_bytes(token_id)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _any_of(texts: Iterable[str]) -> re.Pattern[str] | None:
    """Return a pattern that matches any of the texts, longest first, or None when there is no text."""
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
