"""Fixtures that several rooms share."""

from __future__ import annotations

from typing import Any

import pytest

from kvist.checkpoint import find_checkpoint


@pytest.fixture(scope="session")
def transformers_smollm2() -> Any:
    """transformers' own reading of the embedded SmolLM2 GGUF, fp32: half a minute, once a session."""
    import torch
    import transformers

    path = find_checkpoint(None).path
    return transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
