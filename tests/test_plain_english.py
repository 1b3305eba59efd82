"""scripts/plain_english.py finds the dialect in each kind of text, and passes over code, questions and plain prose."""

from __future__ import annotations

from pathlib import Path

import pytest

import plain_english

PYTHON = '''"""A module.

Who is hit leaves it.
"""
x = option("auto", "waits for at most so many pages")  # nobody reads this
# The first line of a comment ends. It
# goes on here.
raise ConfigError(f"{url} is no worker URL")
'''
MARKDOWN = """# Title

What is it? A page is read. So it is
evicted by `whoever tells it`.

```
nobody reads code
```

| name | those that fit |
"""


def hits(path: str, source: str) -> list[tuple[int, str]]:
    return [
        (line + offset, rule)
        for line, text in plain_english.texts_of(Path(path), source)
        for offset, rule, _ in plain_english.hits_of(text)
    ]


def test_python_prose_is_checked_in_docstrings_comments_help_and_errors() -> None:
    subject = "a sentence begins with its subject"
    assert sorted(hits("src/kvist/x.py", PYTHON)) == [
        (3, subject),
        (5, '"nobody"'),
        (5, '"so many"'),
        (5, subject),
        (6, subject),
        (8, '"is no worker"'),
    ]


def test_markdown_is_checked_outside_code_and_questions() -> None:
    subject = "a sentence begins with its subject"
    assert hits("docs/x.md", MARKDOWN) == [(3, subject), (10, subject)]


@pytest.mark.parametrize("name", ["test_what_is_lost_is_found", "test_pages_of_nobody", f"test_{'x' * 100}"])
def test_riddles_and_long_names_of_tests_are_found(name: str) -> None:
    assert hits("tests/x.py", f'def {name}() -> None:\n    "What."\n')


@pytest.mark.parametrize(
    "text",
    [
        "There is no such page.",
        "The page is no longer pinned.",
        "Return what the store holds.",
        "One of the workers is asked; one page is read.",
        "This step is short. These pages are pinned.",
        "Somewhere in it is a page.",
    ],
)
def test_plain_sentences_pass(text: str) -> None:
    assert list(plain_english.hits_of(text)) == []


def test_only_clean_rooms_fail_the_check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(plain_english, "hits_of", lambda text: [(0, "rule", text)])
    script = str(plain_english.ROOT / "scripts" / "audit.py")
    monkeypatch.setattr(plain_english, "CLEAN", set())
    assert plain_english.main([script]) == 0
    monkeypatch.setattr(plain_english, "CLEAN", {"scripts"})
    assert plain_english.main([script]) == 1
    assert "scripts/audit.py:1: rule:" in capsys.readouterr().out


def test_every_room_listed_as_clean_exists() -> None:
    for room in plain_english.CLEAN:
        assert (plain_english.ROOT / room).exists(), room
