"""Peak memory does not grow with the number of samples: pNTK of an MLP 64-32-10 on 20,000 and on 60,000 inputs.

Each size runs in a process of its own with default settings; the ratio is that of the peaks of resident memory.

    python benchmarks/memory.py [--samples 20000 60000]
"""

import argparse
import subprocess
import sys
import tempfile

RUN = """
import resource, sys, numpy as np, torch, ntkpipe
samples, path = int(sys.argv[1]), sys.argv[2]
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10)).eval()
inputs = np.random.default_rng(0).random((samples, 64), dtype=np.float32)
store = ntkpipe.compute_kernel(model, inputs, store=path, progress=False)
(run,) = store.store.read_results("runs")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, run["memory_bytes"], run["seconds"])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs=2, default=(20_000, 60_000))
    options = parser.parse_args()
    peaks = []
    for samples in options.samples:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-c", RUN, str(samples), f"{folder}/kernel.zarr"]
            answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        peak, bound, seconds = int(answer[0]), int(answer[1]), float(answer[2])
        peaks.append(peak)
        print(f"{samples} samples: peak {peak / 2**20:.0f} MiB, planned bound {bound / 2**20:.0f} MiB, {seconds:.1f} s")
    print(f"ratio of the peaks {peaks[1] / peaks[0]:.3f}")


if __name__ == "__main__":
    main()
