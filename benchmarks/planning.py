"""Planning a million samples: seconds, and peak memory of the process that plans.

python benchmarks/planning.py [--samples 1000000] [--tile 4096]
"""

import argparse
import resource
from time import perf_counter

import torch
from samples.generated import Generated

import ntkpipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--tile", type=int, default=4096)
    options = parser.parse_args()
    torch.manual_seed(0)
    layers = [torch.nn.Linear(784, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 10)]
    model = torch.nn.Sequential(*layers).eval()
    start = perf_counter()
    plan, _ = ntkpipe.plan_kernel(model, Generated(options.samples), store="unwritten.zarr", tile=options.tile)
    tasks = sum(1 for _ in plan.tasks())
    seconds = perf_counter() - start
    for name, value in plan.rows():
        print(f"{name:18} {value}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"planned, with {tasks:,} tasks listed, in {seconds:.2f} s; peak memory {peak / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
