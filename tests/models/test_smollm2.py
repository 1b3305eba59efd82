"""The embedded SmolLM2: weights and logits equal those of transformers."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from kvist.checkpoint import find_checkpoint
from kvist.models import load_model_config
from kvist.models.decoder import CausalLM
from kvist.models.load import declare_model, load_model
from kvist.models.parallel import TensorParallel
from kvist.models.weights_gguf import GgufSource
from tests.models.tiny_models import logits_of, relative_error

pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def loaded() -> tuple[CausalLM, float]:
    """The model, and the seconds of processor time that loading took, so that a busy machine does not matter."""
    checkpoint = find_checkpoint(None)
    cpu, start_s = torch.device("cpu"), time.process_time()
    config = load_model_config(checkpoint)
    model = load_model(checkpoint, config, dtype=torch.float32, device=cpu, tp=TensorParallel())
    return model, time.process_time() - start_s


def test_every_tensor_equals_the_one_transformers_reads(transformers_smollm2: Any) -> None:
    checkpoint = find_checkpoint(None)
    config = load_model_config(checkpoint)
    source = GgufSource(checkpoint)
    theirs = transformers_smollm2.state_dict()
    for tensor in declare_model(config).tensors:
        values = source.read(tensor, tensor.part(TensorParallel()))
        assert torch.equal(values, theirs[tensor.hf.name]), tensor.hf.name


def test_logits_equal_transformers(transformers_smollm2: Any, loaded: tuple[CausalLM, float]) -> None:
    smollm2, _ = loaded
    prompt = torch.randint(0, 49152, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.no_grad():
        expected = transformers_smollm2(torch.tensor([prompt])).logits[0]
    assert relative_error(logits_of(smollm2, prompt), expected) < 1e-4
    assert relative_error(logits_of(smollm2, prompt, [32, 1, 1, 6]), expected) < 1e-4


def test_loading_smollm2_takes_seconds(loaded: tuple[CausalLM, float]) -> None:
    _, took_s = loaded
    assert took_s < 40, "3 to 4 s measured"
