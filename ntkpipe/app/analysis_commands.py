"""The commands that analyse: parse, call one public function, print. Loaded without torch."""

import json
import sys
from typing import Any

import click

from ntkpipe.base.config import parse_bytes
from ntkpipe.base.tables import print_rows
from ntkpipe.store.kernel_store import open_kernel

_NOT_FOUND = 1


@click.command()
@click.argument("store", metavar="A")
@click.argument("other", metavar="B")
@click.option("--array", default="train", show_default=True, help="Which kernel of both, as groups/NAME/train.")
@click.option("-k", "k", type=int, default=10, show_default=True, help="Dimension of the leading eigenspaces.")
@click.option("--ridge", type=float, default=0.0, show_default=True, help="λ of the regressions.")
@click.option(
    "--ridge-scale", type=click.Choice(["mean_diagonal"]), help="What --ridge is a multiple of.  [default: absolute]"
)
@click.option(
    "--smallest/--no-smallest", "smallest_eigenvalue", default=True, help="Look for λ_min, too: most of the cost."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of what is random.")
@click.option("--memory-limit", metavar="BYTES", help="Of this process, as 8GiB.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compare(store: str, other: str, as_json: bool, memory_limit: str | None, **options: Any) -> None:
    """Compare the kernel of store A with that of B, the reference; kept in results/compare of A.

    Entries, spectra, leading eigenspaces and predictions. A pNTK beside a full NTK stands for K ⊗ I.
    """
    from ntkpipe.analysis.comparing.step import compare_of_store  # keeps scipy out of other commands

    limit = None if memory_limit is None else parse_bytes("memory_limit", memory_limit)
    found = compare_of_store(open_kernel(store), other=other, memory_limit=limit, **options)
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        print_rows(f"compare {store}", found.rows())
    if not found.is_converged:
        sys.exit(_NOT_FOUND)


COMMANDS = (compare,)
