"""What every benchmark measures alike: the machine, CPU seconds and memory of process trees, ratios.

Linux only: CPU time and memory are read from /proc; needs nothing but the standard library.

    samples = measure.alternate({"theirs": run_theirs, "ours": run_ours}, rounds=5)   # A B, B A, A B, ...
    with measure.Watch(os.getpid()) as watch:
        work()
    watch.usage                                      # wall and CPU seconds, peak memory, of the whole tree
    measure.ratio([...ours...], [...theirs...])      # median of the rounds' ratios, with minimum and maximum
    measure.write_json("name", {"machine": measure.machine(["torch"]), ...})
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

RESULTS = Path(__file__).parent / "results"
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_EVERY_S = 0.25
"""Between two looks at a tree of processes."""

Result = TypeVar("Result")


def machine(packages: Sequence[str]) -> dict[str, Any]:
    """Processor, cores, memory, versions of Python and `packages`, load average, commit and date."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * _PAGE / 1e9, 1),
        "system": platform.platform(terse=True),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _commit() -> str:
    """Of the checkout, with a mark if it has changes."""
    told = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=7",
        "--exclude=*",
    ]
    return subprocess.run(told, capture_output=True, text=True, check=False).stdout.strip()


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


@dataclass(frozen=True)
class Usage:
    """What a process tree used while it was watched."""

    wall_s: float
    cpu_s: float
    """User and system time of all processes of the tree, also of those that came and went."""
    peak_process_bytes: int
    """Largest resident memory of one process."""
    peak_total_bytes: int
    """Largest sum over the processes; a page that several share counts once (proportional set size)."""


@dataclass(frozen=True)
class _Process:
    """One line of /proc/<pid>/stat; CPU times in seconds."""

    parent: int
    started: int
    own_s: float
    reaped_s: float
    """Of children that ended and were waited for, and of theirs."""


class Watch:
    """Watches the tree of processes below `root` (itself included) for the time of a `with` block.

    CPU seconds are counted in two ways, and the larger sum is taken, because each can only miss some: the
    times of the living processes with those of their reaped children (misses children that nobody waits for),
    and the last times seen of every process (misses what one did after its last sample). A process that was
    seen once stays in the tree when its parent ends.
    """

    def __init__(self, root: int) -> None:
        self._root = root
        self._first: dict[int, _Process] = {}
        self._last: dict[int, _Process] = {}
        self._peak_process = self._peak_total = self._peak_sum = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_stopped, daemon=True)

    def __enter__(self) -> Watch:
        self._begin = self._sample()
        self._wall = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        wall_s = time.perf_counter() - self._wall
        self._stop.set()
        self._thread.join()
        end = self._sample()
        reaped = _tree_s(end) - _tree_s(self._begin)
        seen = sum(last.own_s - self._known_s(pid) for pid, last in self._last.items())
        self.usage = Usage(wall_s, max(reaped, seen), self._peak_process, self._peak_total)

    def _known_s(self, pid: int) -> float:
        """CPU time that a process had used before the watch began."""
        return self._begin[pid].own_s if pid in self._begin else 0.0

    def _sample_until_stopped(self) -> None:
        while not self._stop.wait(_EVERY_S):
            self._sample()

    def _sample(self) -> dict[int, _Process]:
        """Reads the processes of the tree as they are now."""
        processes = _processes()
        members = {
            pid
            for pid, process in processes.items()
            if pid in self._first and process.started == self._first[pid].started
        }
        members = _below(processes, members | {self._root})
        living = {pid: processes[pid] for pid in members if pid in processes}
        for pid, process in living.items():
            self._first.setdefault(pid, process)
            self._last[pid] = process
        self._sample_memory(living)
        return living

    def _sample_memory(self, pids: Mapping[int, _Process]) -> None:
        resident = [_resident_bytes(pid) for pid in pids]
        self._peak_process = max(self._peak_process, *resident, 0)
        if sum(resident) > 1.01 * self._peak_sum:  # the exact figure is dear: only where it may be a new peak
            self._peak_sum = sum(resident)
            self._peak_total = max(self._peak_total, sum(map(_proportional_bytes, pids)))


def cpu_s(root: int) -> dict[int, float]:
    """CPU seconds until now of each process of the tree below `root`, itself included."""
    processes = _processes()
    return {pid: processes[pid].own_s for pid in _below(processes, {root}) if pid in processes}


def _tree_s(processes: Mapping[int, _Process]) -> float:
    return sum(process.own_s + process.reaped_s for process in processes.values())


def _processes() -> dict[int, _Process]:
    found: dict[int, _Process] = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            text = Path(f"/proc/{name}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:  # it has just ended
            continue
        # After the command's name, which may itself hold brackets: state, parent, ... (proc_pid_stat(5)).
        fields = text.rpartition(")")[2].split()
        user, system, child_user, child_system = map(int, fields[11:15])
        found[int(name)] = _Process(
            int(fields[1]), int(fields[19]), (user + system) / _TICKS, (child_user + child_system) / _TICKS
        )
    return found


def _below(processes: Mapping[int, _Process], roots: set[int]) -> set[int]:
    children: dict[int, list[int]] = {}
    for pid, process in processes.items():
        children.setdefault(process.parent, []).append(pid)
    found: set[int] = set()
    open_pids = list(roots)
    while open_pids:
        pid = open_pids.pop()
        if pid not in found:
            found.add(pid)
            open_pids += children.get(pid, [])
    return found


def _resident_bytes(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()
    except OSError:
        return 0
    return int(fields[1]) * _PAGE


def _proportional_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


class Arm:
    """The parent's handle on an arm's process, which answers each line on its input with a line of JSON."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._log = log
        with log.open("w", encoding="utf-8") as file:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )

    def answer(self) -> dict[str, Any]:
        """The next report: that it is ready, then one after each round.

        Raises:
            RuntimeError: the arm ended; the message is the end of its log.
        """
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(self._log.read_text(encoding="utf-8")[-4000:])
        return json.loads(line)

    def go(self) -> dict[str, Any]:
        """A round."""
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self.answer()

    def __enter__(self) -> Arm:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.communicate(timeout=30)  # an arm that waits for its next round ends now
        self._process.kill()


def alternate(arms: Mapping[str, Callable[[], Result]], rounds: int) -> dict[str, list[Result]]:
    """Runs every arm once a round, every second round in reverse, so that a drift hits all alike."""
    samples: dict[str, list[Result]] = {name: [] for name in arms}
    for number in range(rounds):
        names = list(arms) if number % 2 == 0 else list(reversed(arms))
        for name in names:
            samples[name].append(arms[name]())
    return samples


@dataclass(frozen=True)
class Ratio:
    """Median, minimum and maximum over the rounds."""

    median: float
    minimum: float
    maximum: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.minimum:.2f}-{self.maximum:.2f})"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Our figure over theirs, round by round."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def spread(values: Sequence[float]) -> Ratio:
    """Median, minimum and maximum of a figure over the rounds."""
    return Ratio(statistics.median(values), min(values), max(values))


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A markdown table; every column but the first is aligned to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def write_json(name: str, content: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Writes `<folder>/<name>.json`; dataclasses become objects."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    text = json.dumps(content, indent=2, ensure_ascii=False, default=asdict)
    path.write_text(text + "\n", encoding="utf-8")
    return path
