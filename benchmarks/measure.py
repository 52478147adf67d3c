"""Timing that can be trusted on a noisy machine, and peak memory."""

import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        what: What was measured.
        peer: What it is compared with.
        ours: Our figure, in `unit`.
        theirs: The peer's figure.
        goal: What the ratio theirs / ours should be at least.
        unit: Of both figures.
    """

    what: str
    peer: str
    ours: float
    theirs: float
    goal: float | None
    unit: str = "CPU s"

    @property
    def ratio(self) -> float:
        """How many times less ours is."""
        return self.theirs / self.ours

    def markdown(self) -> str:
        """The line, as a table row."""
        goal = "" if self.goal is None else f"≥ {self.goal:g}"
        return (
            f"| {self.what} | {self.ours:.4g} | {self.peer} | {self.theirs:.4g} | {self.unit} "
            f"| {self.ratio:.2f} | {goal} |"
        )


def fastest(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The least CPU seconds of each call, over rounds in which the order rotates.

    The minimum is what noise can only add to; rotating keeps one call from always following the
    same other. One thread, no gradients.
    """
    torch.set_num_threads(1)
    names = list(calls)
    best = dict.fromkeys(names, float("inf"))
    with torch.no_grad():
        for call in calls.values():
            call()
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                before = time.process_time()
                calls[name]()
                best[name] = min(best[name], time.process_time() - before)
    return best


def cpu_seconds(call: Callable[[], object]) -> float:
    """The CPU seconds of one call, for what takes too long to be called again and again."""
    torch.set_num_threads(1)
    before = time.process_time()
    with torch.no_grad():
        call()
    return time.process_time() - before


def peak_megabytes(program: str) -> float:
    """The most resident memory of a fresh interpreter that runs a program (Linux only).

    From /proc, since `getrusage` also counts what the parent held when it started the program.
    """
    report = "print(next(line.split()[1] for line in open('/proc/self/status') if 'VmHWM' in line))"
    command = [sys.executable, "-c", f"{program}\n{report}"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"a measured program failed:\n{result.stderr}")
    return int(result.stdout.split()[-1]) / 1024
