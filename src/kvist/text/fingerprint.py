"""Names a tokenizer by its vocabulary: which id stands for which text, and which ids are special.

A router tokenises for all of its workers (docs/adr/0003-tokenise-once.md), so its vocabulary must be their model's. The
same vocabulary has the same name whether it comes from a Hugging Face folder or from a GGUF file.
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
    """32 hex digits."""
    entries = sorted((token_id, token) for token, token_id in tokenizer.vocabulary().items())
    # A GGUF names the ids that the model has and the tokenizer lacks.
    lines = [f"{token_id}\0{token}" for token_id, token in entries if token != f"[PAD{token_id}]"]
    special = ",".join(map(str, sorted(tokenizer.special_token_ids)))
    return blake3("\n\0".join([*lines, special]).encode()).hexdigest(length=16)


def tokenizer_fingerprint(checkpoint: Checkpoint) -> str:
    """Of the checkpoint's own tokenizer, cached beside its content's; "" when it has none that can be read."""
    from kvist.text import load_tokenizer

    file = checkpoint.path / "tokenizer.json" if checkpoint.kind is CheckpointKind.HF else checkpoint.path
    try:
        return cached_digest("vocabulary", file, lambda: vocabulary_fingerprint(load_tokenizer(checkpoint)))
    except (OSError, ModelLoadError) as error:
        logger.info("the vocabulary of %s is not compared with a router's: %s", checkpoint.path, error)
        return ""
