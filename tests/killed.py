"""A function run in a process of its own, killed (SIGKILL) at random moments until it completes.

The process is a fork of one that has done its imports, since these would take most of the time.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Story(NamedTuple):
    """What became of a run: how often it was killed, and how long it takes when it is not."""

    killed: int
    took: float


def forked(work: Callable[[], object]) -> int:
    """Start work in a fork, which ends with it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def until_complete(
    work: Callable[[Path], object], whole: Path, interrupted: Path, kills: int, seed: int
) -> Story:
    """Run `work(whole)` undisturbed; then `work(interrupted)`, killed so many times, to its end.

    The moments are spread over the time that the undisturbed run took.
    """
    started = time.monotonic()
    _, status = os.waitpid(forked(lambda: work(whole)), 0)
    took = time.monotonic() - started
    assert status == 0, "the undisturbed run failed"
    moments = random.Random(seed)
    killed = 0
    for _ in range(kills):
        child = forked(lambda: work(interrupted))
        time.sleep(moments.uniform(0.3, 1.2) * took / kills)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
    _, status = os.waitpid(forked(lambda: work(interrupted)), 0)
    assert status == 0, "the last run failed"
    return Story(killed, took)


def run_script(code: str, folder: Path, **environment: str) -> dict[str, float]:
    """Run a script in a fresh Python that can import this module; it prints a line of JSON.

    The script finds `folder` in `sys.argv[1]`.
    """
    script = folder / "script.py"
    script.write_text(code)
    own = {
        "PYTHONPATH": str(Path(__file__).parent),
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(script), str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, **own, **environment},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder and below, by its path in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
