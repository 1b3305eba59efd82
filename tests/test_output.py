"""LineOutput writes whole lines in order, and never waits for a reader."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from kvist.output import MAX_PENDING_BYTES, LineOutput

LINE = "x" * 1000
MANY = MAX_PENDING_BYTES // 100  # far more lines than the pipe and the pending buffer can hold


def read_until(descriptor: int, text: str) -> str:
    """Read until `text` has been read."""
    found = b""
    while text.encode() not in found and (piece := os.read(descriptor, 1 << 16)):
        found += piece
    return found.decode()


@pytest.mark.case("unread-output")
@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_lines_over_the_output_limit_are_dropped_counted_and_reported_later(kind: str) -> None:
    if kind == "pipe":
        reader, writer = os.pipe()
    else:
        ends = socket.socketpair()
        reader, writer = (end.detach() for end in ends)
    output = LineOutput(writer)
    for number in range(MANY):
        output.write(f"{number} {LINE}")  # never blocks
    assert output.num_dropped > MANY // 2
    read = read_until(reader, "lines of output were dropped")
    lines = read.splitlines()
    assert lines[0] == f"0 {LINE}"
    whole = [line for line in lines if line.endswith(LINE)]
    assert [int(line.split()[0]) for line in whole] == list(range(MANY - output.num_dropped))
    assert f"{output.num_dropped} lines" in lines[-1]
    output.write("goes on")
    assert read_until(reader, "goes on").endswith("goes on\n")
    os.close(reader)
    output.write("no reader")
    output.flush()
    os.close(writer)


def test_output_to_a_file_is_appended(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("before\n")
    with path.open("a") as file:
        output = LineOutput(file.fileno())
        output.write("one")
        file.write("between\n")
        file.flush()
        output.write("two")
    assert path.read_text() == "before\none\nbetween\ntwo\n"
