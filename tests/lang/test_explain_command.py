"""`kvist lang explain FILE:FUNCTION`."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvist import cli

SOURCE = """
import kvist.lang as kv

@kv.function
def ask(s, topic):
    s += kv.user("A long introduction. " * 40 + topic)
    s += kv.assistant(kv.select("verdict", ["yes", "no"]))

def other(s):
    pass
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "asking.py"
    path.write_text(SOURCE)
    return path


def test_the_plan_of_a_batch_is_printed_and_written_as_a_page(
    program: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "plan.html"
    batch = '[{"topic": "a"}, {"topic": "b"}]'
    assert cli.main(["lang", "explain", f"{program}:ask", "--arguments", batch, "--html", str(page)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("Score verdict (2 choices) asking.py:7") == 2
    assert "2 requests share it" in printed
    assert "<svg" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a program, as in kvist lang explain"),
        (["nowhere.py:ask"], "nowhere.py is not a Python file"),
        (["{file}:asks"], "has no program 'asks' (a function with @kv.function); it has ask"),
        (["{file}:other"], "has no program 'other'"),
        (["{file}:ask", "--arguments", "{"], "--arguments is not JSON"),
        (["{file}:ask", "--arguments", "[]"], "must be a JSON object, or a list of objects"),
        (["{file}:ask"], "--arguments: ask: missing a required argument: 'topic'"),
        (["{file}:ask", "--arguments", '{"topic": "a"}', "--html", "/nowhere/a.html"], "--html /nowhere/a.html cannot"),
        (["{file}:ask", "--arguments", '{"topic": "a"}', "--url", "localhost"], "is not the URL of a server"),
    ],
)
def test_wrong_arguments_are_errors_that_say_what_is_wrong(
    program: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    words = [each.replace("{file}", str(program)) for each in arguments]
    assert cli.main(["lang", "explain", *words]) == cli.USAGE_ERROR
    assert message in capsys.readouterr().err


def test_a_file_that_cannot_be_imported_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "broken.py"
    path.write_text("import nothing_of_this_name")
    assert cli.main(["lang", "explain", f"{path}:ask"]) == cli.USAGE_ERROR
    assert "cannot be imported: ModuleNotFoundError" in capsys.readouterr().err
