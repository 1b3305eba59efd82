"""Every log record is one line of text or one JSON object, for any content."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from datetime import datetime

import pytest

from kvist.log import MAX_LINE_BYTES, LogConfig, setup_logging

Written = Callable[[], str]  # returns the text written to standard error since the last call


@pytest.fixture
def written(capsys: pytest.CaptureFixture[str]) -> Iterator[Written]:
    root, ours = logging.getLogger(), logging.getLogger("kvist")
    before = (root.handlers[:], root.level, ours.level)
    yield lambda: capsys.readouterr().err
    root.handlers[:], level, our_level = before
    root.setLevel(level)
    ours.setLevel(our_level)


def log_a_failure(message: str) -> None:
    try:
        raise ValueError(message)
    except ValueError:
        logging.getLogger("kvist.test").exception("it failed: %s", message)


def test_a_text_line_has_date_level_and_logger(written: Written) -> None:
    setup_logging(LogConfig())
    logging.getLogger("kvist.test").info("ready")
    date, time, level, logger, message = written().split()
    datetime.fromisoformat(f"{date} {time}")
    assert (level, logger, message) == ("INFO", "kvist.test:", "ready")


@pytest.mark.parametrize("forged", ["\n2026-01-01 00:00:00 INFO kvist: all is well", "\r\x1b[2Kgone", "\u2028next"])
def test_control_characters_from_a_client_cannot_start_a_log_line(written: Written, forged: str) -> None:
    setup_logging(LogConfig())
    logging.getLogger("kvist.test").warning("no such path: %s", forged)
    text = written()
    assert len(text.splitlines()) == 1
    assert "\x1b" not in text


def test_the_lines_of_a_traceback_are_indented_and_escaped(written: Written) -> None:
    setup_logging(LogConfig())
    log_a_failure("first\nsecond\x1b[0m")
    text = written()
    first, *rest = text.splitlines()
    assert r"it failed: first\nsecond\x1b[0m" in first
    assert len(rest) > 2
    assert all(line.startswith("    ") for line in rest)
    assert "\x1b" not in text


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize("character", ["x", "ö", "🦙"])
def test_a_log_line_is_cut_to_the_size_of_an_atomic_pipe_write(
    written: Written, log_format: str, character: str
) -> None:
    setup_logging(LogConfig(log_format=log_format))
    log_a_failure(character * 10_000)
    for line in written().splitlines(keepends=True):
        assert len(line.encode()) <= MAX_LINE_BYTES
        if log_format == "json":
            assert json.loads(line)["level"] == "error"


def test_a_json_line_is_one_object_with_the_exception(written: Written) -> None:
    setup_logging(LogConfig(log_format="json"))
    log_a_failure("a\nb")
    (line,) = written().splitlines()
    fields = json.loads(line)
    assert fields["message"] == "it failed: a\nb"
    assert fields["logger"] == "kvist.test"
    assert "ValueError" in fields["exception"]
    assert datetime.fromisoformat(fields["time"]).utcoffset() is not None


def test_the_log_level_hides_less_severe_lines_and_libraries_log_warnings(written: Written) -> None:
    setup_logging(LogConfig(log_level="warning"))
    logging.getLogger("kvist.test").info("hidden")
    logging.getLogger("library").info("hidden")
    logging.getLogger("library").warning("shown")
    assert written().count("\n") == 1
