"""Drills: a small real kernel on a Dask cluster of this machine, whose processes are killed, stopped, added, removed.

Each drill runs `ntkpipe run` on a fresh store while at least three workers are killed (SIGKILL) in mid-block. A worker
is first stopped; it is killed, and counted, only if it is executing a block of which tiles are missing at that moment.
In between, drawn at random, the driver or the scheduler is killed (and started again, as a batch system would), a
worker is stopped for some seconds, one more joins or one leaves. The drill is passed if every chunk of the finished
store is there and equals that of an undisturbed run bit for bit, no partial file is left and `verify` finds nothing.

    python benchmarks/faults.py [--drills 50] [--seed 0] [--workers 3] [--stop-seconds 5]
"""

import argparse
import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import monotonic, sleep

import psutil

import ntkpipe

DRILL = Path(__file__).parent / "drill"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
OTHERS = ("driver", "scheduler", "stop", "join", "leave")
MOST_SECONDS = 240.0
MOST_ATTEMPTS = 8


class Cluster:
    """A scheduler and workers, each a command of its own that is started again when it ends unasked.

    Parameters
    ----------
    folder
        For logs, scratch and the files that say what a worker executes.
    num_workers
        Workers that there should be.
    """

    def __init__(self, folder: Path, num_workers: int) -> None:
        self.folder = folder
        self.num_workers = num_workers
        self.executing = folder / "executing"
        self.executing.mkdir()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.address = f"tcp://127.0.0.1:{self.port}"
        self._started = 0
        self.scheduler = self._start_scheduler()
        self.workers: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, command: list[str], **environment: str) -> subprocess.Popen[bytes]:
        """Start a process whose output goes to a log."""
        self._started += 1
        with (self.folder / f"{self._started:04d}-{name}.log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", *command],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env={**ENVIRONMENT, **environment},
            )

    def _start_scheduler(self) -> subprocess.Popen[bytes]:
        options = ["--host", "127.0.0.1", "--port", str(self.port), "--no-dashboard"]
        return self.start("scheduler", ["distributed.cli.dask_scheduler", *options])

    def _start_worker(self) -> subprocess.Popen[bytes]:
        options = ["--nthreads", "1", "--no-dashboard", "--memory-limit", "2GiB", "--host", "127.0.0.1"]
        options += ["--local-directory", str(self.folder / "scratch"), "--preload", str(DRILL / "watch.py")]
        command = ["distributed.cli.dask_worker", self.address, *options]
        return self.start("worker", command, DRILL_FOLDER=str(self.executing))

    def tend(self) -> None:
        """Start again what has ended."""
        if self.scheduler.poll() is not None:
            self.scheduler = self._start_scheduler()
        self.workers = [worker for worker in self.workers if worker.poll() is None]
        while len(self.workers) < self.num_workers:
            self.workers.append(self._start_worker())

    def join(self) -> None:
        """One more worker, for now."""
        self.workers.append(self._start_worker())

    def leave(self, rng: random.Random) -> None:
        """A worker is asked to end."""
        self.workers.pop(rng.randrange(len(self.workers))).terminate()

    def close(self) -> None:
        """End everything that was started here."""
        ours = psutil.Process().children(recursive=True)
        for process in ours:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(ours, timeout=10)

    @contextlib.contextmanager
    def stopped(self, rng: random.Random) -> Iterator[tuple[psutil.Process, str] | None]:
        """A worker process that is executing, stopped meanwhile, and the key of its task; none if none executes."""
        files = list(self.executing.iterdir())
        rng.shuffle(files)
        for file in files:
            process = self._stop(int(file.name))
            if process is None:
                file.unlink(missing_ok=True)
                continue
            try:
                key = file.read_text() if file.exists() else ""
                if key:
                    yield process, key
                    return
            finally:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()
        yield None

    def _stop(self, number: int) -> psutil.Process | None:
        """Stop a process, if it is there and a descendant of this one: numbers are used again."""
        try:
            process = psutil.Process(number)
            if all(parent.pid != os.getpid() for parent in process.parents()):
                return None
            process.suspend()
            while process.status() != psutil.STATUS_STOPPED:
                sleep(0.001)
        except psutil.NoSuchProcess:
            return None
        return process


def missing_tiles(store: Path, key: str) -> int:
    """Tiles of a task's block that are not stored."""
    found = re.search(r"(\w+) tiles (\d+):(\d+) × (\d+):(\d+)", key)
    assert found is not None, key
    array, bounds = found[1], [int(number) for number in found.groups()[1:]]
    tiles = [(row, column) for row in range(*bounds[:2]) for column in range(*bounds[2:])]
    if array == "test_diagonal":
        tiles = [(row, 0, 0) for row in range(*bounds[:2])]
    elif array == "train":
        tiles = [(row, column) for row, column in tiles if row <= column]
    return sum(not (store / "kernel" / array / "c").joinpath(*map(str, tile)).exists() for tile in tiles)


def chunks(store: Path) -> dict[str, bytes]:
    """Every chunk of every array, by its path."""
    files = (file for file in store.rglob("c/**/*") if file.is_file())
    return {str(file.relative_to(store)): file.read_bytes() for file in files}


