"""The part of the model on each rank, and TP=2 in two real processes against TP=1."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvist.errors import ConfigError
from kvist.models.parallel import TensorParallel
from kvist.models.tensors import PaddedShards
from tests.models.conftest import WriteModel
from tests.models.tiny_models import load_tiny, logits_of, relative_error, write_tiny_in

TP_CASES: dict[str, dict[str, object]] = {
    "kv_heads_split": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "kv_head_replicated": {"attention_bias": True, "num_key_value_heads": 1},
    "qk_norm": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 32},
}
ROOT = Path(__file__).parents[2]


def ranks(size: int) -> list[TensorParallel]:
    return [TensorParallel(rank=rank, size=size) for rank in range(size)]


def test_shards_cover_every_element_once() -> None:
    assert [tp.shard(12, "things") for tp in ranks(4)] == [slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 12)]


def test_kv_heads_are_replicated_when_ranks_outnumber_them() -> None:
    assert [tp.kv_heads(2) for tp in ranks(4)] == [slice(0, 1), slice(0, 1), slice(1, 2), slice(1, 2)]
    assert [tp.kv_heads(4) for tp in ranks(2)] == [slice(0, 2), slice(2, 4)]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_each_rank_holds_the_kv_heads_its_q_heads_attend_over(size: int) -> None:
    num_heads, num_kv_heads = 8, 4
    group = num_heads // num_kv_heads
    for tp in ranks(size):
        q_heads, kv_heads = tp.shard(num_heads, "heads"), tp.kv_heads(num_kv_heads)
        needed = {head // group for head in range(q_heads.start, q_heads.stop)}
        assert needed == set(range(kv_heads.start, kv_heads.stop))


def test_an_indivisible_vocabulary_is_covered_once() -> None:
    vocabulary = PaddedShards(101)
    assert [vocabulary.part(tp) for tp in ranks(4)] == [slice(0, 26), slice(26, 52), slice(52, 78), slice(78, 101)]
    assert {vocabulary.length_on(tp) for tp in ranks(4)} == {26}


@pytest.mark.parametrize(("size", "what"), [(3, "attention heads"), (8, "attention heads")])
def test_a_tp_size_that_does_not_fit_is_a_config_error(write_model: WriteModel, size: int, what: str) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        load_tiny(write_model()[0], tp=TensorParallel(rank=0, size=size))
    assert caught.value.param == "tp"


def test_kv_heads_that_can_neither_be_split_nor_replicated_are_a_config_error(write_model: WriteModel) -> None:
    checkpoint, _ = write_model(num_attention_heads=12, num_key_value_heads=4, head_dim=8)
    with pytest.raises(ConfigError, match="4 KV heads"):
        load_tiny(checkpoint, tp=TensorParallel(rank=0, size=6))


@pytest.mark.e2e
def test_two_ranks_give_the_logits_of_one_rank(prompt: list[int], tmp_path: Path) -> None:
    checkpoints = {name: write_tiny_in(tmp_path / name, **changes) for name, changes in TP_CASES.items()}
    folders = [str(checkpoint.path) for checkpoint in checkpoints.values()]
    command = [
        sys.executable,
        "-m",
        "tests.models.tensor_parallel_rank",
        str(tmp_path / "meeting"),
        ",".join(map(str, prompt)),
    ]
    processes = [subprocess.Popen([*command, str(rank), *folders], cwd=ROOT) for rank in range(2)]
    try:
        codes = [process.wait(timeout=90) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0, 0]
    for name, checkpoint in checkpoints.items():
        both = [torch.load(checkpoint.path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
        assert torch.equal(both[0], both[1]), f"{name}: ranks must get the same logits, or they sample different tokens"
        assert relative_error(both[0], logits_of(load_tiny(checkpoint), prompt)) < 1e-5, name
