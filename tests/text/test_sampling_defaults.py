from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvist.checkpoint import Checkpoint, CheckpointKind, find_checkpoint
from kvist.errors import ModelLoadError
from kvist.text import SamplingDefaults, load_sampling_defaults


def defaults_of(folder: Path, **values: object) -> SamplingDefaults:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return load_sampling_defaults(Checkpoint(path=folder, kind=CheckpointKind.HF, name="m"))


def test_only_the_recommended_sampling_parameters_are_read(tmp_path: Path) -> None:
    found = defaults_of(tmp_path, temperature=0.6, top_p=0.95, top_k=20, min_p=None, eos_token_id=[1], do_sample=True)
    assert found == SamplingDefaults(temperature=0.6, top_p=0.95, top_k=20)
    more = defaults_of(tmp_path, min_p=0, repetition_penalty=1.05, max_new_tokens=2048)
    assert more == SamplingDefaults(min_p=0.0, repetition_penalty=1.05, max_new_tokens=2048)


def test_a_model_without_recommendations_has_none(tmp_path: Path) -> None:
    assert load_sampling_defaults(Checkpoint(path=tmp_path, kind=CheckpointKind.HF, name="m")) == SamplingDefaults()


@pytest.mark.model
def test_the_embedded_gguf_has_no_recommendations() -> None:
    assert load_sampling_defaults(find_checkpoint(None)) == SamplingDefaults()


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"temperature": "hot"}, {"top_p": 1.5}, {"top_k": 2.5}, {"max_new_tokens": 0}]
)
def test_the_error_for_an_invalid_value_names_file_and_field(tmp_path: Path, wrong: dict[str, object]) -> None:
    with pytest.raises(ModelLoadError, match=rf"generation_config.json: {next(iter(wrong))} "):
        defaults_of(tmp_path, **wrong)
