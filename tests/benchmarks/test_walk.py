"""The model walks straight: it seldom comes back to a file of the package that it has left."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BEFORE = 345  # entries into a file that was left before, at commit 31e0a4b, where ideas were built in several places


def test_a_model_comes_back_to_few_files() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "walk.py")]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240).stdout
    found = re.findall(r"(\d+) entries, (\d+) into a file that was left before", answer)
    one, other, both = [(int(entries), int(again)) for entries, again in found]
    assert both == (one[0] + other[0], one[1] + other[1])
    assert both[1] <= BEFORE / 3
