"""Safetensors folders: the supported forms and the refused ones; dummy weights; progress."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kvist.checkpoint import Checkpoint
from kvist.errors import ConfigError, ModelLoadError
from kvist.models import load_model_config
from kvist.models.load import load_model
from kvist.models.parallel import TensorParallel
from tests.models.conftest import WriteConfig, WriteModel
from tests.models.tiny_models import load_tiny, logits_of, relative_error

CPU = torch.device("cpu")
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def save(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, checkpoint.path / "model.safetensors")


def shard(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Split the tensors over two files with an index, as transformers does."""
    (checkpoint.path / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, checkpoint.path / file)
    weight_map = {name: file for file, held in files.items() for name in held}
    (checkpoint.path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_a_sharded_checkpoint_loads_like_one_file(write_model: WriteModel, prompt: list[int]) -> None:
    checkpoint, tensors = write_model()
    single = logits_of(load_tiny(checkpoint), prompt)
    shard(checkpoint, tensors)
    assert torch.equal(logits_of(load_tiny(checkpoint), prompt), single)


def test_missing_tensor_is_named(write_model: WriteModel) -> None:
    checkpoint, tensors = write_model()
    del tensors[Q_PROJ]
    save(checkpoint, tensors)
    with pytest.raises(ModelLoadError, match=rf"model\.safetensors: tensor {Q_PROJ} is missing"):
        load_tiny(checkpoint)


def test_misshaped_tensor_is_named_with_both_shapes(write_model: WriteModel) -> None:
    checkpoint, tensors = write_model()
    tensors[Q_PROJ] = torch.zeros(63, 64)
    save(checkpoint, tensors)
    with pytest.raises(ModelLoadError, match=rf"model\.safetensors: tensor {Q_PROJ} has shape \(63, 64\).*\(64, 64\)"):
        load_tiny(checkpoint)


def test_unexpected_tensor_is_named(write_model: WriteModel) -> None:
    checkpoint, tensors = write_model()
    save(checkpoint, tensors | {"model.layers.0.self_attn.q_norm.weight": torch.zeros(16)})
    with pytest.raises(
        ModelLoadError, match=r"model\.safetensors: tensor model\.layers\.0\.self_attn\.q_norm\.weight is not"
    ):
        load_tiny(checkpoint)


def test_a_tensor_of_integers_is_refused(write_model: WriteModel) -> None:
    checkpoint, tensors = write_model()
    save(checkpoint, tensors | {Q_PROJ: torch.zeros(64, 64, dtype=torch.int8)})
    with pytest.raises(ModelLoadError, match=f"{Q_PROJ} has dtype int8"):
        load_tiny(checkpoint)


def test_old_rope_buffers_and_a_copy_of_a_tied_head_are_ignored(write_model: WriteModel) -> None:
    checkpoint, tensors = write_model(tie_word_embeddings=True)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8), "lm_head.weight": torch.zeros(101, 64)}
    save(checkpoint, tensors | extra)
    load_tiny(checkpoint)


def test_an_untied_model_without_a_head_is_refused(write_model: WriteModel) -> None:
    checkpoint, tensors = write_model()
    del tensors["lm_head.weight"]
    save(checkpoint, tensors)
    with pytest.raises(ModelLoadError, match=r"lm_head\.weight is missing"):
        load_tiny(checkpoint)


def test_a_folder_without_weights_names_the_expected_files(write_config: WriteConfig) -> None:
    with pytest.raises(ModelLoadError, match=r"neither model\.safetensors nor"):
        load_tiny(write_config())


