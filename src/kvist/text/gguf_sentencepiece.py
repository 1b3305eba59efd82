"""A BPE backend for SentencePiece vocabularies in GGUF files (`tokenizer.ggml.model` = "llama"): pieces with scores.

SentencePiece repeatedly merges the two neighbours whose joined piece has the highest score. A BPE with a list of merges
sorted by those scores does the same; the published tokenizer.json files of these models are made that way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers

from kvist.errors import ModelLoadError

_NORMAL, _UNKNOWN, _BYTE = 1, 2, 6  # tokenizer.ggml.token_type


def sentencepiece_backend(metadata: Mapping[str, Any], tokens: Sequence[str], kinds: Sequence[int]) -> Backend:
    scores: Sequence[float] = metadata["tokenizer.ggml.scores"]
    if not len(tokens) == len(scores) == len(kinds):
        raise ModelLoadError("the numbers of tokens, scores and token types differ")
    unknown = next((token for token, kind in zip(tokens, kinds, strict=True) if kind == _UNKNOWN), None)
    backend = Backend(
        models.BPE(
            vocab={token: token_id for token_id, token in enumerate(tokens)},
            merges=_merges(tokens, scores, kinds),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=_BYTE in kinds,
        )
    )
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend("▁"))
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def _merges(tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int]) -> list[tuple[str, str]]:
    """Return the merges, highest score first; equal scores in order of token id."""
    score_of = {
        token: score for token, score, kind in zip(tokens, scores, kinds, strict=True) if kind == _NORMAL and token
    }
    merges: list[tuple[str, str]] = []
    for piece in sorted(score_of, key=lambda piece: -score_of[piece]):
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in score_of and right in score_of:
                merges.append((left, right))
    return merges
