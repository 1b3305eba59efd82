"""The completion of the shells, tried in the shells themselves; those that are not installed are skipped."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import shutil
import struct
import subprocess
import termios
import time
from pathlib import Path

import pytest

from kvist.cli import VERBS, main
from kvist.completion import SHELLS, completion
from kvist.errors import ConfigError
from kvist.request import Role
from kvist.settings import options_for

_ASK_BASH = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_kvist
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("completion")
    for shell in SHELLS:
        (folder / shell).write_text(completion(shell, VERBS), encoding="utf-8")
    (folder / "here").mkdir()
    (folder / "here" / "manifest.yaml").touch()
    return folder


def asked(command: list[str], scripts: Path) -> list[str]:
    done = subprocess.run(command, cwd=scripts / "here", capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split("\n")[:-1]


def in_bash(scripts: Path, *words: str) -> list[str]:
    """Return what bash offers for the last word, split as bash splits it: --role=p is three words."""
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    found = asked(["bash", "--norc", "-c", _ASK_BASH, "bash", str(scripts / "bash"), "kvist", *words], scripts)
    return [word for word in found if word]


def in_fish(scripts: Path, line: str) -> list[str]:
    if shutil.which("fish") is None:
        pytest.skip("needs fish")
    ask = f"source {scripts / 'fish'}; complete -C '{line}'"
    return [offered.split("\t")[0] for offered in asked(["fish", "--no-config", "-c", ask], scripts)]


def test_bash_completes_commands(scripts: Path) -> None:
    assert in_bash(scripts, "") == list(dict.fromkeys(verb.split()[0] for verb in VERBS))
    assert in_bash(scripts, "up") == ["up", "upgrade"]
    assert in_bash(scripts, "deploy", "") == ["render", "check", "run"]
    assert in_bash(scripts, "deploy", "re") == ["render"]


def test_bash_completes_the_options_of_each_command(scripts: Path) -> None:
    for verb in ("serve", "store", "store drain", "bench offline"):
        offered = in_bash(scripts, *verb.split(), "--max-concurrency", "1", "--")
        assert {option.flags[0] for option in options_for(verb) if option.flags[0].startswith("--")} <= set(offered)
        assert "--help-all" in offered
    assert in_bash(scripts, "serve", "--enable-h") == ["--enable-hierarchical-cache"]
    assert in_bash(scripts, "serve", "--no-enable-h") == ["--no-enable-hierarchical-cache"]
    assert "--segment-size" not in in_bash(scripts, "serve", "--")


def test_bash_completes_values(scripts: Path) -> None:
    assert in_bash(scripts, "serve", "--role", "") == [role.value for role in Role]
    assert in_bash(scripts, "serve", "--role", "=") == [role.value for role in Role]
    assert in_bash(scripts, "serve", "--role", "=", "p") == ["prefill"]
    assert in_bash(scripts, "deploy", "render", "--format", "c") == ["compose"]
    assert in_bash(scripts, "serve", "--port", "") == []


def test_bash_completes_files(scripts: Path) -> None:
    assert in_bash(scripts, "deploy", "check", "m") == ["manifest.yaml"]
    assert in_bash(scripts, "serve", "--config", "") == ["manifest.yaml"]
    assert in_bash(scripts, "serve", "--model-path", "man") == ["manifest.yaml"]


def test_fish_completes_the_same(scripts: Path) -> None:
    assert in_fish(scripts, "kvist up") == ["up", "upgrade"]
    assert set(in_fish(scripts, "kvist deploy ")) == {"render", "check", "run"}
    assert in_fish(scripts, "kvist serve --role ") == sorted(role.value for role in Role)
    assert in_fish(scripts, "kvist serve --enable-h") == ["--enable-hierarchical-cache"]
    assert in_fish(scripts, "kvist deploy check --enable-h") == []
    assert in_fish(scripts, "kvist deploy render --format c") == ["compose"]


_FUNCTION = "kvist() { echo told: $*; }"  # stands for the command: shows what the shell has made of the line
TERMINALS = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], _FUNCTION),
    "zsh": (["zsh", "-f", "-i"], _FUNCTION),
    "fish": (["fish", "--no-config", "-i"], "function kvist; echo told: $argv; end"),
}


@pytest.mark.parametrize("shell", SHELLS)
def test_the_tab_key_completes_a_word_in_a_terminal(shell: str, scripts: Path) -> None:
    command, function = TERMINALS[shell]
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    terminal, ours = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))  # no line is wrapped
    process = subprocess.Popen(
        command,
        stdin=ours,
        stdout=ours,
        stderr=ours,
        cwd=scripts / "here",
        env={**os.environ, "TERM": "dumb", "HOME": str(scripts), "HISTFILE": ""},
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(ours)
    shown = b""
    try:
        for typed, then in (
            (f"source {scripts / shell}; {function}; echo rea''dy\r", b"\nready"),
            (
                "kvist serv\t--enable-h\t--role=dec\t--config man\t\r",
                b"told: serve --enable-hierarchical-cache --role=decode --config manifest.yaml",
            ),
        ):
            os.write(terminal, typed.encode())
            give_up_s = time.monotonic() + 60
            while then not in shown:
                assert time.monotonic() < give_up_s, shown
                if select.select([terminal], [], [], 0.2)[0]:
                    shown += os.read(terminal, 4096)
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


@pytest.mark.parametrize("argv", [[], ["csh"], ["bash", "more"]])
def test_another_shell_is_an_error_that_names_the_known_ones(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", *argv]) == 2
    assert "one of bash, zsh, fish: kvist completion bash" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        completion(None, VERBS)


def test_the_command_prints_the_script_or_how_to_use_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == completion("bash", VERBS).rstrip("\n")
    assert main(["completion", "--help"]) == 0
    assert "source <(kvist completion bash)" in capsys.readouterr().out
