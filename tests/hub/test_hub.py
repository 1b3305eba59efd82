"""Models of the Hub, by the Hub's own client against a hub on loopback: what is downloaded, and what errors say."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants

from kvist.checkpoint import find_checkpoint
from kvist.errors import ConfigError, ModelLoadError
from kvist.hub import find_model
from kvist.hub.name import HubName, hub_name
from kvist.settings import UpSettings, read
from kvist.testing.fake_hub import FakeHub, Repo, commit_of
from kvist.verbs import cluster_shape, run, with_local_model


def find(model_path: str, revision: str | None = None, *, weights: bool = True) -> Path:
    found = find_model(model_path, revision, weights=weights, show=lambda _text: None)
    assert found is not None
    return Path(found)


def names_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("org/name", HubName(repo="org/name")),
        ("Org-1/Name_2.5-7B", HubName(repo="Org-1/Name_2.5-7B")),
        ("org/name/q4.gguf", HubName(repo="org/name", file="q4.gguf")),
        ("org/name/sub/q4.gguf", HubName(repo="org/name", file="sub/q4.gguf")),
        *[
            (text, None)
            for text in ("name", "/org/name", "./org/name", "../name", "~/name", "org/", "a/b/c", "a/../b.gguf")
        ],
        *[(text, None) for text in ("org/name ", "org//name", "org/na me", "http://host/model", "org/name/..", "")],
    ],
)
def test_only_texts_that_cannot_be_other_paths_name_a_model_of_the_hub(text: str, name: HubName | None) -> None:
    assert hub_name(text) == name


def test_of_a_repository_only_the_files_that_are_read_are_downloaded(hub: FakeHub) -> None:
    folder = find("org/one-file")
    wanted = {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    assert names_in(folder) == wanted
    assert sorted(hub.downloads()) == sorted(wanted)
    assert (folder / "model.safetensors").read_bytes() == b"w" * 3000
    assert find_checkpoint(str(folder)).name == "org/one-file"


def test_the_weights_are_those_that_the_index_lists(hub: FakeHub) -> None:
    weights = {path for path in names_in(find("org/indexed")) if "safetensors" in path}
    assert weights == {
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    assert len(hub.downloads()) == len(set(hub.downloads()))


def test_a_router_downloads_no_weights_and_a_worker_gets_them_later(hub: FakeHub) -> None:
    folder = find("org/one-file", weights=False)
    assert "model.safetensors" not in names_in(folder)
    assert find("org/one-file") == folder
    assert "model.safetensors" in names_in(folder)
    assert len(hub.downloads()) == len(set(hub.downloads()))


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: FakeHub) -> None:
    assert find("org/indexed").name == commit_of("main")
    assert find("org/indexed", "v2").name == commit_of("v2")
    asked = len(hub.requests)
    assert find("org/indexed", commit_of("v2")).name == commit_of("v2")
    assert len(hub.requests) == asked  # a commit does not change


def test_a_gguf_repository_is_one_file(hub: FakeHub) -> None:
    assert find("org/one-gguf").name == "only.gguf"
    assert find("org/ggufs/q8.gguf").read_bytes() == b"GGUF8"
    assert hub.downloads() == ["only.gguf", "q8.gguf"]


def test_a_local_path_has_precedence(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org/one-file").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find("org/one-file") == Path("org/one-file")
    assert hub.requests == []
    with pytest.raises(ConfigError, match="--revision v2 is a branch, tag or commit"):
        find("org/one-file", "v2")
    with pytest.raises(ConfigError, match="the embedded model is not there"):
        find_model(None, "v2", show=print)


@pytest.mark.parametrize(
    ("name", "revision", "said"),
    [
        ("org/ggufs", None, "several GGUF files: name one of q4.gguf, q8.gguf, as in --model-path org/ggufs/q4.gguf"),
        ("org/ggufs/q5.gguf", None, "org/ggufs has no file q5.gguf; name one of q4.gguf, q8.gguf"),
        ("org/pickled", None, "Pickled weights (.bin, .pt) are not read"),
        ("org/gated", None, "is gated: set HF_TOKEN to a token of an account that has accepted its conditions"),
        ("org/private", None, "neither a path of this machine nor a model at"),
        ("org/misspelt", None, "set HF_TOKEN"),
        ("org/indexed", "v3", "--revision v3: org/indexed has no such branch, tag or commit"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_an_error_says_what_to_do(name: str, revision: str | None, said: str) -> None:
    with pytest.raises(ModelLoadError) as caught:
        find(name, revision)
    assert said in caught.value.message
    assert caught.value.param == "model_path"


def test_a_token_opens_gated_and_private_models(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert "model.safetensors" in names_in(find("org/gated"))
    assert "model.safetensors" in names_in(find("org/private"))


@pytest.mark.usefixtures("hub")
def test_a_wrong_token_is_named_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_one")
    with pytest.raises(ModelLoadError, match="does not accept the token of HF_TOKEN") as caught:
        find("org/one-file")
    assert "hf_wrong_one" not in caught.value.message


def test_a_downloaded_model_is_served_without_a_hub(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = find("org/one-file")
    hub.is_broken = True
    assert find("org/one-file") == folder
    with pytest.raises(ModelLoadError, match=r"org/indexed: .* answered 503: try again later"):
        find("org/indexed")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    asked = len(hub.requests)
    assert find("org/one-file") == folder
    with pytest.raises(ModelLoadError, match=r"org/indexed is not complete in .*, and HF_HUB_OFFLINE is set: unset it"):
        find("org/indexed")
    assert len(hub.requests) == asked


@pytest.mark.usefixtures("hub")
def test_offline_a_router_s_copy_is_not_enough_for_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    find("org/one-file", weights=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    assert find("org/one-file", weights=False)
    with pytest.raises(ModelLoadError, match="HF_HUB_OFFLINE is set"):
        find("org/one-file")


@pytest.mark.usefixtures("hub")
def test_a_hub_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelLoadError, match=r"cannot download org/one-file from http://127.0.0.1:9 .*HF_ENDPOINT"):
        find("org/one-file")


def test_a_full_disk_is_an_error_before_the_download(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=2999))
    with pytest.raises(ModelLoadError, match=r"needs 0\.0 MB more, and .* has 0\.0 MB free: make room, or set HF_HOME"):
        find("org/one-file")
    assert "model.safetensors" not in hub.downloads()


def test_the_download_shows_its_size_and_its_end(hub: FakeHub) -> None:
    hub.repos["org/large"] = Repo(files={"large.gguf": bytes(3_000_000)})
    shown: list[str] = []
    find_model("org/large", None, show=shown.append)
    assert shown[:2] == ["looking up org/large", "downloading org/large (3.0 MB) 0%"]
    assert shown[-1] == "downloading org/large (3.0 MB) 100%"
    shown.clear()
    find_model("org/large", None, show=shown.append)
    assert shown == ["looking up org/large"]


def test_the_processes_of_a_cluster_get_the_path_of_one_download(hub: FakeHub) -> None:
    settings = read("up", ["org/one-file", "--unified=3", "--device=cpu"], {})
    assert isinstance(settings, UpSettings)
    shape = cluster_shape(with_local_model(settings))
    (given,) = [flag for flag in shape.worker_argv if flag.startswith("--model-path=")]
    folder = Path(given.partition("=")[2])
    assert "model.safetensors" in names_in(folder)
    assert given in shape.router_argv
    assert find(str(folder)) == folder
    assert not any("revision" in flag for flag in (*shape.worker_argv, *shape.router_argv))
    assert len(hub.downloads()) == len(set(hub.downloads()))


def test_without_the_client_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.delitem(sys.modules, "kvist.hub.download", raising=False)
    with pytest.raises(ModelLoadError, match=r"pip install 'kvist\[hub\]'"):
        find("org/one-file")


@pytest.mark.parametrize("verb", ["serve", "up", "router", "chat", "demo", "bench engine"])
@pytest.mark.usefixtures("hub")
def test_every_verb_with_a_model_finds_it_on_the_hub_before_it_starts(verb: str) -> None:
    argv = ["org/gated"] if verb in ("serve", "up", "router", "chat") else ["--model-path=org/gated"]
    settings = read(verb, [*argv, "--revision=main"], {})
    with pytest.raises(ModelLoadError, match="org/gated is gated"):
        run(settings)


def test_the_command_ends_with_one_line_without_the_token(hub: FakeHub, tmp_path: Path) -> None:
    environ = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_wrong_one"}
    command = [sys.executable, "-m", "kvist", "serve", "org/gated", "--log-level=debug"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == 2
    assert "does not accept the token of HF_TOKEN" in done.stderr.splitlines()[-1]
    assert "hf_wrong_one" not in done.stdout + done.stderr
