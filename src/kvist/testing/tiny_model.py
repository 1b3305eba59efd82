"""A llama of two layers with random weights: a real model, computed on a CPU in a fraction of a millisecond a token."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch

from kvist.checkpoint import find_checkpoint
from kvist.grammar.backend import Vocabulary
from kvist.grammar.backends import GRAMMAR_BACKENDS
from kvist.grammar.compiler import GrammarCompiler
from kvist.models import load_model_config
from kvist.models.decoder import CausalLM
from kvist.models.load import load_model
from kvist.models.parallel import TensorParallel
from kvist.testing.tokenizers import byte_tokenizer

VOCAB_SIZE = 128
_END_ID = 2
MAX_MODEL_LEN = 256
_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": MAX_MODEL_LEN,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": _END_ID,
    "bos_token_id": 1,
    "hidden_act": "silu",
}


def write_tiny_model(folder: Path, *, vocab_size: int = VOCAB_SIZE, max_model_len: int = MAX_MODEL_LEN) -> Path:
    """Write the model's config.json, and return the folder: an engine serves it with `--load-format dummy`, a server
    needs a tokenizer beside it (`write_byte_tokenizer`)."""
    config = {**_CONFIG, "vocab_size": vocab_size, "max_position_embeddings": max_model_len}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@cache
def tiny_grammars() -> GrammarCompiler:
    """Return a compiler of constraints. The tiny model has the first tokens of `byte_tokenizer`."""
    vocabulary = Vocabulary(tokens=byte_tokenizer(), size=VOCAB_SIZE, end_token_ids=(_END_ID,))
    return GrammarCompiler(lambda: GRAMMAR_BACKENDS["llguidance"].make({}, vocabulary))


def load_tiny_model(folder: Path) -> CausalLM:
    """Load the model of `write_tiny_model` on the CPU, in fp32; its weights are always the same."""
    checkpoint = find_checkpoint(str(folder))
    return load_model(
        checkpoint,
        load_model_config(checkpoint),
        dtype=torch.float32,
        device=torch.device("cpu"),
        tp=TensorParallel(),
        load_format="dummy",
        seed=3,
    )
