"""The ready-made manifests are what the renderer writes, and pass the check."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvist.cli import main

EXAMPLES = Path(__file__).resolve().parents[2] / "deploy" / "examples"
DESCRIPTIONS = sorted(EXAMPLES.glob("*.toml"))


@pytest.mark.parametrize("description", DESCRIPTIONS, ids=lambda path: path.stem)
def test_an_example_is_what_the_renderer_writes(description: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["deploy", "render", "--config", str(description)]) == 0
    assert capsys.readouterr().out == description.with_suffix(".yaml").read_text(encoding="utf-8"), (
        f"kvist deploy render --config {description.name} --output {description.stem}.yaml"
    )


@pytest.mark.parametrize("description", DESCRIPTIONS, ids=lambda path: path.stem)
def test_an_example_passes_the_check(description: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["deploy", "check", str(description.with_suffix(".yaml"))]) == 0
    assert capsys.readouterr().out.endswith(": 0 errors, 0 warnings\n")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("prefil = 2", "unknown key prefil in"),
        ("prefil = 2", "did you mean prefill?"),
        ("prefill = -1", "prefill in"),
        ("decode = 0", "cannot answer a request"),
        ("stores = 1", "--hicache-mooncake-replica-num 2 is more than --stores 1"),
        ('stores = "three"', "stores in"),
        (f'name = "{"x" * 60}"', "use at most 44"),
        ('name = "Chat_1"', "use lower-case letters, digits and '-'"),
        ("max_replicas = 500", "max_replicas in"),
    ],
)
def test_a_wrong_description_is_refused_with_its_key_and_the_remedy(
    line: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    description = tmp_path / "cluster.toml"
    description.write_text(f"{line}\n", encoding="utf-8")
    assert main(["deploy", "render", "--config", str(description)]) == 2
    assert words in capsys.readouterr().err


def test_every_manifest_has_its_description() -> None:
    assert DESCRIPTIONS
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} == {path.stem for path in DESCRIPTIONS}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["check"], "name a manifest"),
        (["check", "/no/such/file.yaml"], "cannot be read"),
        (["render", "--output", "/no/such/folder/file.yaml"], "cannot be written"),
        (["render", "--format", "helm"], "--format"),
        (["render", "--prefill", "-1"], "--prefill"),
        (["run"], "name a manifest"),
        (["run", "/no/such/file.yaml"], "cannot be read"),
        (["run", "cluster.yaml", "--images", "kvist:1"], "is not IMAGE=PYTHON"),
        (["run", "cluster.yaml", "--claims", "=x"], "is not NAME=FOLDER"),
        (["run", str(EXAMPLES / "compose.yaml")], "docker compose up"),
        (["run", str(EXAMPLES / "pd-gpu.yaml")], "--claims models=FOLDER"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["deploy", *argv]) == 2
    assert words in capsys.readouterr().err
