"""Different models with equal name, configuration and size never serve together or share pages; and a router refuses
workers with another vocabulary than its own."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from kvist import fingerprint
from kvist.checkpoint import Checkpoint, find_checkpoint
from kvist.errors import ConfigError, ModelLoadError
from kvist.fingerprint import model_fingerprint
from kvist.kv.keys import page_digests
from kvist.kv.layout import PageLayout, namespace
from kvist.memory.persistence import PersistentPages
from kvist.request import EpochId, Role, WorkerId
from kvist.router.config import RouterConfig
from kvist.router.registry import GatewayTokenizer, Registry, WorkerState
from kvist.store.backend import StoreContext
from kvist.store.file import FileStore
from kvist.testing.specs import make_spec
from kvist.text.fingerprint import tokenizer_fingerprint, vocabulary_fingerprint
from kvist.text.tokenizer import Alphabet, Tokenizer
from kvist.wire import EngineSpec, Welcome

LAYOUT = PageLayout(num_kv_heads=1, num_layers=1, page_size=4, head_dim=4, dtype="float32")
NUM_BYTES = 1 << 20


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def hf(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(np.random.default_rng(1).bytes(NUM_BYTES))
    return folder


def gguf(folder: Path) -> Path:
    folder.mkdir(parents=True)
    writer = GGUFWriter(folder / "model.gguf", "llama")
    writer.add_tensor("middle", np.random.default_rng(1).random(NUM_BYTES // 4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "model.gguf"


def change_the_middle(weights: Path, *, keeping_mtime: bool = False) -> None:
    before = weights.stat()
    with weights.open("r+b") as file:
        file.seek(NUM_BYTES // 2)
        byte = file.read(1)
        file.seek(NUM_BYTES // 2)
        file.write(bytes([byte[0] ^ 1]))
    if keeping_mtime:
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))


def weights_of(checkpoint: Checkpoint) -> Path:
    return next(checkpoint.path.glob("*.safetensors")) if checkpoint.path.is_dir() else checkpoint.path


Maker = Callable[[Path], Path]
both = pytest.mark.parametrize("make", [hf, gguf])


def two_models(make: Maker, tmp_path: Path) -> tuple[Checkpoint, Checkpoint]:
    """Make two models of equal name, configuration and size that differ in one byte."""
    a, b = (find_checkpoint(str(make(tmp_path / side / "model"))) for side in ("a", "b"))
    change_the_middle(weights_of(b))
    assert (a.name, weights_of(a).stat().st_size) == (b.name, weights_of(b).stat().st_size)
    return a, b


def spec_of(checkpoint: Checkpoint, role: Role, tokenizer: str = "") -> EngineSpec:
    name = model_fingerprint(checkpoint)
    return make_spec(
        worker_id=WorkerId(f"{role}:1"),
        epoch=EpochId(role.value),
        role=role,
        model_fingerprint=name,
        tokenizer_fingerprint=tokenizer,
        model_name=checkpoint.name,
        page_size=4,
        num_pages=16,
        namespace=namespace(name, LAYOUT),
    )


@pytest.mark.case("two-models-one-name")
@both
def test_the_registry_refuses_a_second_model_and_names_both_fingerprints(make: Maker, tmp_path: Path) -> None:
    a, b = two_models(make, tmp_path)
    prefill, decode = spec_of(a, Role.PREFILL), spec_of(b, Role.DECODE)
    registry = Registry(RouterConfig())
    workers = [registry.add(f"http://{use.value}:1", use, 0.0) for use in (Role.PREFILL, Role.DECODE)]
    registry.on_welcome(workers[0], Welcome(spec=prefill), 1.0)
    with pytest.raises(ConfigError, match="another model") as refused:
        registry.on_welcome(workers[1], Welcome(spec=decode), 1.0)
    assert prefill.model_fingerprint in refused.value.message
    assert decode.model_fingerprint in refused.value.message
    assert [worker.state for worker in workers] == [WorkerState.READY, WorkerState.JOINING]


@pytest.mark.case("two-models-one-store")
@both
def test_store_and_persistence_never_return_pages_of_another_model(make: Maker, tmp_path: Path) -> None:
    spaces = [spec_of(checkpoint, Role.UNIFIED).namespace for checkpoint in two_models(make, tmp_path)]
    prompt = list(range(12))
    pages = [memoryview(bytes([number]) * LAYOUT.page_bytes) for number in range(3)]
    stores = [
        FileStore(tmp_path / "s", StoreContext(namespace=space, page_bytes=LAYOUT.page_bytes), capacity_bytes=1 << 20)
        for space in spaces
    ]
    digests = [page_digests(prompt, 4, space) for space in spaces]
    assert not set(digests[0]) & set(digests[1])
    assert stores[0].put(digests[0], pages) == 3
    assert [stores[1].exists(names) for names in digests] == [0, 0]
    assert [stores[1].get(names, [memoryview(bytearray(page)) for page in pages]) for names in digests] == [0, 0]

    first = PersistentPages(tmp_path / "p", namespace=spaces[0], num_pages=3, page_bytes=LAYOUT.page_bytes)
    first.record([0], [(digests[0][0], None)])
    first.close()
    other = PersistentPages(tmp_path / "p", namespace=spaces[1], num_pages=3, page_bytes=LAYOUT.page_bytes)
    assert other.restore() == []
    other.close()


# ---------------------------------------------------------------- the fingerprint of a model


@both
def test_equal_files_have_one_fingerprint_which_is_cached_until_they_change(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "_SETTLED_NS", -(10**12))  # also cache digests of files that were just created
    checkpoint = find_checkpoint(str(make(tmp_path / "a" / "model")))
    first = model_fingerprint(checkpoint)
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "a", copy)
    assert model_fingerprint(find_checkpoint(str(copy / "model"))) == first
    hashed: list[Path] = []
    hash_file = fingerprint._hash_file

    def counted(path: Path) -> str:
        hashed.append(path)
        return hash_file(path)

    monkeypatch.setattr(fingerprint, "_hash_file", counted)
    assert model_fingerprint(checkpoint) == first
    assert hashed == []
    change_the_middle(weights_of(checkpoint), keeping_mtime=True)
    assert model_fingerprint(checkpoint) != first
    assert len(hashed) == 1


def test_the_digest_of_a_file_changed_just_now_is_not_cached(tmp_path: Path, cache: Path) -> None:
    model_fingerprint(find_checkpoint(str(hf(tmp_path / "model"))))
    assert not cache.exists()


def test_a_cached_digest_that_is_damaged_or_of_another_user_is_ignored(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "_SETTLED_NS", -(10**12))
    checkpoint = find_checkpoint(str(hf(tmp_path / "model")))
    first = model_fingerprint(checkpoint)
    (record,) = (cache / "kvist" / "digests").iterdir()
    content = record.read_bytes()
    forged = content.replace(json.loads(content)["digest"].encode(), b"0" * 64)
    for damage in (content[:-9], b"", forged):
        record.write_bytes(damage)
        record.chmod(0o666)  # writable by others
        assert model_fingerprint(checkpoint) == first


def test_without_a_writable_home_the_model_is_hashed_at_each_start(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "_SETTLED_NS", -(10**12))
    cache.write_text("no folder")
    checkpoint = find_checkpoint(str(hf(tmp_path / "model")))
    assert model_fingerprint(checkpoint) == model_fingerprint(checkpoint)


def test_the_fingerprint_covers_the_configuration_and_names_unreadable_files(tmp_path: Path) -> None:
    folder = hf(tmp_path / "model")
    checkpoint = find_checkpoint(str(folder))
    first = model_fingerprint(checkpoint)
    (folder / "config.json").write_text('{"rope_theta": 1.0}')
    assert model_fingerprint(checkpoint) != first
    (folder / "config.json").unlink()
    with pytest.raises(ModelLoadError, match="cannot read the model in"):
        model_fingerprint(checkpoint)


# ---------------------------------------------------------------- the fingerprint of a tokenizer


def tokenizer(*words: str, special: tuple[str, ...] = ("</s>",)) -> Tokenizer:
    backend = Backend(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    return Tokenizer(backend, alphabet=Alphabet.BYTE_LEVEL, chat_template=None)


@pytest.mark.case("router-other-tokenizer")
@pytest.mark.parametrize(
    "other", [tokenizer("b", "a"), tokenizer("a"), tokenizer("a", "b", "c"), tokenizer("a", "b", special=("<s>",))]
)
def test_a_worker_with_another_vocabulary_is_refused_and_both_models_are_named(
    other: Tokenizer, tmp_path: Path
) -> None:
    ours, theirs = vocabulary_fingerprint(tokenizer("a", "b")), vocabulary_fingerprint(other)
    registry = Registry(RouterConfig(), GatewayTokenizer(name="our-model", fingerprint=ours))
    worker = registry.add("http://w:1", None, 0.0)
    checkpoint = find_checkpoint(str(hf(tmp_path / "their-model")))
    with pytest.raises(ConfigError, match="--model-path of its workers") as refused:
        registry.on_welcome(worker, Welcome(spec=spec_of(checkpoint, Role.UNIFIED, theirs)), 1.0)
    for name in ("our-model", ours, "their-model", theirs):
        assert name in refused.value.message
    assert worker.state is WorkerState.JOINING
    registry.on_welcome(worker, Welcome(spec=spec_of(checkpoint, Role.UNIFIED, ours)), 2.0)
    assert worker.state is WorkerState.READY


def test_gguf_padding_and_file_order_do_not_change_the_vocabulary_fingerprint() -> None:
    plain = vocabulary_fingerprint(tokenizer("a", "b", "c", special=()))
    assert vocabulary_fingerprint(tokenizer("a", "b", "c", "[PAD3]", "[PAD4]", special=())) == plain
    assert vocabulary_fingerprint(tokenizer("a", "b", "c", "[PAD4]", special=())) != plain


def test_a_checkpoint_without_a_tokenizer_has_an_empty_vocabulary_fingerprint(tmp_path: Path) -> None:
    assert tokenizer_fingerprint(find_checkpoint(str(hf(tmp_path / "model")))) == ""
