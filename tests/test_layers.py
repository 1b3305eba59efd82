"""The size limits hold, and the check that guards them can fail."""

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


def test_a_long_file_a_vague_name_and_too_much_in_all_are_told(tmp_path: Path) -> None:
    (tmp_path / "utils.py").write_text("x = 1\n")
    (tmp_path / "long.py").write_text("x = 1\n" * 501)
    for index in range(40):
        (tmp_path / f"room{index}.py").write_text("x = 1\n" * 500)
    told = "\n".join(problems_of(tmp_path))
    assert "utils.py" in told
    assert "long.py: 501 lines" in told
    assert "20502 lines" in told


def test_words_about_the_code_do_not_count_as_code(tmp_path: Path) -> None:
    documented = '# why\n\n\ndef f() -> str:\n    """Says so.\n\n    At length.\n    """\n    return "x"\n'
    (tmp_path / "room.py").write_text(documented * 6_000)  # 12,000 lines of code, 54,000 in all
    assert problems_of(tmp_path) == ["room.py: 54000 lines; at most 500"]
