"""Shared and cached prefixes of prompts, checked against plain definitions."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvist.planning.prefixes import CachedPrompts, RememberedPrefixes, depth_first, shared_prefixes
from kvist.planning.prompt import Prompt


def _common(first: str, second: str) -> str:
    length = next(
        (n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    return first[:length]


_TEXTS = st.lists(st.text("ab", min_size=1, max_size=8), min_size=1, max_size=10)


@given(_TEXTS)
def test_shared_prefixes_are_all_beginnings_that_branch(texts: list[str]) -> None:
    ordered = depth_first(enumerate(map(Prompt, texts)))
    nodes = shared_prefixes(ordered, least_chars=1)
    pairs = [(one, other) for index, one in enumerate(texts) for other in texts[index + 1 :]]
    wanted = {_common(one, other) for one, other in pairs} - {""}
    assert {node.prompt.outline for node in nodes} == wanted
    for index, node in enumerate(nodes):
        assert {texts[user] for user in node.users} == {one for one in texts if one.startswith(node.prompt.outline)}
        assert node.num_chars == len(node.prompt.outline)
        above = [other for other in wanted if node.prompt.outline.startswith(other) and other != node.prompt.outline]
        if node.parent is None:
            assert not above
        else:
            assert node.parent < index
            assert nodes[node.parent].prompt.outline == max(above, key=len)


def test_short_differences_make_no_shared_prefix_of_their_own() -> None:
    texts = ["system " * 10 + tail for tail in ("abc", "abd", "x")]
    nodes = shared_prefixes(depth_first(enumerate(map(Prompt, texts))), least_chars=10)
    assert [(node.num_chars, node.users) for node in nodes] == [(70, (0, 1, 2))]


@given(_TEXTS, st.text("ab", max_size=8))
def test_the_longest_cached_beginning_is_found(cached: list[str], text: str) -> None:
    prompts = CachedPrompts()
    for each in cached:
        prompts.add(Prompt(each))
    longest = max(len(_common(each, text)) for each in cached)
    assert prompts.longest(Prompt(text)) == Prompt(text[:longest])


def test_a_worker_is_remembered_for_its_latest_prompts() -> None:
    remembered = RememberedPrefixes(2)
    for text in ("b", "a", "b", "c"):
        remembered.add("w", Prompt(text))
    assert remembered.snapshot() == {"w": ("a", "c")}
