"""How much memory there is, and whether an error says that there was too little."""

import sys
from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """What is free on a device; for the CPU within the limits of this process and its container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [psutil.virtual_memory().available, *_left_by_limit(), *_left_in_container()]
    return max(0, min(found))


def _left_by_limit() -> list[int]:
    """What `ulimit -v` leaves."""
    if sys.platform == "win32":
        return []
    import resource

    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    if most == resource.RLIM_INFINITY:
        return []
    return [most - psutil.Process().memory_info().vms]


def _left_in_container() -> list[int]:
    """What the control group leaves, where there is one (Linux, version 2)."""
    try:
        most, used = ((_CGROUP / f"memory.{name}").read_text() for name in ("max", "current"))
        return [] if most.strip() == "max" else [int(most) - int(used)]
    except (OSError, ValueError):
        return []


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has had at once, on a device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    # In kilobytes, except on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was not enough; torch has no class of its own for a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = ("can't allocate memory", "out of memory", "not enough memory")
    return any(word in str(error).lower() for word in words)
