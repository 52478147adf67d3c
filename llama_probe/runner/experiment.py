"""What an experiment is: a function of parameters that returns a title and a body."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llama_probe.errors import InputError

if TYPE_CHECKING:
    from llama_probe.runner.steps import Run


@dataclass(frozen=True)
class Experiment:
    """What a function of an experiments file returns: what is to be done for its arguments.

    The function itself should only put this together; the work is the body's.

    Attributes:
        title: Of the report.
        body: Does the work with what `Run` offers.
        seed: What all random draws follow from.
        inputs: Files that are read; their hashes are kept in the record.

    >>> def throws(n: int = 100, seed: int = 0) -> Experiment:
    ...     def body(run):
    ...         run.table("throws", lambda: pd.DataFrame({"pips": np.random.randint(1, 7, n)}))
    ...
    ...     return Experiment(title=f"{n} throws of a die", body=body, seed=seed)
    >>> throws(10).title
    '10 throws of a die'
    """

    title: str
    body: Callable[["Run"], object]
    seed: int = 0
    inputs: Sequence[str | Path] = ()

    def __post_init__(self) -> None:
        """See that it can be run."""
        if not isinstance(self.title, str) or not self.title.strip():
            raise InputError(f"the experiment's title is {self.title!r}, but should be a text")
        if not callable(self.body):
            raise InputError(f"the experiment's body is {self.body!r}, but should be a function")
        if type(self.seed) is not int:
            raise InputError(
                f"the experiment's seed is {self.seed!r}, but should be a whole number"
            )
        if isinstance(self.inputs, str | Path):
            raise InputError(
                f"the experiment's inputs are {self.inputs!r}, but should be a list of paths"
            )
