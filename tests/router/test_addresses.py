"""The spelling of worker URLs, and which of them a gateway may dial when others name them."""

from __future__ import annotations

import pytest

from kvist.errors import ConfigError, Forbidden, RequestError
from kvist.router.addresses import HostRule, normal_url

ELSEWHERE = "192.0.2.7"  # a public address, for documentation


def test_a_worker_url_has_one_spelling() -> None:
    assert normal_url("Host:1/") == normal_url("http://HOST:1") == "http://host:1"
    assert normal_url("https://[FD00::1]:8") == "https://[fd00::1]:8"
    assert normal_url("http://Proxy/Worker1/") == "http://proxy/Worker1"


@pytest.mark.parametrize(
    "url", ["http://h:1/\n", "http://h :1", "http://" + "h" * 600 + ":1", "file:///etc/passwd", "h:x"]
)
def test_other_words_are_refused_as_worker_urls(url: str) -> None:
    with pytest.raises(ConfigError, match="not a worker URL"):
        normal_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "http://10.0.0.5:1/admin",
        "http://10.0.0.5:1?x=1",
        "http://10.0.0.5:1#x",
        "http://user:secret@10.0.0.5:1",
        "gopher://10.0.0.5:1",
        "http://10.0.0.5:0",
    ],
)
def test_a_url_that_arrives_over_http_is_an_address_and_nothing_else(url: str) -> None:
    with pytest.raises(RequestError) as caught:
        HostRule(["10.0.0.0/8"]).check(url, "10.0.0.5")
    assert caught.value.param == "url"
    assert caught.value.http_status == 400


@pytest.mark.parametrize(
    ("host", "sender", "allowed"),
    [
        ("10.0.0.5", ELSEWHERE, True),
        ("192.168.1.2", ELSEWHERE, True),
        ("[fd00::5]", ELSEWHERE, True),
        ("203.0.113.9", "203.0.113.9", True),  # its own address
        ("203.0.113.9", "::ffff:203.0.113.9", True),
        ("203.0.113.9", "203.0.113.8", False),
        ("127.0.0.1", "127.0.0.1", True),
        ("localhost", "::1", True),
        ("127.0.0.1", ELSEWHERE, False),  # the gateway's own machine
        ("localhost", ELSEWHERE, False),
        ("[::1]", ELSEWHERE, False),
        ("[::ffff:127.0.0.1]", ELSEWHERE, False),
        ("169.254.169.254", ELSEWHERE, False),  # the metadata service of clouds
        ("[fe80::1]", ELSEWHERE, False),
        ("0.0.0.0", "127.0.0.1", False),
        ("224.0.0.1", ELSEWHERE, False),
        ("8.8.8.8", ELSEWHERE, False),
        ("worker.example", ELSEWHERE, False),  # a name may resolve to anything
        ("2130706433", ELSEWHERE, False),  # 127.0.0.1 for some resolvers
    ],
)
def test_only_private_addresses_and_that_of_the_sender_are_dialled(host: str, sender: str, allowed: bool) -> None:
    url = f"http://{host}:1"
    if allowed:
        assert HostRule(()).check(url, sender) == url
        return
    with pytest.raises(Forbidden, match="--allowed-worker-hosts"):
        HostRule(()).check(url, sender)


@pytest.mark.parametrize(
    ("host", "entry"),
    [
        ("worker.example", "worker.example"),
        ("a.workers.example", "*.workers.example"),
        ("203.0.113.9", "203.0.113.0/24"),
        ("2001:db8::5", "2001:DB8::/32"),
        ("127.0.0.1", "127.0.0.1"),
    ],
)
def test_the_operator_allows_more_hosts_by_name_and_by_network(host: str, entry: str) -> None:
    rule = HostRule([entry])
    assert rule.admits(host, ELSEWHERE)
    assert not rule.admits("workers.example", ELSEWHERE)
    assert not rule.admits("203.0.114.9", ELSEWHERE)


@pytest.mark.parametrize(
    ("endpoint", "url", "allowed"),
    [
        ("tcp://10.0.0.5:5", "http://10.0.0.5:1", True),
        ("tcp://Worker.example:5", "http://worker.example:1", True),
        ("tcp://10.0.0.6:5", "http://10.0.0.5:1", True),
        ("tcp://127.0.0.1:5", "http://127.0.0.1:1", True),
        ("tcp://127.0.0.1:5", "http://10.0.0.5:1", False),
        ("tcp://169.254.169.254:80", "http://10.0.0.5:1", False),
        ("tcp://other.example:80", "http://10.0.0.5:1", False),
        ("ipc:///run/socket", "http://10.0.0.5:1", False),
        ("ipc:///run/socket", "http://127.0.0.1:1", True),
    ],
)
def test_a_worker_named_over_http_cannot_send_the_router_anywhere(endpoint: str, url: str, allowed: bool) -> None:
    assert HostRule(()).admits_engine(endpoint, url) is allowed


@pytest.mark.parametrize("entry", ["", "10.0.0.0/99", "*", "a.*.b", "http://h:1"])
def test_an_entry_other_than_a_host_is_refused_at_start(entry: str) -> None:
    with pytest.raises(ConfigError, match="--allowed-worker-hosts"):
        HostRule([entry])
