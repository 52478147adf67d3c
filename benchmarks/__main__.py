"""Runs the benchmarks and prints their table: `python -m benchmarks [name ...]`."""

import platform
import sys
from collections.abc import Callable
from importlib.metadata import version

import torch

from benchmarks import capturing, loading, patching, routing, speed, widgets
from benchmarks.measure import Row

_HEAD = (
    "| what | ours | against | theirs | unit | ratio | goal |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    """Run those named on the command line, or all."""
    benches: dict[str, Callable[[], list[Row]]] = {
        "forward": lambda: speed.forward(*speed.smollm2()),
        "decoding": lambda: speed.decoding(*speed.smollm2()),
        "capture": lambda: speed.capture(speed.smollm2()[0]),
        "capture-batch": lambda: capturing.batch(speed.smollm2()[0]),
        "ray": capturing.ray,
        "experts": speed.experts,
        "loading": loading.loading,
        "memory": loading.attention_memory,
        "patching": lambda: patching.sweeps(*speed.smollm2()),
        "routing": routing.report,
        "opening": widgets.opening,
        "clicks": widgets.clicks,
        "patching-batch": lambda: patching.batch(speed.smollm2()[0]),
    }
    names = sys.argv[1:] or list(benches)
    if unknown := set(names) - set(benches):
        sys.exit(f"no benchmark is named {sorted(unknown)}; there are {', '.join(benches)}")
    print(
        f"{_processor()}, 1 thread, Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {version('transformers')}\n\n{_HEAD}"
    )
    for name in names:
        for row in benches[name]():
            print(row.markdown(), flush=True)


if __name__ == "__main__":
    main()
