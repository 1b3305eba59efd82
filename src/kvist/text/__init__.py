"""Text processing of the gateway: tokens from texts and chats, text from tokens, stop strings.

`load_tokenizer` reads a Hugging Face folder or GGUF metadata; neither needs `transformers`.
"""

from __future__ import annotations

from kvist.checkpoint import Checkpoint, CheckpointKind
from kvist.text.bounded import encode_up_to
from kvist.text.config import TextConfig
from kvist.text.detokenizer import IncrementalDetokenizer
from kvist.text.remembered import PromptEncoder
from kvist.text.sampling_defaults import SamplingDefaults, load_sampling_defaults
from kvist.text.stops import StopMatcher, special_token_marks
from kvist.text.tokenizer import Tokenizer

__all__ = [
    "IncrementalDetokenizer",
    "PromptEncoder",
    "SamplingDefaults",
    "StopMatcher",
    "TextConfig",
    "Tokenizer",
    "encode_up_to",
    "load_sampling_defaults",
    "load_tokenizer",
    "special_token_marks",
]


def load_tokenizer(checkpoint: Checkpoint, config: TextConfig | None = None) -> Tokenizer:
    """Load the tokenizer of a checkpoint. Raises `ModelLoadError` that names the file and the missing or unknown part,
    and `ConfigError` for an invalid option."""
    config = config or TextConfig()
    if checkpoint.kind is CheckpointKind.GGUF:
        from kvist.text.gguf import tokenizer_from_gguf

        return tokenizer_from_gguf(checkpoint, config)
    from kvist.text.hf import tokenizer_from_folder

    return tokenizer_from_folder(checkpoint.path, config)
