"""How far a sweep is: shown as a bar, or told to a function, which may stop it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

# True: a bar. A function: called with how many cells are done, and of how many; what it raises ends
# the sweep.
Progress = bool | Callable[[int, int], None]


@contextmanager
def shown(progress: Progress, total: int, what: str) -> Iterator[Callable[[int | float], None]]:
    """Give a function that is to be called with how many are done, parts of one included.

    Args:
        progress: True for a bar, False for nothing, or a function of (done, total).
        total: How many there are.
        what: What the bar is called.

    >>> with shown(lambda done, total: print(done, "of", total), 4, "sweep") as tell:
    ...     tell(2.5)
    2 of 4
    """
    if callable(progress):
        yield lambda done: progress(int(done), total)
        return
    with tqdm(total=total, desc=what, disable=not progress) as bar:

        def tell(done: int | float) -> None:
            bar.update(int(done) - bar.n)

        yield tell
