"""Ports for the processes of one host."""

from __future__ import annotations

from kvist.cluster.ports import free_ports


def test_free_ports_are_all_different() -> None:
    assert len(set(free_ports(20))) == 20
