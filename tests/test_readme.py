"""The README's example runs as it stands."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
CODE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_example_runs(smollm2_path, capsys):
    (example,) = CODE.findall(README.read_text())
    exec(compile(example, str(README), "exec"), {})
    assert "torch.Size([1, 9, " in capsys.readouterr().out
