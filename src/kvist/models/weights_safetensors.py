"""Weights of a Hugging Face folder: one safetensors file, or several with an index. Memory mapped; parts are copied.

Pickled weights (pytorch_model.bin) are not read: unpickling runs code from the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvist.checkpoint import INDEX_FILE, SINGLE_FILE, safetensors_files
from kvist.errors import ModelLoadError
from kvist.models.tensors import DeclaredTensor, Location, Part
from kvist.models.weights import StoredTensor

_DTYPES = {  # names of the format: https://github.com/huggingface/safetensors#format
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class SafetensorsSource:
    def __init__(self, folder: Path) -> None:
        self.origin = str(folder / (INDEX_FILE if (folder / INDEX_FILE).is_file() else SINGLE_FILE))
        self.stored: dict[str, StoredTensor] = {}
        self._files: dict[str, Any] = {}  # tensor name -> the open file that holds it
        for path, wanted in safetensors_files(folder).items():
            self._open(path, wanted)

    def _open(self, path: Path, wanted: frozenset[str] | None) -> None:
        try:
            file: Any = safe_open(path, framework="pt")
            held = frozenset(file.keys())
            if wanted is not None and wanted - held:
                name = min(wanted - held)
                raise ModelLoadError(f"{path}: tensor {name} is missing, but {INDEX_FILE} lists it in this file")
            for name in wanted or held:
                view = file.get_slice(name)
                dtype = _DTYPES.get(view.get_dtype())
                if dtype is None:
                    raise ModelLoadError(f"{path}: tensor {name} has dtype {view.get_dtype()}, which is not supported")
                self.stored[name] = StoredTensor(shape=tuple(view.get_shape()), dtype=dtype, file=str(path))
                self._files[name] = file
        except (OSError, SafetensorError) as error:
            raise ModelLoadError(f"cannot read {path}: {error}") from error

    def location(self, tensor: DeclaredTensor) -> Location:
        return tensor.hf

    def read(self, tensor: DeclaredTensor, part: Part) -> Tensor:
        name, entry = tensor.hf.name, tensor.hf.entry
        view = self._files[name].get_slice(name)
        values: Tensor = view[part] if entry is None else view[(slice(entry.index, entry.index + 1), *part)][0]
        # without a copy the model's speed would depend on the page cache
        return values.clone(memory_format=torch.contiguous_format)
