"""What the machine has, as far as it can be checked without another machine."""

import os

import pytest

from ntkpipe.base import resources


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (16 * 2**20, "16.0 MiB"),
        (3 * 2**39, "1.5 TiB"),
        (2**51, "2048.0 TiB"),
    ],
)
def test_bytes_have_binary_units(num_bytes, text):
    assert resources.format_bytes(num_bytes) == text


def test_a_container_limit_lowers_the_available_memory(tmp_path, monkeypatch):
    limit, usage = tmp_path / "max", tmp_path / "current"
    limit.write_text("1000\n")
    usage.write_text("400\n")
    monkeypatch.setattr(resources, "_CGROUP_LIMITS", (str(tmp_path / "none"), str(limit)))
    monkeypatch.setattr(resources, "_CGROUP_USAGE", (str(usage),))
    assert resources.available_memory() == 600
    usage.write_text("999\n")
    assert resources.available_memory() == 100, "file cache counts as used, so a tenth of the limit is assumed free"
    limit.write_text("max\n")
    assert resources.available_memory() > 1000


def test_the_disk_of_a_path_that_does_not_exist_yet_is_its_parents(tmp_path):
    free = resources.free_disk(tmp_path / "not" / "yet")
    stats = os.statvfs(tmp_path)
    assert 0 < free <= stats.f_blocks * stats.f_frsize


def test_counts_are_positive():
    assert resources.num_cores() >= 1
    assert resources.process_memory() > 0
