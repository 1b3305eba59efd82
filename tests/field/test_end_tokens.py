"""The tokens that end an answer, from every file in which a model can name them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import AddedToken, models
from tokenizers import Tokenizer as Backend

from kvist.checkpoint import Checkpoint, CheckpointKind
from kvist.models import load_model_config

WORDS = ["A", "B", "C", "D", "E", "<s>", "</s>", "<|im_end|>"]
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "vocab_size": 16,
    "max_position_embeddings": 64,
}


def folder_eos(folder: Path, *, config: Any = None, generation: Any = None, **tokenizer_files: Any) -> tuple[int, ...]:
    (folder / "config.json").write_text(json.dumps({**CONFIG, "eos_token_id": config}))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    for name, content in tokenizer_files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    backend = Backend(models.BPE(vocab={word: index for index, word in enumerate(WORDS)}, merges=[]))
    backend.add_special_tokens([AddedToken("<|im_end|>"), AddedToken("<|turn|>")])
    backend.save(str(folder / "tokenizer.json"))
    return load_model_config(Checkpoint(path=folder, kind=CheckpointKind.HF, name="m")).eos_token_ids


@pytest.mark.case("tokenizer-eos")
@pytest.mark.parametrize("eos_token", ["<|im_end|>", {"content": "<|im_end|>", "special": True}])
@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [(6, None, (6, 7)), (None, None, (7,)), (6, [5, 6], (6, 5, 7)), (7, 7, (7,))],
)
def test_an_end_token_named_only_by_the_tokenizer_ends_answers(
    tmp_path: Path, eos_token: Any, config: Any, generation: Any, expected: tuple[int, ...]
) -> None:
    named = {"eos_token": eos_token}
    assert folder_eos(tmp_path, config=config, generation=generation, tokenizer_config=named) == expected


@pytest.mark.case("tokenizer-eos")
@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"special_tokens_map": {"eos_token": "<|turn|>"}}, (8,)),
        ({"tokenizer_config": {"eos_token": "E"}}, (4,)),  # an ordinary token of the vocabulary
        (
            {"tokenizer_config": {"eos_token": "x", "added_tokens_decoder": {"11": {"content": "x"}}}},
            (11,),
        ),
        ({"tokenizer_config": {"eos_token": "nowhere"}}, ()),
        ({"tokenizer_config": {"eos_token": None}}, ()),
        ({}, ()),
    ],
)
def test_the_tokenizers_end_token_is_found_in_any_of_its_files(
    tmp_path: Path, files: dict[str, Any], expected: tuple[int, ...]
) -> None:
    assert folder_eos(tmp_path, **files) == expected


def gguf_eos(folder: Path, words: list[str], kinds: list[int], **ids: int) -> tuple[int, ...]:
    path = folder / "m.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(8)
    writer.add_head_count(2)
    writer.add_feed_forward_length(8)
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    for name, token_id in ids.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token_id)
    writer.add_tensor("token_embd.weight", np.zeros((16, 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return load_model_config(Checkpoint(path=path, kind=CheckpointKind.GGUF, name="m")).eos_token_ids


NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


@pytest.mark.case("tokenizer-eos")
@pytest.mark.parametrize("text", ["<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>"])
@pytest.mark.parametrize("kind", [CONTROL, USER_DEFINED])
@pytest.mark.parametrize(("ids", "expected"), [({}, (3,)), ({"eos": 2}, (2, 3)), ({"eos": 3}, (3,))])
def test_a_gguf_without_an_end_of_turn_token_uses_the_known_token_of_its_vocabulary(
    tmp_path: Path, text: str, kind: int, ids: dict[str, int], expected: tuple[int, ...]
) -> None:
    words, kinds = ["A", "B", "<|eos|>", text], [NORMAL, NORMAL, CONTROL, kind]
    assert gguf_eos(tmp_path, words, kinds, **ids) == expected


def test_end_tokens_of_a_gguf_are_used_and_ordinary_text_does_not_end_answers(tmp_path: Path) -> None:
    words = ["A", "<|im_end|>", "</s>", "<|eot_id|>"]
    assert gguf_eos(tmp_path, words, [NORMAL, CONTROL, NORMAL, CONTROL], eos=0, eot=3) == (0, 3)
    assert gguf_eos(tmp_path, words, [NORMAL, NORMAL, NORMAL, NORMAL], eos=0) == (0,)
