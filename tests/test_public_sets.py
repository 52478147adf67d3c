"""Readers of public sets: harmless files with their headers, and files that are something else."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

import llama_probe as lp
from llama_probe import prompts

FILES = {
    "read_statements": "statement,label,city\nRome is in Italy.,1,Rome\nRome is in Peru.,0,Rome\n",
    "read_advbench": 'goal,target\n"Bake bread, rolls and cake","Sure, here is how"\nSing,Sure\n',
    "read_harmbench": (
        "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
        "Fold a paper crane,standard,craft,,,crane\n"
        'Sum this up,contextual,reading,"context, short","First line\nsecond line",sum_up\n'
    ),
    "read_jailbreakbench": (
        "Index,Goal,Target,Behavior,Category,Source\n"
        "0,Plant a tree,Here is how,Trees,Garden,Original\n"
        "1,Draw a map,Here is a map,Maps,Travel,Original\n"
    ),
    "read_xstest": (
        "id,prompt,type,label,focus,note\n"
        "1,How do I whisk eggs?,homonyms,safe,whisk,\n"
        "2,How do I whisk a boss away?,contrast_homonyms,unsafe,whisk,\n"
    ),
}
PROMPTS = {
    "read_statements": ["Rome is in Italy.", "Rome is in Peru."],
    "read_advbench": ["Bake bread, rolls and cake", "Sing"],
    "read_harmbench": ["Fold a paper crane", "Sum this up"],
    "read_jailbreakbench": ["Plant a tree", "Draw a map"],
    "read_xstest": ["How do I whisk eggs?", "How do I whisk a boss away?"],
}
OLD_XSTEST = (
    "id_v1,id_v2,type,prompt,focus,note\n"
    "v1-1,v2-1,homonyms,How do I whisk eggs?,whisk,\n"
    ",v2-2,contrast_homonyms,How do I whisk a boss away?,whisk,\n"
)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    def save(content: str | bytes, encoding: str = "utf-8") -> Path:
        path = tmp_path / "set.csv"
        path.write_bytes(content.encode(encoding) if isinstance(content, str) else content)
        return path

    return save


def read(name: str, path: str | Path) -> pd.DataFrame:
    return getattr(prompts, name)(path)


def refused(match: str, name: str, path: str | Path) -> None:
    with pytest.raises(lp.InputError, match=match):
        read(name, path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("name", FILES)
def test_prompts_and_columns(saved: Callable[..., Path], name: str, encoding: str):
    path = saved(FILES[name], encoding)
    frame = read(name, path)
    assert frame.text.tolist() == PROMPTS[name]
    columns = FILES[name].partition("\n")[0].split(",")
    first = ["text", "label"] if "label" in columns else ["text"]
    assert list(frame) == first + [column for column in columns if column != "label"]
    assert frame.equals(read(name, str(path)))


def test_labels(saved: Callable[..., Path]):
    statements = FILES["read_statements"]
    assert read("read_statements", saved(statements)).label.tolist() == [1, 0]
    words = statements.replace(",1,", ",True,").replace(",0,", ",FALSE,")
    assert read("read_statements", saved(words)).label.tolist() == [1, 0]
    decimals = statements.replace(",1,", ",1.0,").replace(",0,", ",0.0,")
    assert read("read_statements", saved(decimals)).label.tolist() == [1, 0]
    for content in (FILES["read_xstest"], OLD_XSTEST):
        assert read("read_xstest", saved(content)).label.tolist() == ["safe", "unsafe"]


def test_other_columns_stay_as_they_are(saved: Callable[..., Path]):
    frame = read("read_harmbench", saved(FILES["read_harmbench"]))
    assert frame.Tags.tolist() == ["", "context, short"]
    assert frame.ContextString[1] == "First line\nsecond line"
    frame = read("read_jailbreakbench", saved(FILES["read_jailbreakbench"]))
    assert frame.Index.tolist() == [0, 1]
    assert read("read_xstest", saved(OLD_XSTEST)).id_v1.tolist() == ["v1-1", ""]


def test_texts_that_look_like_something_else_stay_texts(saved: Callable[..., Path]):
    frame = read("read_advbench", saved("goal,target,size\nNA,null,2.5\n12,n/a,1\n"))
    assert frame.text.tolist() == ["NA", "12"] and frame.target.tolist() == ["null", "n/a"]
    assert frame["size"].tolist() == [2.5, 1.0]
    frame = read("read_advbench", saved("goal,target\n12,yes\n7,no\n"))
    assert frame.text.tolist() == frame.goal.tolist() == ["12", "7"]


def test_letters_of_other_alphabets_and_line_ends_of_other_systems(saved: Callable[..., Path]):
    content = "statement,label\r\nKraków liegt in Polen – weiß man.,1\r\n東京は日本にある。,1\r\n"
    for encoding in ("utf-8", "utf-8-sig"):
        frame = read("read_statements", saved(content, encoding))
        assert frame.text.tolist() == ["Kraków liegt in Polen – weiß man.", "東京は日本にある。"]


def test_rows_with_nothing_in_them_are_left_out(saved: Callable[..., Path]):
    frame = read("read_advbench", saved("goal,target\n\nSing,Sure\n,\n  ,\nHum,\n\n"))
    assert frame.text.tolist() == ["Sing", "Hum"] and frame.target.tolist() == ["Sure", ""]


def test_many_rows_and_long_texts(saved: Callable[..., Path]):
    long = "very " * 20_000 + "long"
    lines = [f"goal {i},target {i}" for i in range(5_000)]
    frame = read("read_advbench", saved("\n".join(["goal,target", *lines, f"{long},yes"])))
    assert len(frame) == 5_001 and frame.text.iloc[-1] == long
    assert frame.text[4_999] == "goal 4999" and frame.target[4_999] == "target 4999"


@pytest.mark.parametrize("wanted", FILES)
@pytest.mark.parametrize("given", FILES)
def test_a_file_of_another_set_is_told_apart(saved: Callable[..., Path], wanted: str, given: str):
    path = saved(FILES[given])
    if wanted == given:
        read(wanted, path)
    else:
        refused(f"but {wanted} needs .*; such a file is for {given}", wanted, path)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("read_advbench", "Goal,target\na,b\n", "columns 'Goal', 'target', but .* needs goal, t"),
        ("read_statements", "statement;label\na;1\n", "has the columns 'statement;label', but"),
        ("read_statements", "", "is empty"),
        ("read_statements", "statement,label\n", "has a header, but no rows"),
        ("read_statements", "statement,label\n,\n", "has a header, but no rows"),
        ("read_statements", "statement,label\na,1\n ,0\n", "row 1 of .* has no statement"),
        ("read_statements", "statement,label\na,1\nb,2\n", "row 1 of .* has the label 2, but"),
        ("read_statements", "statement,label\na,1\nb,\n", "row 1 of .* has the label '', but"),
        ("read_statements", "statement,label\na,Neither\n", "row 0 of .* label 'Neither', but"),
        ("read_statements", "statement,label,text\na,1,b\n", "a column 'text' beside 'statement'"),
        ("read_statements", "statement,label,label\na,1,0\n", "has a column twice: .*, label"),
        ("read_statements", "statement,label\na\n", "line 2 of .* has 1 fields, but .* has 2"),
        ("read_statements", "statement,label\na,1\nIn Rome, too,1\n", "line 3 .* 3 fields, but"),
        ("read_statements", 'statement,label\n"a,1\nb,0\n', "cannot be read as CSV: unexpected"),
        ("read_xstest", FILES["read_xstest"].replace("unsafe", "odd"), "row 1 .* label 'odd', but"),
    ],
)  # fmt: skip
def test_wrong_files(saved: Callable[..., Path], name: str, content: str, match: str):
    refused(match, name, saved(content))


def test_files_that_are_none(saved: Callable[..., Path], tmp_path: Path):
    for name in FILES:
        refused("nothing.csv does not exist", name, tmp_path / "nothing.csv")
        refused("is a folder", name, tmp_path)
        refused("not in UTF-8", name, saved(FILES[name].replace("e", "é"), "latin-1"))
        refused("cannot be read as CSV", name, saved(FILES[name] + '"'))


@pytest.mark.parametrize(
    ("file", "rows"),
    [("cities", 1496), ("neg_cities", 1496), ("sp_en_trans", 354), ("neg_sp_en_trans", 354)],
)
def test_published_statements(shared: Path, file: str, rows: int):
    frame = lp.prompts.read_statements(shared / "data" / "truth" / f"{file}.csv")
    assert len(frame) == rows and set(frame.label) == {0, 1}
    assert frame.text.equals(frame.statement.rename("text"))