class Drill:
    """One drill.

    Parameters
    ----------
    cluster
        Perhaps still troubled by the one before.
    rng
        Decides what happens.
    store
        A path where nothing is.
    kills
        Workers that are killed, at least; at most twice as many.
    stop_seconds
        For how long a worker is stopped, at most.
    others, chance
        What may happen beside kills of workers, and how likely each is.
    """

    def __init__(
        self,
        cluster: Cluster,
        rng: random.Random,
        store: Path,
        *,
        kills: int,
        stop_seconds: float,
        others: Sequence[str],
        chance: float,
    ) -> None:
        self.cluster, self.rng, self.store = cluster, rng, store
        self.kills, self.stop_seconds = kills, stop_seconds
        self.others, self.chance = others, chance
        self.counts: Counter[str] = Counter()
        self.driver = self._start_driver()
        self._until: list[tuple[float, psutil.Process]] = []

    def _start_driver(self) -> subprocess.Popen[bytes]:
        command = ["ntkpipe", "run", str(DRILL / "pntk.yaml"), "--scheduler", self.cluster.address]
        return self.cluster.start("driver", [*command, "--set", f"store={self.store}"])

    def run(self) -> None:
        """Run until the driver is done, whatever it takes."""
        rng, deadline = self.rng, monotonic() + MOST_SECONDS
        faults, due = ["kill"] * rng.randint(self.kills, 2 * self.kills), 0.0
        for name in self.others:
            if rng.random() < self.chance:
                # Before the last kill that is needed: what comes late might not come any more.
                faults.insert(rng.randrange(self.kills), name)
        while True:
            if monotonic() > deadline:
                raise SystemExit(
                    f"{self.store.name} is not done after {MOST_SECONDS:.0f} s; logs in {self.cluster.folder}"
                )
            self.cluster.tend()
            self._resume_stopped()
            if self.driver.poll() is not None:
                if self.driver.returncode == 0:
                    break
                self._again()
            if faults and monotonic() > due and self._strike(faults[0]):
                faults.pop(0)
                due = monotonic() + rng.uniform(0, 1.5)
            sleep(0.02)
        for _, process in self._until:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

    def _again(self) -> None:
        if self.driver.returncode != -signal.SIGKILL:
            self.counts["gave up"] += 1
        self.counts["resumed"] += 1
        if self.counts["resumed"] > MOST_ATTEMPTS:
            raise SystemExit(f"{self.store.name} was resumed too often; logs in {self.cluster.folder}")
        self.driver = self._start_driver()

    def _strike(self, fault: str) -> bool:
        """Do what is due; false if it could not be done yet."""
        with self.cluster.stopped(self.rng) as found:
            # Nothing happens before there is a store and a worker is at work on it.
            if found is None or not missing_tiles(self.store, found[1]):
                return False
            if fault == "kill":
                found[0].kill()
        if fault == "stop":
            found[0].suspend()
            self._until.append((monotonic() + self.rng.uniform(0.2, 1) * self.stop_seconds, found[0]))
        elif fault == "driver":
            self.driver.kill()
        elif fault == "scheduler":
            self.cluster.scheduler.kill()
        elif fault == "join":
            self.cluster.join()
        elif fault == "leave":
            self.cluster.leave(self.rng)
        self.counts[fault] += 1
        return True

    def _resume_stopped(self) -> None:
        for until, process in list(self._until):
            if monotonic() > until:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()
                self._until.remove((until, process))

    def findings(self, expected: dict[str, bytes]) -> list[str]:
        """What is wrong with the finished store."""
        found = chunks(self.store)
        wrong = [f"{name} is missing" for name in expected.keys() - found.keys()]
        wrong += [f"{name} should not be there" for name in found.keys() - expected.keys()]
        wrong += [f"{name} differs" for name in expected.keys() & found.keys() if expected[name] != found[name]]
        wrong += [f"verify: {each}" for each in ntkpipe.verify(self.store, progress=False).findings]
        return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--kills", type=int, default=3, help="workers that are killed in each drill, at least")
    parser.add_argument("--stop-seconds", type=float, default=5.0)
    parser.add_argument("--others", nargs="*", default=OTHERS, choices=OTHERS, help="what happens beside kills")
    parser.add_argument("--chance", type=float, default=0.3, help="of each of the others in a drill")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="drills-"))
    print(f"logs and stores in {folder}", flush=True)
    total: Counter[str] = Counter()
    failed = 0
    cluster = Cluster(folder, options.workers)
    try:
        undisturbed = folder / "undisturbed.zarr"
        command = [sys.executable, "-m", "ntkpipe", "run", str(DRILL / "pntk.yaml"), "--set", f"store={undisturbed}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        expected = chunks(undisturbed)
        for number in range(options.drills):
            start = monotonic()
            rng = random.Random(f"{options.seed}-{number}")
            drill = Drill(
                cluster,
                rng,
                folder / f"{number}.zarr",
                kills=options.kills,
                stop_seconds=options.stop_seconds,
                others=options.others,
                chance=options.chance,
            )
            drill.run()
            findings = drill.findings(expected)
            total += drill.counts
            failed += bool(findings) or drill.counts["kill"] < options.kills
            happened = ", ".join(f"{count} × {name}" for name, count in drill.counts.items())
            print(f"drill {number}: {monotonic() - start:.0f} s; {happened}; {findings or 'good'}", flush=True)
    finally:
        cluster.close()
    print(
        f"{options.drills} drills, {failed} failed; {total['kill']} workers killed in mid-block, driver killed "
        f"{total['driver']} ×, scheduler {total['scheduler']} ×, {total['stop']} workers stopped, {total['join']} "
        f"joined, {total['leave']} left; {total['resumed']} runs resumed, {total['gave up']} that had given up"
    )
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
