"""Page digests: the chain that names a prefix across processes."""

from __future__ import annotations

import hashlib
import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.kv.keys import chain_digest, page_digests, page_keys, root_digest


def reference_digests(token_ids: list[int], page_size: int, namespace: str, cache_salt: str) -> list[bytes]:
    """The definition, one token at a time."""
    digest = hashlib.sha256(hashlib.sha256(namespace.encode()).digest() + cache_salt.encode()).digest()
    digests = []
    for page in range(len(token_ids) // page_size):
        hasher = hashlib.sha256(digest)
        for token_id in token_ids[page * page_size : (page + 1) * page_size]:
            hasher.update(struct.pack("<i", token_id))
        digest = hasher.digest()
        digests.append(digest)
    return digests


@given(
    token_ids=st.lists(st.integers(0, 2**31 - 1), max_size=60),
    page_size=st.integers(1, 8),
    cache_salt=st.sampled_from(["", "tenant", "ä\0b"]),
)
def test_the_chain_equals_the_plain_reference(token_ids: list[int], page_size: int, cache_salt: str) -> None:
    digests = page_digests(token_ids, page_size, "space", cache_salt)
    assert digests == reference_digests(token_ids, page_size, "space", cache_salt)


@pytest.mark.parametrize("num_tokens", [1023, 1024, 1025, 2048, 5000])
def test_prompts_around_the_encoding_chunk_equal_the_plain_reference(num_tokens: int) -> None:
    token_ids = [random.Random(num_tokens).randrange(150_000) for _ in range(num_tokens)]
    assert page_digests(token_ids, 16, "space") == reference_digests(token_ids, 16, "space", "")


def test_a_partial_page_has_no_digest() -> None:
    assert page_digests([1, 2, 3], 4, "space") == []
    assert len(page_digests([1, 2, 3, 4, 5], 4, "space")) == 1


def test_lists_tuples_and_ranges_give_the_same_digests() -> None:
    expected = page_digests(range(40), 16, "space")
    assert page_digests(list(range(40)), 16, "space") == expected
    assert page_digests(tuple(range(40)), 16, "space") == expected


def test_another_first_token_changes_every_later_digest() -> None:
    one, other = page_digests([0] * 12, 4, "space"), page_digests([1] + [0] * 11, 4, "space")
    assert not set(one) & set(other)


def test_equal_pages_at_different_places_have_different_digests() -> None:
    assert len(set(page_digests([7] * 16, 4, "space"))) == 4


@pytest.mark.parametrize(("namespace", "cache_salt"), [("other", ""), ("space", "salt"), ("spacesalt", "")])
def test_namespaces_and_salts_share_no_digest(namespace: str, cache_salt: str) -> None:
    assert not set(page_digests(range(8), 4, "space")) & set(page_digests(range(8), 4, namespace, cache_salt))


def test_moving_characters_from_namespace_to_salt_changes_the_digests() -> None:
    pairs = [("ab", "c"), ("a", "bc"), ("abc", ""), ("", "abc"), ("a\0b", "c"), ("a", "b\0c")]
    assert len({root_digest(*pair) for pair in pairs}) == len(pairs)


def test_digests_can_be_computed_page_by_page() -> None:
    digest = root_digest("space")
    for key, expected in zip(page_keys(range(8), 4, 0, 2), page_digests(range(8), 4, "space"), strict=True):
        digest = chain_digest(digest, key)
        assert digest == expected


def test_a_token_beyond_int32_is_an_error_and_not_another_token() -> None:
    with pytest.raises(struct.error):
        page_digests([2**31, 0, 0, 0], 4, "space")
