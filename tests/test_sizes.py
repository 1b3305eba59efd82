"""The package is within its size limits, and the check of the limits can fail."""

from __future__ import annotations

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "scripts" / "size_report.py"


def problems_of(package: Path) -> list[str]:
    spec = importlib.util.spec_from_file_location("size_report", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: list[str] = module.problems_of(package)[1]
    return found


def test_the_package_is_within_its_limits() -> None:
    assert problems_of(SCRIPT.parent.parent / "src" / "kvist") == []


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
