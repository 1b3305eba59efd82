"""Workers that a file or a DNS name lists."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from kvist.channel import ClusterProof
from kvist.errors import ConfigError, Unavailable
from kvist.router import sources
from kvist.router.addresses import HostRule
from kvist.router.config import MemberOptions
from kvist.router.members import Members
from kvist.router.membership import Membership, Source
from kvist.router.sources import Discovery, DnsDiscovery, FileDiscovery, discovery_of, urls_in
from kvist.testing.router_bench import RouterBench
from kvist.testing.waits import until
from tests.server.test_workers import RegistryLinks

A, B = "http://10.0.0.1:1", "http://10.0.0.2:1"


def test_a_list_has_one_worker_on_each_line() -> None:
    assert urls_in(f"# prefill\n{A}/\n\n  10.0.0.2:1\r\n#{A}") == (A, B)
    assert urls_in("") == ()


def test_every_wrong_line_is_named_and_the_list_is_not_used() -> None:
    with pytest.raises(Unavailable, match=r"line 2: 'x' is not.*line 4: 'ftp://h:1'"):
        urls_in(f"{A}\nx\n{B}\nftp://h:1")
    with pytest.raises(Unavailable, match="and 6 more"):
        urls_in("x\n" * 10)


async def test_a_file_is_read_again_when_it_has_changed_and_is_settled(tmp_path: Path) -> None:
    path = tmp_path / "workers"
    path.write_text(A)
    file = FileDiscovery(Source("file"), str(path))
    assert await file.read() == (A,)
    path.write_text("")  # a writer that is in the midst of its work
    assert await file.read() == (A,)
    path.write_text(f"{A}\n{B}\n")
    assert await file.read() == (A,)
    assert await file.read() == (A, B)
    (tmp_path / "new").write_text(f"{B}\n{A}\n")  # of the same size; replaced as Kubernetes does it
    os.utime(tmp_path / "new", ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    (tmp_path / "new").rename(path)
    assert await file.read() == (A, B)
    assert await file.read() == (B, A)


async def test_a_file_that_is_missing_or_wrong_is_an_error_until_it_is_corrected(tmp_path: Path) -> None:
    path = tmp_path / "workers"
    file = FileDiscovery(Source("file"), str(path))
    for _ in range(2):
        with pytest.raises(Unavailable, match="cannot read"):
            await file.read()
    path.write_text("wrong")
    assert await file.read() == (), "not settled yet"
    for _ in range(2):
        with pytest.raises(Unavailable, match="line 1"):
            await file.read()
    path.write_bytes(b"\xff")
    with pytest.raises(Unavailable, match="line 1"):
        await file.read()
    with pytest.raises(Unavailable, match="cannot read"):
        await file.read()
    path.write_text(A)
    with pytest.raises(Unavailable):
        await file.read()
    assert await file.read() == (A,)


async def test_a_dns_name_names_all_its_addresses() -> None:
    answers = [["10.0.0.2", "10.0.0.1", "10.0.0.2"], ["fd00::1"]]
    dns = DnsDiscovery(Source("dns"), "workers:1", resolve=lambda _name, _port: answers.pop(0))
    assert await dns.read() == (A, B)
    assert await dns.read() == ("http://[fd00::1]:1",)


async def test_a_resolver_that_fails_or_hangs_is_an_error_within_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_TIMEOUT_S", 0.05)
    release = threading.Event()
    threads: list[str] = []

    def resolve(_name: str, _port: int) -> list[str]:
        threads.append(threading.current_thread().name)
        if len(threads) == 1:
            raise OSError("NXDOMAIN")
        release.wait(60)
        return ["10.0.0.1"]

    dns = DnsDiscovery(Source("dns"), "workers:1", resolve=resolve)
    with pytest.raises(Unavailable, match="NXDOMAIN"):
        await dns.read()
    for _ in range(3):
        with pytest.raises(Unavailable, match="has not answered"):
            await dns.read()
    assert len(threads) == 2, "one look-up at a time"
    release.set()
    monkeypatch.setattr(sources, "_TIMEOUT_S", 60)
    assert await dns.read() == (A,)


@pytest.mark.parametrize(
    "text", ["", "file:", "dns:name", "dns::1", "dns:name:0", "dns:name:99999", "dns:fd00::1:1", "zk:a:1"]
)
def test_a_wrong_discovery_is_an_error_that_shows_the_forms(text: str) -> None:
    with pytest.raises(ConfigError, match="dns:NAME:PORT"):
        discovery_of(text)
    with pytest.raises(ConfigError):
        MemberOptions(discovery=(text,))


class Scripted(Discovery):
    """A source whose readings a test sets. Mutable; owned by one test."""

    source, interval_s = Source("file:/w"), 0.001

    def __init__(self) -> None:
        self.urls: tuple[str, ...] = ()
        self.problem = ""
        self.num_reads = 0

    async def read(self) -> tuple[str, ...]:
        self.num_reads += 1
        if self.problem:
            raise Unavailable(self.problem)
        return self.urls


async def test_workers_follow_the_readings_and_stay_during_failures_which_are_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bench, place = RouterBench(), Scripted()
    members = Members(
        membership=Membership(max_workers=2),
        registry=bench.registry,
        links=RegistryLinks(bench),
        hosts=HostRule(()),
        proof=ClusterProof("k"),
        discoveries=[place],
        clock=bench.clock,
    )

    def urls() -> set[str]:
        return {worker.url for worker in bench.registry.workers}

    members.start()
    place.urls = (A, B)
    await until(lambda: urls() == {A, B})
    place.problem = "NXDOMAIN"
    await until(lambda: members.counts().discovery_failures["file:/w"] >= 5)
    assert urls() == {A, B}
    place.problem = ""
    place.urls = (B,)
    await until(lambda: urls() == {B})
    place.urls = (B, A, "http://10.0.0.3:1")
    await until(lambda: urls() == {A, B})
    read = place.num_reads
    await until(lambda: place.num_reads > read + 3)
    await members.close()
    assert caplog.text.count("NXDOMAIN") == 1
    assert caplog.text.count("--max-workers") == 1
    assert {worker.sources for worker in bench.registry.workers} == {("file:/w",)}
