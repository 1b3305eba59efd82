"""Models: their configuration (`load_model_config`) and their forward pass (`load_model` in load.py).

`load_model_config` imports no torch, so a gateway may call it.
A model has no pages: it passes q, k and v of each layer to the `attend` of the caller (decoder.py).
"""

from __future__ import annotations

from kvist.checkpoint import Checkpoint, CheckpointKind, read_json
from kvist.models import config_gguf, config_hf
from kvist.models.config import ModelConfig
from kvist.models.families import FAMILIES, family_of_architecture, family_of_model_type
from kvist.models.fields import ConfigFields

__all__ = ["ModelConfig", "load_model_config"]


def load_model_config(checkpoint: Checkpoint) -> ModelConfig:
    """Read the configuration of a checkpoint. Raises `ModelLoadError` that names the file and the field that is
    missing, wrong or not supported."""
    if checkpoint.kind is CheckpointKind.GGUF:
        return _from_gguf(checkpoint)
    return _from_hf(checkpoint)


def _from_hf(checkpoint: Checkpoint) -> ModelConfig:
    path = checkpoint.path / "config.json"
    fields = ConfigFields(read_json(path), origin=str(path))
    name = family_of_model_type(fields.text("model_type"), origin=str(path))
    family, architectures = FAMILIES[name], fields.value("architectures")
    if architectures is not None and architectures != [family.hf_architecture]:
        raise fields.error("architectures", f"is {architectures!r}; only {family.hf_architecture} is supported")
    eos_token_ids = config_hf.read_eos_token_ids(checkpoint, fields)
    return family.config_from_hf(config_hf.HfConfig(family=name, fields=fields, eos_token_ids=eos_token_ids))


def _from_gguf(checkpoint: Checkpoint) -> ModelConfig:
    origin, header = str(checkpoint.path), checkpoint.gguf_header
    metadata = ConfigFields(header.metadata, origin=origin)
    architecture = metadata.text("general.architecture")
    name = family_of_architecture(architecture, origin=origin)
    prefix = f"{architecture}."
    fields = {key.removeprefix(prefix): value for key, value in header.metadata.items() if key.startswith(prefix)}
    return FAMILIES[name].config_from_gguf(
        config_gguf.GgufConfig(
            family=name,
            path=checkpoint.path,
            header=header,
            fields=ConfigFields(fields, origin=origin, prefix=prefix),
            eos_token_ids=config_gguf.read_eos_token_ids(metadata),
        )
    )
