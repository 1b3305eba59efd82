"""Processes have one host id only if they can map each other's files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvist.memory import runtime_dir
from kvist.memory.runtime_dir import host_id

ASK = "import sys, pathlib; from kvist.memory.runtime_dir import host_id; print(host_id(pathlib.Path(sys.argv[1])))"


def test_processes_with_one_runtime_folder_have_one_host_id(tmp_path: Path) -> None:
    other = subprocess.run([sys.executable, "-c", ASK, tmp_path], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == host_id(tmp_path)


def test_another_folder_is_another_host_even_under_the_name_of_the_first(tmp_path: Path) -> None:
    first, second = tmp_path / "run", tmp_path / "other"
    first.mkdir()
    second.mkdir()
    before = host_id(first)
    assert host_id(second) != before
    first.rename(tmp_path / "moved")
    second.rename(first)  # as the same path in another container
    assert host_id(first) != before


def test_one_folder_under_two_paths_is_two_hosts(tmp_path: Path) -> None:
    """Addresses are paths, and a path of another container means nothing here."""
    before = host_id(tmp_path)
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert host_id(moved) != before


def test_a_link_to_the_folder_is_the_folder(tmp_path: Path) -> None:
    folder, link = tmp_path / "run", tmp_path / "link"
    folder.mkdir()
    os.symlink(folder, link)
    assert host_id(link) == host_id(folder)


def test_a_restarted_system_is_another_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boot = tmp_path / "boot_id"
    monkeypatch.setattr(runtime_dir, "_BOOT_ID", boot)
    without = host_id(tmp_path)
    boot.write_text("1\n")
    first = host_id(tmp_path)
    boot.write_text("2\n")
    assert len({without, first, host_id(tmp_path)}) == 3
