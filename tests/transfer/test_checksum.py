"""The digests of pages find the first page that has changed."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.plan.transfers import PagesVerified, VerifyPages, WritePages, WritesCompleted
from kvist.request import HandoffId
from kvist.testing.specs import make_pool
from kvist.transfer.checksum import PAGE_DIGEST_BYTES, num_equal, shortened
from kvist.transfer.host_pages import HostPages, Pages
from kvist.transfer.jobs import TransferJobs, in_groups

DIGESTS = st.lists(st.binary(min_size=16, max_size=16), min_size=1, max_size=6)


@given(DIGESTS, st.data())
def test_the_first_page_that_differs_is_found(digests: list[bytes], data: st.DataObject) -> None:
    assert num_equal(shortened(digests), shortened(digests)) == len(digests)
    changed = data.draw(st.integers(0, len(digests) - 1))
    others = [*digests]
    others[changed] = bytes([others[changed][0] ^ 1]) + others[changed][1:]
    assert num_equal(shortened(others), shortened(digests)) == changed


@given(DIGESTS)
def test_digests_of_another_number_of_pages_say_nothing(digests: list[bytes]) -> None:
    assert num_equal(shortened(digests), b"") == 0
    assert num_equal(shortened(digests), shortened(digests) + b"x") == 0
    assert num_equal(shortened(digests), shortened([*digests, digests[0]])) == 0


def jobs_over(pages: Pages, peer: Pages, *, sends_digests: bool) -> TransferJobs[Pages]:
    own = HostPages(pages)
    return TransferJobs(
        address=make_pool(num_pages=len(pages), page_bytes=pages.shape[1]),
        pages=own,
        copies=in_groups(own),
        open_peer=lambda _address: peer,
        wakeup=lambda: None,
        sends_digests=sends_digests,
    )


@pytest.mark.parametrize("sends_digests", [True, False])
def test_a_page_that_arrives_changed_is_named_in_the_log(sends_digests: bool, caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = np.arange(4 * 64, dtype=np.uint8).reshape(4, 64), np.zeros((4, 64), np.uint8)
    writer, handoff = jobs_over(ours, theirs, sends_digests=sends_digests), HandoffId("h")
    address = make_pool(num_pages=4, page_bytes=64)
    writer.write(WritePages(handoff_id=handoff, pool=address, page_ids=(3, 0), peer_page_ids=(0, 1)))
    writer.write(WritePages(handoff_id=handoff, pool=address, page_ids=(1,), peer_page_ids=(2,)))
    while writer.work_one(wait=False):
        pass
    sent = writer.poll()[-1]
    assert isinstance(sent, WritesCompleted)
    assert len(sent.page_digests) == (3 * PAGE_DIGEST_BYTES if sends_digests else 0)
    receiver = jobs_over(theirs, ours, sends_digests=sends_digests)
    theirs[1, 5] ^= 1
    receiver.verify(
        VerifyPages(
            handoff_id=handoff,
            page_ids=(0, 1, 2),
            transport="shm",
            checksum=sent.checksum,
            page_digests=sent.page_digests,
        )
    )
    with caplog.at_level(logging.WARNING, logger="kvist"):
        assert receiver.work_one(wait=False)
    [verified] = receiver.poll()
    assert isinstance(verified, PagesVerified)
    assert verified.num_intact == (1 if sends_digests else 0)
    which = "page 1 of 3" if sends_digests else "one of 3 pages"
    assert caplog.messages == [f"{which} of handoff h has arrived changed (shm)"]
