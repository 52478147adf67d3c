"""Finding an experiment: in a file, or behind a function; and the hash of all that it is made of.

The source that counts is the experiment's file, and the files beside it that it imports, in
functions too. A change in any of them makes another experiment of it.
"""

import ast
import hashlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from llama_probe.errors import InputError, near
from llama_probe.runner.experiment import Experiment


@dataclass(frozen=True)
class Found:
    """An experiment's function, and where it comes from.

    Attributes:
        name: What its runs are called after.
        function: The function.
        file: Its file; None for one that was typed into a notebook.
        source: The SHA-256 of each file that it is made of, by its path from the folder of `file`.
    """

    name: str
    function: Callable[..., Any]
    file: Path | None
    source: dict[str, str] = field(repr=False)

    @property
    def address(self) -> str:
        """What finds it again in another process: "file::function"; "" if nothing does."""
        return "" if self.file is None else f"{self.file}::{self.function.__name__}"

    def importable(self) -> AbstractContextManager[None]:
        """A block in which the files beside it can be imported, as if Python ran its file."""
        return nullcontext() if self.file is None else _importable(self.file.parent)


def find(experiment: str | Path | Callable[..., Any]) -> Found:
    """Find an experiment.

    Args:
        experiment: A file, "file::function" where it has several, or the function itself.

    Raises:
        InputError: There is no such file or function, or the file cannot be loaded.
    """
    if callable(experiment):
        return _of_function(experiment)
    path, _, name = str(experiment).partition("::")
    file = Path(path).expanduser()
    if file.suffix != ".py" or not file.is_file():
        raise InputError(f"there is no experiment file {file}; give the path of a .py file")
    file = file.resolve()
    sources = _sources(file)
    functions = _experiments(_loaded(file, sources))
    if not functions:
        raise InputError(
            f"{file} has no experiment: none of its functions is annotated '-> lp.Experiment'"
        )
    if name and name not in functions:
        others = ", ".join(functions)
        raise InputError(
            f"{file} has no experiment {name!r}{near(name, functions)}; it has {others}"
        )
    if not name and len(functions) > 1:
        several = " or ".join(f"{path}::{other}" for other in functions)
        raise InputError(f"{path} has {len(functions)} experiments; name one: {several}")
    function = functions[name or next(iter(functions))]
    return Found(_name(file, function), function, file, _hashes(file, sources))


def _of_function(function: Callable[..., Any]) -> Found:
    try:
        source = inspect.getsource(function)
        file = Path(inspect.getsourcefile(function) or "")
    except (OSError, TypeError):
        raise InputError(f"the source of {function!r} cannot be read: write it in a file") from None
    if not file.is_file():  # a notebook's cell
        return Found(function.__name__, function, None, {"": _sha256(source.encode())})
    file = file.resolve()
    return Found(_name(file, function), function, file, _hashes(file, _sources(file)))


def _name(file: Path, function: Callable[..., Any]) -> str:
    own = function.__name__
    return own if own == file.stem else f"{file.stem}.{own}"


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _loaded(file: Path, sources: dict[Path, bytes]) -> ModuleType:
    """The module of a file, run from the very bytes that are hashed."""
    for name, other in list(sys.modules.items()):
        if Path(getattr(other, "__file__", None) or "") in sources:
            del sys.modules[name]  # it may have been edited since it was imported
    module = ModuleType(f"experiment_{file.stem}")
    module.__file__ = str(file)
    sys.modules[module.__name__] = module  # where dataclasses look
    try:
        with _importable(file.parent):
            exec(compile(sources[file], file, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        raise _does_not_load(file, line_of(error, file), error) from error
    return module


def line_of(error: BaseException, file: Path | None) -> int | None:
    """The line of a file in which an error arose, or which led to where it did."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(file)]
    return lines[-1] if lines else None


def _does_not_load(file: Path, line: int | None, error: BaseException) -> InputError:
    where = f"{file}, line {line}" if line else str(file)
    what = " ".join(str(getattr(error, "msg", error)).split())
    return InputError(f"{where}: the file cannot be loaded: {type(error).__name__}: {what}")


def _experiments(module: ModuleType) -> dict[str, Callable[..., Any]]:
    """The functions that are written in a module and annotated to return an experiment."""
    found = {}
    for name, value in vars(module).items():
        own = inspect.isfunction(value) and value.__module__ == module.__name__
        returned = inspect.get_annotations(value).get("return") if own else None
        named = isinstance(returned, str) and returned.rpartition(".")[2] == Experiment.__name__
        if returned is Experiment or named:
            found[name] = value
    return found


def _hashes(file: Path, sources: dict[Path, bytes]) -> dict[str, str]:
    return {
        path.relative_to(file.parent).as_posix(): _sha256(sources[path]) for path in sorted(sources)
    }


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _sources(file: Path) -> dict[Path, bytes]:
    """The bytes of a file and of those beside and below it that it imports."""
    found: dict[Path, bytes] = {}
    waiting = [file]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found[path] = path.read_bytes()
        try:
            tree = ast.parse(found[path])
        except (SyntaxError, ValueError) as error:
            raise _does_not_load(path, getattr(error, "lineno", None), error) from error
        waiting += _beside(tree, path, file.parent)
    return found


def _beside(tree: ast.AST, path: Path, folder: Path) -> Iterator[Path]:
    """The files in `folder` and below that a file's imports load."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from _modules(folder, [alias.name for alias in node.names])
        elif isinstance(node, ast.ImportFrom):
            start = path.parents[node.level - 1] if node.level else folder
            base = f"{node.module}." if node.module else ""
            if start.is_relative_to(folder):
                yield from _modules(start, [f"{base}{alias.name}" for alias in node.names])


def _modules(start: Path, names: list[str]) -> Iterator[Path]:
    for name in names:
        if name.partition(".")[0] == "llama_probe":
            continue  # its version is in the record
        path = start
        for part in name.split("."):
            path = path / part
            for file in (path.with_suffix(".py"), path / "__init__.py"):
                if file.is_file():
                    yield file
