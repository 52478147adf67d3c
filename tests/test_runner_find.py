"""Finding an experiment in a file, and reading the values of its parameters."""

import inspect
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from drawing import DRAWS, written

from llama_probe.errors import InputError
from llama_probe.runner.cell import Cell
from llama_probe.runner.find import find
from llama_probe.runner.grid import plan
from llama_probe.runner.parameters import parameters_of, product, texts, values

HEAD = "from llama_probe.runner import Experiment\n"
ONE = HEAD + "def {name}() -> Experiment:\n    return Experiment('T', print)\n"


def test_the_only_experiment_of_a_file_needs_no_name(tmp_path):
    file = written(tmp_path, DRAWS + "\n\ndef helper(x: int) -> int:\n    return x\n")
    for address in (file, str(file), f"{file}::draws"):
        found = find(address)
        assert found.name == "draws" and found.address == f"{file}::draws"
    assert find(written(tmp_path, ONE.format(name="other"), "file")).name == "file.other"


def test_annotations_may_be_texts(tmp_path):
    source = ONE.format(name="one").replace("-> Experiment", "-> 'lp.Experiment'")
    assert find(written(tmp_path, source)).name == "draws.one"


# A file's source, what is asked of it, and the sentence.
UNUSABLE = [
    (None, "", "there is no experiment file {file}; give the path of a .py file"),
    (
        ONE.format(name="one"), "::on",
        "{file} has no experiment 'on'; did you mean 'one'; it has one",
    ),
    (
        ONE.format(name="one") + ONE.format(name="two"), "",
        "{file} has 2 experiments; name one: {file}::one or {file}::two",
    ),
    (
        "x = 1\n", "",
        "{file} has no experiment: none of its functions is annotated '-> lp.Experiment'",
    ),
    (
        HEAD + "import json\n\njson.loads('{')\n", "",
        "{file}, line 4: the file cannot be loaded: JSONDecodeError: Expecting property name",
    ),
    (
        HEAD + "raise SystemExit('no')\n", "",
        "{file}, line 2: the file cannot be loaded: SystemExit: no",
    ),
    (
        HEAD + "def f(:\n", "",
        "{file}, line 2: the file cannot be loaded: SyntaxError: invalid syntax",
    ),
    (
        HEAD + "import nothing_of_that_name\n", "",
        "{file}, line 2: the file cannot be loaded: ModuleNotFoundError: No module named",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("source", "ask", "sentence"), UNUSABLE)
def test_a_file_that_cannot_be_used_is_one_sentence(tmp_path, source, ask, sentence):
    file = tmp_path / "draws.py"
    if source is not None:
        file.write_text(source)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError) as raised:
        plan(f"{file}{ask}", [], tmp_path / "runs")
    assert str(raised.value).startswith(sentence.format(file=file))
    assert "\n" not in str(raised.value) and sorted(tmp_path.iterdir()) == before


def test_the_source_is_the_file_and_what_it_imports_beside_it(tmp_path):
    (tmp_path / "helpers" / "deep").mkdir(parents=True)
    for name in ("words", "unused", "helpers/__init__", "helpers/texts", "helpers/more"):
        (tmp_path / f"{name}.py").write_text("")
    (tmp_path / "words.py").write_text("def f():\n    from helpers.texts import anything\n")
    (tmp_path / "helpers" / "texts.py").write_text("from .more import x\nimport json\n")
    file = written(
        tmp_path,
        DRAWS.replace(
            "import random", "import random, llama_probe\n\ndef g():\n    import words\n", 1
        ),
    )
    first = find(file).source
    names = ["draws.py", "helpers/__init__.py", "helpers/more.py", "helpers/texts.py", "words.py"]
    assert list(first) == names
    (tmp_path / "helpers" / "more.py").write_text("x = 1\n")
    (tmp_path / "unused.py").write_text("x = 1\n")
    second = find(file).source
    assert [name for name in names if first[name] != second[name]] == ["helpers/more.py"]


def test_an_edited_helper_is_loaded_anew(tmp_path):
    source = "from words import WORD\n" + ONE.format(name="draws").replace("'T'", "WORD")
    helper = tmp_path / "words.py"
    helper.write_text("WORD = 'one'\n")
    file = written(tmp_path, source)
    assert find(file).function().title == "one"
    helper.write_text("WORD = 'two'\n")
    assert find(file).function().title == "two"


def kinds(
    layer: int,
    rate: float = 0.5,
    model: str = "tiny-moe",
    chat: bool = False,
    top: int | None = None,
    layers: list[int] = [0],  # noqa: B006
    how: Literal["zero", "mean"] = "zero",
    plain=3,
    anything: int | str = 1,
) -> Any:
    raise NotImplementedError


