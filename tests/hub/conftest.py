"""A hub on loopback, and the Hub's own client, which looks for it there and keeps files in a folder of the test."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants

from kvist.testing.fake_hub import FakeHub, Repo

INDEX = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
SMALL = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{ }",
    "README.md": b"read me",
    "onnx/model.onnx": b"another format",
}
REPOS = {
    "org/one-file": Repo(files={**SMALL, "model.safetensors": b"w" * 3000, "pytorch_model.bin": b"pickled"}),
    "org/indexed": Repo(
        files={
            **SMALL,
            "model.safetensors.index.json": json.dumps(INDEX).encode(),
            "model-00001-of-00002.safetensors": b"1" * 1000,
            "model-00002-of-00002.safetensors": b"2" * 1000,
            "consolidated.safetensors": b"the same once more",
            "original/model.safetensors": b"and again",
        },
        revisions=("main", "v2"),
    ),
    "org/one-gguf": Repo(files={"only.gguf": b"GGUF", "README.md": b""}),
    "org/ggufs": Repo(files={"q4.gguf": b"GGUF4", "q8.gguf": b"GGUF8", "README.md": b""}),
    "org/pickled": Repo(files={**SMALL, "pytorch_model.bin": b"pickled"}),
    "org/gated": Repo(files={**SMALL, "model.safetensors": b"w"}, is_gated=True),
    "org/private": Repo(files={**SMALL, "model.safetensors": b"w"}, is_private=True),
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with FakeHub(repos=dict(REPOS)) as hub:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        url = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        close_session()  # a connection of an earlier test's hub
        yield hub
        close_session()
