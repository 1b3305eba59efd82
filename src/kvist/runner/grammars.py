"""Makes the compiler of constraints of one rank, for the tokens of the served model."""

from __future__ import annotations

from kvist.checkpoint import Checkpoint
from kvist.errors import InvalidConstraint
from kvist.grammar.backend import GrammarBackend, Vocabulary
from kvist.grammar.backends import GRAMMAR_BACKENDS
from kvist.grammar.compiler import GrammarCompiler
from kvist.models import ModelConfig
from kvist.text import load_tokenizer


def grammar_compiler(backend: str, checkpoint: Checkpoint, model_config: ModelConfig) -> GrammarCompiler:
    """Return a compiler, which reads the tokenizer in the background. If it cannot, constrained requests fail."""

    def make_backend() -> GrammarBackend:
        if not model_config.eos_token_ids:
            raise InvalidConstraint(
                "the model has no end-of-sequence token, with which a constrained answer could end: add eos_token_id "
                "to its config.json"
            )
        vocabulary = Vocabulary(
            tokens=load_tokenizer(checkpoint),
            size=model_config.vocab_size,
            end_token_ids=model_config.eos_token_ids,
        )
        return GRAMMAR_BACKENDS[backend].make({}, vocabulary)

    return GrammarCompiler(make_backend)
