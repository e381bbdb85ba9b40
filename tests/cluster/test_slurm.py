"""The recipe in cluster/slurm, as far as it needs no SLURM: what its jobs are, and when their workers leave."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "cluster" / "slurm"
SERVE = runpy.run_path(str(RECIPE / "serve.py"))


@pytest.mark.parametrize(
    ("walltime", "seconds"),
    [
        ("30", 1800),
        ("2:30", 150),
        ("04:00:00", 4 * 3600),
        ("1-12", 36 * 3600),
        ("1-12:30", 36 * 3600 + 1800),
        ("2-00:00:01", 2 * 86400 + 1),
    ],
)
def test_walltimes_are_read_as_slurm_reads_them(walltime: str, seconds: int) -> None:
    assert SERVE["walltime_seconds"](walltime) == seconds


@pytest.mark.parametrize("walltime", ["00:02:00", "04:00:00", "7-00:00:00"])
def test_the_last_worker_leaves_a_minute_before_its_job_ends(walltime: str) -> None:
    lifetime, stagger = SERVE["leaving_times"](walltime)
    assert lifetime + stagger == SERVE["walltime_seconds"](walltime) - 60
    assert 0 < stagger < 0.06 * lifetime


@pytest.mark.parametrize(("walltime", "message"), [("00:01:30", "too short"), (14400, "put the time into quotes")])
def test_walltimes_that_cannot_be_meant(walltime: object, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        SERVE["leaving_times"](walltime)


def test_a_job_starts_single_threaded_workers_that_leave_early(tmp_path: Path) -> None:
    """Of the configuration as it is in the recipe, without certificates."""
    (tmp_path / "slurm.yaml").write_text((RECIPE / "slurm.yaml").read_text())
    shown = subprocess.run(
        [sys.executable, RECIPE / "serve.py", "--show"],
        env={**os.environ, "DASK_CONFIG": str(tmp_path)},
        cwd=tmp_path,  # it makes a folder for logs
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    command = shown.strip().splitlines()[-1]
    assert "#SBATCH -t 04:00:00" in shown
    assert "#SBATCH --cpus-per-task=16" in shown
    for option in ("--nthreads 1", "--nworkers 16", "--memory-limit 4.00GiB", "--nanny", "--lifetime 13623s"):
        assert option in command
    # Reachable from this machine alone unless another network is named.
    assert re.search(r"tcp://127\.0\.0\.1:\d+", command)


def test_without_configuration_it_says_what_to_do(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, RECIPE / "serve.py"],
        env={**os.environ, "DASK_CONFIG": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    assert "copy slurm.yaml" in ended.stderr
