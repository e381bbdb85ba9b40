"""How good a pNTK is: compute, compare, draw, and say which claims of the paper the numbers show.

    python workflows/pntk_quality/run.py

Exit code 1 if one is not shown. Interrupted, the same command goes on after the last row of its table.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import claims
import figures
import study

WIDTHS = {"mlp": (32, 128, 512, 2048), "convnet": (12, 24, 48, 96)}


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/pntk_quality"), help="of the table and the figures")
    parser.add_argument("--networks", nargs="+", choices=list(WIDTHS), default=list(WIDTHS))
    parser.add_argument("--widths", nargs="+", type=int, help="of every network; default four of each")
    parser.add_argument("--seeds", type=int, default=3, help="draws of weights and samples")
    parser.add_argument("--states", nargs="+", choices=study.STATES, default=list(study.STATES))
    parser.add_argument("--num-train", type=int, default=100)
    parser.add_argument("--num-test", type=int, default=100)
    parser.add_argument("--steps", type=int, default=160, help="of training, each on 32 samples")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float64")
    given = parser.parse_args()
    settings = study.Settings(
        widths={name: tuple(sorted(given.widths or WIDTHS[name])) for name in given.networks},
        seeds=tuple(range(given.seeds)),
        states=tuple(given.states),
        num_train=given.num_train,
        num_test=given.num_test,
        steps=given.steps,
        dtype=given.dtype,
    )
    rows = study.run(settings, given.folder)
    verdicts = claims.judge(rows)
    (given.folder / "claims.json").write_text(json.dumps([asdict(verdict) for verdict in verdicts], indent=1))
    for verdict in verdicts:
        shown = "shown    " if verdict.is_shown else "NOT shown"
        print(f"{shown}  {verdict.network:<8} {verdict.claim:<55} {verdict.found}")
    for path in figures.draw(rows, given.folder):
        print(f"wrote {path}")
    if not all(verdict.is_shown for verdict in verdicts):
        sys.exit(1)


if __name__ == "__main__":
    main()
