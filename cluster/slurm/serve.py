"""A Dask scheduler here and its workers as SLURM jobs, which are replaced before their walltime ends.

    serve.py --jobs 8                           prints the scheduler's address and runs until Ctrl-C
    serve.py --jobs 8 -- ntkpipe run FILE       runs the command with --scheduler ADDRESS, and ends with it
    serve.py --show                             prints the job's script

What a job is (cores, memory, walltime, partition, network) is in Dask's configuration, see slurm.yaml. If that names
certificates (see cluster/tls), all connections use them.
"""

import argparse
import signal
import subprocess
import sys
from typing import Any, NoReturn

import dask
from dask_jobqueue import SLURMCluster
from distributed import Security

# dask_jobqueue takes over the whole process's Ctrl-C when it is imported, as an exit.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A worker that leaves waits up to 30 seconds for the piece that it computes; SLURM looks at walltimes twice a minute.
LEAVE_EARLY_SECONDS = 60
# Workers that start together leave one after the other, over this share of the walltime.
STAGGER = 0.05
# sysexits.h: "temporary failure, try again later". driver.sbatch queues itself again.
TIME_IS_UP = 75


class Stopped(Exception):  # noqa: N818 - a request, not an error
    """SIGTERM or SIGUSR1 came: this job's own walltime is about to end."""


def walltime_seconds(walltime: str) -> int:
    """Seconds of a SLURM time: minutes, minutes:seconds, hours:minutes:seconds, or days-hours[:minutes[:seconds]]."""
    days, dash, clock = walltime.rpartition("-")
    fields = [int(field) for field in clock.split(":")]
    if dash:
        hours, minutes, seconds = fields + [0] * (3 - len(fields))
    else:
        hours, minutes, seconds = {1: [0, *fields, 0], 2: [0, *fields], 3: fields}[len(fields)]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def leaving_times(walltime: object) -> tuple[int, int]:
    """Seconds after which a worker leaves, and by how much that is staggered to either side."""
    if not isinstance(walltime, str):  # YAML reads 04:00:00 without quotes as a number
        sys.exit(f"error: walltime {walltime!r} in Dask's configuration is a number; put the time into quotes")
    usable = walltime_seconds(walltime) - LEAVE_EARLY_SECONDS
    if usable < LEAVE_EARLY_SECONDS:
        sys.exit(f"error: walltime {walltime} is too short: workers leave {LEAVE_EARLY_SECONDS} s before its end")
    stagger = int(STAGGER * usable)
    return usable - stagger, stagger


def make_cluster(**options: Any) -> SLURMCluster:
    """Start the scheduler; no jobs yet."""
    if dask.config.get("jobqueue.slurm.cores") is None:
        sys.exit("error: Dask's configuration does not say what a job is; copy slurm.yaml into the folder DASK_CONFIG")
    lifetime, stagger = leaving_times(dask.config.get("jobqueue.slurm.walltime"))
    extra = ["--lifetime", f"{lifetime}s", "--lifetime-stagger", f"{stagger}s", "--dashboard-address", "127.0.0.1:0"]
    security = Security()
    if security.tls_ca_file is not None:
        options.update(security=security, protocol="tls://")
    return SLURMCluster(
        interface=dask.config.get("jobqueue.slurm.interface") or "lo",
        worker_extra_args=[*dask.config.get("jobqueue.slurm.worker-extra-args"), *extra],
        scheduler_options={"dashboard_address": "127.0.0.1:8787"},
        **options,
    )


def run(command: list[str]) -> int:
    """Run a command; where this process is stopped, interrupt it and wait: it leaves a store that resumes."""
    with subprocess.Popen(command) as process:
        try:
            return process.wait()
        except (KeyboardInterrupt, Stopped):
            process.send_signal(signal.SIGINT)
            process.wait()
            raise


def stop(*_: object) -> NoReturn:
    raise Stopped


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="jobs to keep running")
    parser.add_argument("--min-jobs", type=int, help="give back jobs without work, but for so many; default: none")
    parser.add_argument("--show", action="store_true", help="print the job's script and end")
    parser.add_argument("command", nargs="*", help="after --; gets --scheduler ADDRESS")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGUSR1, stop)
    try:
        with make_cluster() as cluster:
            if given.show:
                print(cluster.job_script())
                return 0
            # Not scale(): that asks for jobs once, and would not replace those that end.
            least = given.jobs if given.min_jobs is None else given.min_jobs
            cluster.adapt(minimum_jobs=least, maximum_jobs=given.jobs)
            print(f"scheduler {cluster.scheduler_address}, dashboard {cluster.dashboard_link}", flush=True)
            if given.command:
                return run([*given.command, "--scheduler", cluster.scheduler_address])
            signal.pause()
    except Stopped:
        print("stopped; jobs are cancelled", flush=True)
        return TIME_IS_UP
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
