"""Weights of a Hugging Face folder: one safetensors file, or several with an index. Memory mapped; parts are copied.

Pickled weights (pytorch_model.bin) are not read: unpickling runs code from the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvist.checkpoint import read_json
from kvist.errors import ModelLoadError
from kvist.models.weights import WHOLE, Shape

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")


class SafetensorsSource:
    def __init__(self, folder: Path) -> None:
        self.origin = str(folder)
        self.shapes: dict[str, Shape] = {}
        self._files: dict[str, Any] = {}  # tensor name -> the open file that holds it
        for path, wanted in _weight_files(folder).items():
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
                if view.get_dtype() not in _FLOATS:
                    raise ModelLoadError(f"{path}: tensor {name} has dtype {view.get_dtype()}; supported: {_FLOATS}")
                self.shapes[name] = tuple(view.get_shape())
                self._files[name] = file
        except (OSError, SafetensorError) as error:
            raise ModelLoadError(f"cannot read {path}: {error}") from error

    def read(self, name: str, rows: slice, columns: slice) -> Tensor:
        view = self._files[name].get_slice(name)
        part: Tensor = view[rows, columns] if columns != WHOLE else view[rows]
        # without a copy the model's speed would depend on the page cache
        return part.clone(memory_format=torch.contiguous_format)


def _weight_files(folder: Path) -> dict[Path, frozenset[str] | None]:
    """Return each file with the tensors to read from it; None: all tensors."""
    index_path = folder / INDEX_FILE
    if not index_path.is_file():
        if not (folder / SINGLE_FILE).is_file():
            raise ModelLoadError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; pickled weights are not read")
        return {folder / SINGLE_FILE: None}
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{index_path}: weight_map must be an object from tensor to file")
    files: dict[Path, set[str]] = {}
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise ModelLoadError(f"{index_path}: tensor {name} must name a file of the same folder, not {file_name!r}")
        files.setdefault(folder / file_name, set()).add(name)
    return {path: frozenset(names) for path, names in files.items()}
