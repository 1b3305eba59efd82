"""Flags, environment variables and keys of the TOML file keep their names and defaults, verb by verb.

flag_names.txt is the list that users know: one option a line, with its flags, its key, its default and its verbs. A
change of the list is a change for users, and belongs in the changelog.

    python -m tests.cli.test_flag_names     writes the list
"""

from __future__ import annotations

from pathlib import Path

from kvist import settings
from kvist.options import options_of

LIST = Path(__file__).with_name("flag_names.txt")


def current_names() -> list[str]:
    verbs: dict[str, list[str]] = {}
    for verb, settings_class in settings._SETTINGS.items():
        for option in options_of(settings_class):
            note = " (secret)" if option.help.secret else f" (default {option.default!r})"
            verbs.setdefault(f"{' '.join(option.flags)} = {option.key}{note}", []).append(verb)
    return sorted(f"{names}: {', '.join(sorted(each))}" for names, each in verbs.items())


def test_every_verb_has_the_flags_that_its_users_know() -> None:
    assert current_names() == LIST.read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    LIST.write_text("".join(f"{line}\n" for line in current_names()), encoding="utf-8")
