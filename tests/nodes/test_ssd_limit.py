"""The pages on an SSD are removed above their limit: the oldest first, those with another copy last."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from kvist.nodes.ssd_folder import PageFile, SsdFolder
from kvist.nodes.ssd_limit import SsdLimit, beyond_limit, choose
from kvist.testing.clocks import FakeClock


def pages(sizes: Sequence[int]) -> list[PageFile]:
    return [PageFile(path=str(i), key=f"k{i}", num_bytes=size, written_ns=i) for i, size in enumerate(sizes)]


@given(
    sizes=st.lists(st.integers(1, 100), max_size=1200),
    alone=st.sets(st.integers(0, 1200)),
    limit_bytes=st.integers(0, 60_000),
)
def test_the_pages_left_are_within_the_limit_and_those_that_readers_want(
    sizes: list[int], alone: set[int], limit_bytes: int
) -> None:
    found = pages(sizes)
    num_bytes = beyond_limit(found, limit_bytes)
    chosen = choose(found, num_bytes, lambda keys: {key for key in keys if int(key[1:]) in alone}) if num_bytes else []
    left = sum(sizes) - sum(page.num_bytes for page in chosen)
    assert left <= limit_bytes
    assert len({page.key for page in chosen}) == len(chosen)
    if sum(sizes) <= limit_bytes:
        assert not chosen
    ours = [page for page in found if page.written_ns in alone]
    if any(page.written_ns not in alone for page in chosen):
        assert all(page in chosen for page in ours)  # pages without a copy went first
    ages = [page.written_ns for page in chosen if page.written_ns in alone]
    assert ages == [page.written_ns for page in ours[: len(ages)]]


async def test_a_file_goes_before_its_key(tmp_path: Path) -> None:
    folder = SsdFolder(tmp_path)
    place = tmp_path / "file_per_key_dir" / "a" / "b"
    place.mkdir(parents=True)
    for index in range(10):
        (place / f"default_k{index}").write_bytes(bytes(100))
    forgotten: list[str] = []

    async def forget(keys: Sequence[str]) -> None:
        assert not any((place / f"default_{key}").exists() for key in keys)
        forgotten.extend(keys)

    limit = SsdLimit(folder, 500, alone=lambda _keys: set(), forget=forget, clock=FakeClock())
    await limit.apply()
    assert len(forgotten) == limit.num_removed == 6  # down to nine tenths of the limit
    assert len(folder.pages()) == 4
    await limit.apply()
    assert limit.num_removed == 6
    folder.close()
