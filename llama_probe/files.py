"""Writing so that nothing is lost: files appear whole or not at all, one process at a time."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llama_probe.errors import OutputError

_PART = ".part"
_LEFT = (f".*{_PART}", ".tmp??????")  # ours, and what safetensors writes to before it renames


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` when the block ends without an error.

    Until then `path` is what it was; what is killed leaves a hidden file that `sweep` removes.

    Raises:
        OutputError: The disk is full, or the folder cannot be written to.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}{_PART}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"the disk is full: {path} could not be written; what was there before is whole, "
                "so make room and run the same again"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS):
            raise OutputError(f"{path} could not be written: {error.strerror}") from error
        raise
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all.

    Raises:
        OutputError: As `written`.
    """
    with written(path) as part:
        part.write_text(text, encoding="utf-8")


def sweep(folder: Path) -> None:
    """Remove what killed processes left half-written in a folder and below; hold its lock."""
    for pattern in _LEFT:
        for part in folder.rglob(pattern):
            part.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for the length of a block: no other process that asks gets it meanwhile.

    The lock goes with the process, however it ends; its file `.lock` stays, empty.

    Raises:
        OutputError: Another process holds it, or the folder cannot be made.
    """
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise OutputError(
            f"another process is writing to {folder}: wait for it, or choose another folder"
        ) from None
    except OSError as error:
        raise OutputError(f"{folder} cannot be written to: {error.strerror}") from error
    try:
        yield
    finally:
        lock.release()
