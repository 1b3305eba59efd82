"""Fingerprints of a tokenizer's vocabulary: the text of every id, and the ids that are special.

A router tokenises for all of its workers (docs/adr/0003-tokenise-once.md), so its vocabulary must equal that of their
model. A vocabulary has the same fingerprint whether it comes from a Hugging Face folder or from a GGUF file.
"""

from __future__ import annotations

import logging

from blake3 import blake3

from kvist.checkpoint import Checkpoint, CheckpointKind
from kvist.errors import ModelLoadError
from kvist.fingerprint import cached_digest
from kvist.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


def vocabulary_fingerprint(tokenizer: Tokenizer) -> str:
    """Return the fingerprint: 32 hex digits."""
    entries = sorted((token_id, token) for token, token_id in tokenizer.vocabulary().items())
    # A GGUF file also has names for padding ids, which the tokenizer of the Hugging Face folder lacks.
    lines = [f"{token_id}\0{token}" for token_id, token in entries if token != f"[PAD{token_id}]"]
    special = ",".join(map(str, sorted(tokenizer.special_token_ids)))
    return blake3("\n\0".join([*lines, special]).encode()).hexdigest(length=16)


def tokenizer_fingerprint(checkpoint: Checkpoint) -> str:
    """Return the fingerprint of the checkpoint's own tokenizer, cached like that of its content; "" when the
    checkpoint has no readable tokenizer."""
    from kvist.text import load_tokenizer

    file = checkpoint.path / "tokenizer.json" if checkpoint.kind is CheckpointKind.HF else checkpoint.path
    try:
        return cached_digest("vocabulary", file, lambda: vocabulary_fingerprint(load_tokenizer(checkpoint)))
    except (OSError, ModelLoadError) as error:
        logger.info("the vocabulary of %s is not compared with a router's: %s", checkpoint.path, error)
        return ""
