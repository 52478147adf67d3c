"""The README's example runs as it stands."""

import re
from pathlib import Path

import pytest
import tiny

README = Path(__file__).resolve().parent.parent / "README.md"
CODE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


TABLE = re.compile(r"^\| (`(?:attn\.|mlp\.)?hook_.*?`) \|", re.MULTILINE)


def test_every_hook_of_the_table_exists():
    models = [tiny.make(family) for family in ("llama-gqa", "mixtral")]
    known = {name for model in models for name in model.hook_dict}
    names = [name.strip("`") for row in TABLE.findall(README.read_text()) for name in row.split()]
    assert len(names) >= 20
    for name in names:
        assert f"blocks.0.{name}" in known, name


@pytest.mark.slow
def test_the_example_runs(smollm2_path, capsys):
    example = CODE.findall(README.read_text())[0]
    exec(compile(example, str(README), "exec"), {})
    assert "torch.Size([1, 9, " in capsys.readouterr().out
