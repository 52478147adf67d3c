"""A file imports only from floors below its own, and a few packages only from one place."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "llama_probe"

# The unit is a file or a folder directly under llama_probe.
FLOORS = {
    "errors": 0,
    "files": 1,
    "hooks": 1,
    "tokenizer": 1,
    "prompts": 1,
    "stats": 1,
    "plots": 1,
    "model": 2,
    "interventions": 2,
    "page": 2,
    "checkpoints": 3,
    "capturing": 4,
    "lens": 5,
    "patching": 5,
    "probing": 5,
    "routing": 6,
    "refusal": 6,
    "widgets": 7,
    "runner": 8,
    "cli": 9,
    "__init__": 10,
}
FILES = sorted(PACKAGE.rglob("*.py"))


class Import(NamedTuple):
    """One imported name: `from a.b import c` gives "a.b.c"."""

    name: str
    line: int
    in_function: bool


def unit_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def is_type_checking(test: ast.expr) -> bool:
    return getattr(test, "id", getattr(test, "attr", None)) == "TYPE_CHECKING"


def imports(node: ast.AST, package: str, in_function: bool = False) -> Iterator[Import]:
    """Every import that runs, in functions too; `package` is what relative imports start from."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, in_function)
        elif isinstance(child, ast.ImportFrom):
            start = package.split(".")[: len(package.split(".")) + 1 - child.level]
            base = ".".join([*(start if child.level else []), *filter(None, [child.module])])
            for alias in child.names:
                yield Import(f"{base}.{alias.name}", child.lineno, in_function)
        elif isinstance(child, ast.If) and is_type_checking(child.test):
            for statement in child.orelse:
                yield from imports(ast.Module([statement], []), package, in_function)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(child, package, in_function or inside)


def imports_of(path: Path, source: str | None = None) -> list[Import]:
    package = ".".join(["llama_probe", *path.relative_to(PACKAGE).parent.parts])
    return list(imports(ast.parse(path.read_text() if source is None else source), package))


def climbs(path: Path, source: str | None = None) -> list[str]:
    """The imports of a file that are not from below its floor, as sentences."""
    own = unit_of(path)
    found = []
    for name, line, _ in imports_of(path, source):
        parts = name.split(".")
        if parts[0] != "llama_probe" or parts[1:] == ["__version__"]:
            continue
        unit = parts[1] if len(parts) > 1 and parts[1] in FLOORS else "__init__"
        if unit != own and FLOORS[unit] >= FLOORS[own]:
            found.append(
                f"{path.name}:{line} (floor {FLOORS[own]}) imports {name} (floor {FLOORS[unit]})"
            )
    return found


def top(name: str) -> str:
    return name.partition(".")[0]


def ids(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_imports_only_from_floors_below(path):
    assert climbs(path) == []


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_some_packages_are_imported_in_one_place_only(path):
    for name, line, in_function in imports_of(path):
        where = f"{path}:{line}"
        match top(name):
            case "transformer_lens":
                assert unit_of(path) == "hooks", f"{where}: only hooks.py imports transformer_lens"
            case "transformers":
                assert unit_of(path) == "checkpoints" and in_function, (
                    f"{where}: transformers is imported inside functions of checkpoints/ only"
                )
            case "torch":
                assert unit_of(path) != "plots", f"{where}: plots/ does not know torch"
            case "__future__":
                assert not name.endswith(".annotations"), f"{where}: hides shapes from the checks"


def test_the_table_covers_every_file():
    assert {unit_of(path) for path in FILES} <= set(FLOORS)


@pytest.mark.parametrize(
    "source",
    [
        "from llama_probe.lens import logit_lens",
        "import llama_probe.lens",
        "from llama_probe import lens",
        "from llama_probe import load",
        "import llama_probe as lp",
        "from . import lens",
        "from .lens import logit_lens",
        "def f():\n    from llama_probe.patching import patch",
        "class C:\n    def f(self):\n        import llama_probe.lens",
        "try:\n    import llama_probe.lens\nexcept ImportError:\n    pass",
        "from llama_probe.probing import probe",
        "if TYPE_CHECKING:\n    pass\nelse:\n    import llama_probe.lens",
    ],
)
def test_a_climbing_import_would_be_seen(source):
    assert len(climbs(PACKAGE / "capturing.py", source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "from llama_probe.errors import InputError",
        "from llama_probe import __version__",
        "from llama_probe.checkpoints import catalogue",
        "from .model.llama import Llama",
        "import llama_probe.capturing",
        "if TYPE_CHECKING:\n    from llama_probe.lens import logit_lens",
        "import torch",
    ],
)
def test_a_descending_import_is_allowed(source):
    assert climbs(PACKAGE / "capturing.py", source) == []


def test_relative_imports_inside_a_folder_are_resolved():
    path = PACKAGE / "model" / "llama.py"
    assert [found.name for found in imports_of(path, "from .rope import Rope")] == [
        "llama_probe.model.rope.Rope"
    ]
    assert climbs(path, "from ..lens import logit_lens") != []
    assert climbs(path, "from ..hooks import act_name") == []