KNOWN = parameters_of("kinds", kinds)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("layer=1,-2", [1, -2]),
        ("rate=1,2.5e-3", [1.0, 0.0025]),
        ("model=org/name, ./folder", ["org/name", "./folder"]),
        ('model="a, b","c"', ["a, b", "c"]),
        ("model=", [""]),
        ("model=a=b", ["a=b"]),
        ("chat=true,False", [True, False]),
        ("top=none,3", [None, 3]),
        ("layers=[1, 2]", [[1, 2]]),
        ("layers=[1],[2,3],[]", [[1], [2, 3], []]),
        ("how=mean,zero", ["mean", "zero"]),
        ("plain=7", [7]),
        ("anything=7,x", [7, "x"]),
    ],
)
def test_texts_are_read_as_their_parameter_wants(text, read):
    [(name, found)] = texts(KNOWN, "kinds", [text]).items()
    assert found == read and list(map(type, found)) == list(map(type, read))
    assert values(KNOWN, "kinds", {name: read[0]}) == {name: [read[0]]}


def test_a_key_that_comes_twice_has_all_the_values():
    assert texts(KNOWN, "kinds", ["layer=1", "layer=2,1"]) == {"layer": [1, 2, 1]}
    grid = product(KNOWN, "kinds", {"layer": [1, 2, 1]})
    assert [row["layer"] for row in grid] == [1, 2]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("layer", "-P layer gives no value; write it as key=value or key=v1,v2"),
        ("layre=1", "kinds has no parameter 'layre'; did you mean 'layer'"),
        ("layer=1,b", "layer is '1,b', but should be int"),
        ("layer=1.0", "layer is '1.0', but should be int"),
        ("layer=", "layer is '', but should be int"),
        ("layer=none", "layer is 'none', but should be int"),
        ("rate=fast", "rate is 'fast', but should be float"),
        ("chat=1", "chat is '1', but should be true or false"),
        ("top=x", "top is 'x', but should be int or none"),
        ("layers=1,2", "layers is '1,2', but should be a list of int, such as [1, 2]"),
        ("layers=[1", "layers=[1 is not JSON: "),
        ('layers=["a"]', "layers is '[\"a\"]', but should be a list of int"),
        ("how=median", "how is 'median', but should be 'zero' or 'mean'"),
    ],
)
def test_a_text_of_the_wrong_type_is_one_sentence(text, sentence):
    with pytest.raises(InputError) as raised:
        texts(KNOWN, "kinds", [text])
    assert str(raised.value).startswith(sentence)


def test_values_from_python():
    several = {"layer": range(2), "rate": [1, np.float64(0.5)], "layers": [1, 2], "top": (None, 1)}
    read = values(KNOWN, "kinds", several)
    assert read == {"layer": [0, 1], "rate": [1.0, 0.5], "layers": [[1, 2]], "top": [None, 1]}
    assert type(read["rate"][0]) is float and type(read["rate"][1]) is float
    assert values(KNOWN, "kinds", {"layers": [[1], [2]]}) == {"layers": [[1], [2]]}
    for wrong in (True, "1", 1.0, [], [1, "x"], None, math):
        with pytest.raises(InputError, match="^layer is .*, but should be int$"):
            values(KNOWN, "kinds", {"layer": wrong})


def test_a_parameter_without_a_default_must_be_given():
    with pytest.raises(InputError, match="kinds needs a value for 'layer', which has no default"):
        product(KNOWN, "kinds", {})
    [row] = product(KNOWN, "kinds", {"layer": [1]})
    assert list(row) == list(inspect.signature(kinds).parameters) and row["rate"] == 0.5


def test_cells_of_one_model_stand_together():
    def f(layer: int = 0, model: str = "a") -> Any: ...

    grid = product(parameters_of("f", f), "f", {"layer": [1, 2], "model": ["b", "a"]})
    assert [(row["model"], row["layer"]) for row in grid] == [
        ("b", 1),
        ("b", 2),
        ("a", 1),
        ("a", 2),
    ]


def test_signatures_that_no_command_line_can_give():
    def path(x: Path) -> Any: ...
    def later(x: "Nothing" = 1) -> Any: ...  # noqa: F821  # pyright: ignore
    def rest(*x: int) -> Any: ...
    def taken(status: int = 0) -> Any: ...
    def value(x: list = [print]) -> Any: ...  # noqa: B006

    for function, sentence in (
        (path, "f has a parameter 'x: pathlib.Path', but its type should be int, float, str"),
        (later, "an annotation of f means nothing: name 'Nothing' is not defined"),
        (rest, "f takes *x: int, but its arguments should be named ones"),
        (taken, "f cannot have a parameter 'status': rename it"),
        (value, "f has a parameter 'x: list = ["),
    ):
        with pytest.raises(InputError) as raised:
            parameters_of("f", function)
        assert str(raised.value).startswith(sentence)


def test_a_folder_is_told_from_others_by_all_arguments():
    def name(**arguments: Any) -> str:
        return Cell("probes", "", arguments, "runs").name

    assert name(model="org/big", layer=1).startswith("probes-model=big-layer=1-")
    assert name(a=1, b=2)[-8:] == name(b=2, a=1)[-8:], "the hash knows no order"
    different = [
        name(a=1),
        name(a="1"),
        name(a=1.0),
        name(a=None),
        name(a=[1]),
        name(a="x/1"),
        name(),
    ]
    assert len(set(different)) == len(different)
    long = name(text="a b/" + "é?*:" * 99)
    assert len(long) < 140 and "/" not in long and not set("?*: ") & set(long)
