"""The check of the size limits, which `make check` runs, can fail."""

from __future__ import annotations

from pathlib import Path

import size_report


def problems_of(package: Path) -> list[str]:
    return size_report.problems_of(package)[1]


def test_long_files_vague_names_and_large_rooms_are_problems(tmp_path: Path) -> None:
    (tmp_path / "utils.py").write_text("x = 1\n")
    (tmp_path / "long.py").write_text("x = 1\n" * 501)
    for room, num_files in (("kv", 8), ("text", 5), ("channel", 4)):
        (tmp_path / room).mkdir()
        for index in range(num_files):
            (tmp_path / room / f"file{index}.py").write_text("x = 1\n" * 500)
    assert problems_of(tmp_path) == [
        "long.py: 501 lines; at most 500",
        "utils.py: name it after its contents",
        "kv: 4000 lines of code; at most 3500",
        "text: 2500 lines of code; at most 2000",
    ]


def test_comments_and_docstrings_do_not_count_as_code(tmp_path: Path) -> None:
    documented = '# why\n\n\ndef f() -> str:\n    """Says so.\n\n    At length.\n    """\n    return "x"\n'
    (tmp_path / "room.py").write_text(documented * 1_000)  # 2,000 lines of code, 9,000 lines in total
    assert problems_of(tmp_path) == ["room.py: 9000 lines; at most 500"]
