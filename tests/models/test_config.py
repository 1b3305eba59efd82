from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import pytest

from kvist.errors import ModelLoadError
from kvist.models import load_model_config
from kvist.models.config import LinearRope, Llama3Rope, YarnRope
from tests.models.conftest import WriteConfig

LLAMA3: dict[str, Any] = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_every_field_of_a_config_is_read(write_config: WriteConfig) -> None:
    config = load_model_config(write_config())
    assert (config.family, config.num_layers, config.hidden_size, config.head_dim) == ("llama", 2, 64, 16)
    assert (config.num_heads, config.num_kv_heads, config.intermediate_size, config.vocab_size) == (4, 2, 96, 101)
    assert (config.rms_norm_eps, config.rope_theta, config.rope_scaling) == (1e-5, 10000.0, None)
    assert (config.max_position_embeddings, config.tie_word_embeddings) == (256, False)
    assert (config.attention_bias, config.attention_output_bias) == (False, False)
    assert config.eos_token_ids == (2,)


def test_transformers_4_and_5_rope_fields_mean_the_same(write_config: WriteConfig) -> None:
    four = load_model_config(write_config(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **LLAMA3}))
    five = load_model_config(
        write_config(rope_theta=None, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3})
    )
    assert four == five
    assert four.rope_scaling == Llama3Rope(**LLAMA3)
    assert four.rope_theta == 5e5


def test_the_older_name_of_the_rope_type_is_read(write_config: WriteConfig) -> None:
    config = load_model_config(write_config(rope_scaling={"type": "linear", "factor": 4.0}))
    assert config.rope_scaling == LinearRope(factor=4.0)


def test_default_rope_parameters_mean_no_scaling(write_config: WriteConfig) -> None:
    config = load_model_config(write_config(rope_parameters={"rope_type": "default", "rope_theta": 7.0}))
    assert (config.rope_theta, config.rope_scaling) == (7.0, None)


def test_eos_tokens_of_both_files_count_once(write_config: WriteConfig) -> None:
    checkpoint = write_config(eos_token_id=[2, 5])
    (checkpoint.path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 9]}))
    assert load_model_config(checkpoint).eos_token_ids == (2, 5, 9)


def test_a_model_without_eos_has_none(write_config: WriteConfig) -> None:
    assert load_model_config(write_config(eos_token_id=None)).eos_token_ids == ()


def test_qwen2_has_biases_on_qkv_only(write_config: WriteConfig) -> None:
    config = load_model_config(write_config(model_type="qwen2", architectures=["Qwen2ForCausalLM"]))
    assert (config.attention_bias, config.attention_output_bias) == (True, False)


def test_qwen3_has_its_own_head_dim_and_norms(write_config: WriteConfig) -> None:
    config = load_model_config(write_config(model_type="qwen3", architectures=["Qwen3ForCausalLM"]))
    assert (config.head_dim, config.attention_bias) == (128, False)


def test_a_sliding_window_that_is_switched_off_is_ignored(write_config: WriteConfig) -> None:
    checkpoint = write_config(
        model_type="qwen2",
        architectures=["Qwen2ForCausalLM"],
        sliding_window=4096,
        use_sliding_window=False,
        max_window_layers=1,
    )
    assert load_model_config(checkpoint).family == "qwen2"


def test_yarn_rope_sets_the_maximum_position(write_config: WriteConfig) -> None:
    rope = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    config = load_model_config(write_config(max_position_embeddings=128, rope_scaling=rope))
    assert config.max_position_embeddings == 512
    assert isinstance(config.rope_scaling, YarnRope)
    assert config.rope_scaling.attention_factor == pytest.approx(0.1 * math.log(4.0) + 1.0)
    already = load_model_config(write_config(max_position_embeddings=600, rope_scaling=rope))
    assert already.max_position_embeddings == 600


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("model_type", {"model_type": "gpt2"}),
        ("model_type", {"model_type": None}),
        ("architectures", {"architectures": ["LlamaForSequenceClassification"]}),
        ("hidden_size", {"hidden_size": None}),
        ("hidden_size", {"hidden_size": "64"}),
        ("vocab_size", {"vocab_size": 0}),
        ("num_hidden_layers", {"num_hidden_layers": True}),
        ("num_key_value_heads", {"num_key_value_heads": 3}),
        ("head_dim", {"head_dim": 15}),
        ("hidden_act", {"hidden_act": "gelu"}),
        ("mlp_bias", {"mlp_bias": True}),
        ("num_experts", {"num_experts": 8}),
        ("num_local_experts", {"num_local_experts": 8}),
        ("quantization_config", {"quantization_config": {"quant_method": "awq"}}),
        ("sliding_window", {"sliding_window": 4096}),
        ("sliding_window", {"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 1}),
        ("layer_types", {"layer_types": ["full_attention", "sliding_attention"]}),
        ("layer_types", {"layer_types": "full_attention"}),
        ("rope_scaling.rope_type", {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}),
        ("rope_scaling.type", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}),
        ("rope_scaling.factor", {"rope_scaling": {"type": "linear"}}),
        ("rope_scaling.beta_fast", {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": "x"}}),
        (
            "rope_parameters.high_freq_factor",
            {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "high_freq_factor": 0}},
        ),
        ("rope_parameters", {"rope_parameters": "default"}),
        (
            "rope_parameters.partial_rotary_factor",
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        ),
        ("partial_rotary_factor", {"partial_rotary_factor": 0.5}),
        ("eos_token_id", {"eos_token_id": "</s>"}),
        ("tie_word_embeddings", {"tie_word_embeddings": "no"}),
    ],
)
def test_unsupported_features_are_refused_by_the_name_of_their_field(
    write_config: WriteConfig, field: str, changes: dict[str, Any]
) -> None:
    with pytest.raises(ModelLoadError, match=rf"config\.json: {field.replace('.', '[.]')} "):
        load_model_config(write_config(**changes))


def test_reading_a_config_imports_no_torch() -> None:
    code = "import sys, kvist.models; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
