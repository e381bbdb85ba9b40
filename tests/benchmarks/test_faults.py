"""A drill of benchmarks/faults.py: workers of a real cluster are killed in mid-block, and the store is whole."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_run_whose_workers_are_killed_ends_with_the_same_bits(tmp_path: Path) -> None:
    options = ["--drills", "1", "--workers", "2", "--kills", "1", "--others"]
    command = [sys.executable, str(ROOT / "benchmarks" / "faults.py"), *options]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "1 drills, 0 failed" in answer.stdout