def test_a_broken_file_is_named(write_config: WriteConfig) -> None:
    checkpoint = write_config()
    (checkpoint.path / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(ModelLoadError, match=r"cannot read .*model\.safetensors"):
        load_tiny(checkpoint)


def test_a_missing_shard_is_named(write_model: WriteModel) -> None:
    checkpoint, tensors = write_model()
    shard(checkpoint, tensors)
    (checkpoint.path / "b.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"b\.safetensors"):
        load_tiny(checkpoint)


def test_a_shard_that_lacks_its_tensor_is_named(write_model: WriteModel) -> None:
    checkpoint, tensors = write_model()
    weight_map = shard(checkpoint, tensors)
    weight_map["lm_head.weight"] = (
        "b.safetensors" if weight_map["lm_head.weight"] == "a.safetensors" else "a.safetensors"
    )
    (checkpoint.path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelLoadError, match=r"lm_head\.weight is missing, but"):
        load_tiny(checkpoint)


def test_a_misshaped_tensor_is_named_with_its_shard(write_model: WriteModel) -> None:
    checkpoint, tensors = write_model()
    tensors[Q_PROJ] = torch.zeros(63, 64)
    save(checkpoint, tensors)
    file = shard(checkpoint, tensors)[Q_PROJ]
    with pytest.raises(ModelLoadError, match=f"{file}: tensor {Q_PROJ} has shape"):
        load_tiny(checkpoint)


def test_a_tensor_that_no_shard_has_is_missing_in_the_index(write_model: WriteModel) -> None:
    checkpoint, tensors = write_model()
    del tensors[Q_PROJ]
    save(checkpoint, tensors)
    shard(checkpoint, tensors)
    with pytest.raises(ModelLoadError, match=f"model.safetensors.index.json: tensor {Q_PROJ} is missing"):
        load_tiny(checkpoint)


def test_an_index_cannot_point_outside_its_folder(write_model: WriteModel) -> None:
    checkpoint, tensors = write_model()
    weight_map = shard(checkpoint, tensors) | {"lm_head.weight": "../b.safetensors"}
    (checkpoint.path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelLoadError, match="a file of the same folder"):
        load_tiny(checkpoint)


def test_unsupported_dtypes_are_refused(write_model: WriteModel) -> None:
    with pytest.raises(ConfigError, match="float16"):
        load_tiny(write_model()[0], dtype=torch.float16)


def test_bf16_loads_and_stays_near_fp32(write_model: WriteModel, prompt: list[int]) -> None:
    checkpoint, _ = write_model(model_type="qwen3", architectures=["Qwen3ForCausalLM"], head_dim=32)
    model = load_tiny(checkpoint, dtype=torch.bfloat16)
    ids, positions = torch.tensor(prompt), torch.arange(len(prompt))
    assert model.forward(ids, positions, lambda _layer, heads, _rotary: heads[:, :4]).dtype is torch.bfloat16
    logits = logits_of(model, prompt)
    assert logits.dtype is torch.float32
    assert relative_error(logits, logits_of(load_tiny(checkpoint), prompt)) < 0.05


def test_bf16_checkpoint_loads_as_fp32_exactly(write_model: WriteModel, prompt: list[int]) -> None:
    checkpoint, tensors = write_model()
    rounded = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save(checkpoint, rounded)
    from_bf16 = logits_of(load_tiny(checkpoint), prompt)
    save(checkpoint, {name: tensor.float() for name, tensor in rounded.items()})
    assert torch.equal(from_bf16, logits_of(load_tiny(checkpoint), prompt))


def test_dummy_weights_depend_on_the_seed_only_and_give_finite_logits(
    write_config: WriteConfig, prompt: list[int]
) -> None:
    checkpoint = write_config(num_hidden_layers=8)
    first, again, other = (
        logits_of(load_tiny(checkpoint, load_format="dummy", seed=seed), prompt) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=0.1)
    assert 0.3 < first.std() < 3


@pytest.mark.parametrize(
    "tp", [TensorParallel(), TensorParallel(rank=1, size=2)], ids=["alone", "rank 1, no o_proj.bias"]
)
def test_progress_counts_up_to_every_tensor(write_model: WriteModel, tp: TensorParallel) -> None:
    checkpoint, tensors = write_model(num_hidden_layers=5, attention_bias=True)
    seen: list[tuple[int, int]] = []
    load_model(
        checkpoint,
        load_model_config(checkpoint),
        dtype=torch.float32,
        device=CPU,
        tp=tp,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == sorted(seen)
    assert seen[-1] == (len(tensors), len(tensors))
    assert len(seen) >= 5


def test_loading_restores_the_number_of_threads(write_model: WriteModel) -> None:
    checkpoint, tensors = write_model()
    torch.set_num_threads(2)
    load_tiny(checkpoint)
    del tensors[Q_PROJ]
    save(checkpoint, tensors)
    with pytest.raises(ModelLoadError):
        load_tiny(checkpoint)
    assert torch.get_num_threads() == 2
