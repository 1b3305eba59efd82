"""The digests of prompts: equal to those of the engines, computed on demand, and remembered by prefix."""

from __future__ import annotations

from unittest import mock

from hypothesis import given
from hypothesis import strategies as st

from kvist.kv.keys import chained_digests, page_digests
from kvist.page_index import prompt_digests
from kvist.page_index.prompt_digests import CHUNK_TOKENS, PromptDigests
from kvist.testing.page_events import joined


@given(
    num_tokens=st.lists(st.integers(0, 12_000), min_size=1, max_size=4),
    page_size=st.sampled_from([1, 16, 48, 2000]),
    salt=st.sampled_from(["", "s"]),
)
def test_pieces_are_the_digests_of_all_full_pages_for_any_prefixes_seen_before(
    num_tokens: list[int], page_size: int, salt: str
) -> None:
    digests = PromptDigests()
    for count in num_tokens:
        prompt = tuple(range(count))
        found = b"".join(digests.pieces(prompt, page_size, "space", salt))
        assert found == joined(*page_digests(prompt, page_size, "space", salt))


def test_a_look_up_that_ends_early_computes_few_pages_and_can_be_continued() -> None:
    digests, computed = PromptDigests(), 0

    def count(digest: bytes, encoded: bytes, page_size: int) -> list[bytes]:
        nonlocal computed
        found = chained_digests(digest, encoded, page_size)
        computed += len(found)
        return found

    prompt = tuple(range(100_000))
    with mock.patch.object(prompt_digests, "chained_digests", count):
        first = next(digests.pieces(prompt, 16, "space", ""))
        assert computed == 8
        assert b"".join(digests.pieces(prompt, 16, "space", "")) == joined(*page_digests(prompt, 16, "space"))
        assert computed == 6250
        longer = (*prompt, *range(1600))
        assert len(b"".join(digests.pieces(longer, 16, "space", ""))) == 16 * 6350
        assert computed <= 6350 + CHUNK_TOKENS // 16
    assert len(first) == 8 * 16


def test_prefixes_of_other_namespaces_and_salts_are_not_mixed_up() -> None:
    digests, prompt = PromptDigests(), tuple(range(3000))
    for namespace, salt in (("a", ""), ("b", ""), ("a", "s"), ("a", "")):
        found = b"".join(digests.pieces(prompt, 16, namespace, salt))
        assert found == joined(*page_digests(prompt, 16, namespace, salt))


def test_the_memory_is_bounded_and_keeps_what_was_used_last() -> None:
    with mock.patch.object(prompt_digests, "MAX_CHUNKS", 10):
        digests = PromptDigests()
        for number in range(1000):
            list(digests.pieces((number,) * 2048, 16, "space", ""))
            assert digests.num_chunks <= 10
        with mock.patch.object(prompt_digests, "chained_digests", side_effect=AssertionError("computed again")):
            list(digests.pieces((999,) * (128 + CHUNK_TOKENS), 16, "space", ""))
