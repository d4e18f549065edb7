"""What compiled kernels may use of the machine: threads and memory."""

from __future__ import annotations

import operator
from typing import Any

from .engine.errors import InputError

__all__ = ["get_num_threads", "set_num_threads", "set_workspace_limit"]


def set_num_threads(n: int) -> None:
    """Let kernels run on `n` threads, the calling one included.

    For a fixed number of threads results are the same to the last bit from run to run.

    Parameters
    ----------
    n : int
        1 or more. The default is ``TINYTAPE_NUM_THREADS``, or as many as the process may use processors.

    Raises
    ------
    InputError
        If `n` is not an integer of 1 or more.
    """
    from .kernels import threads

    threads.set_num_threads(_integer("set_num_threads", "n", n, 1))


def get_num_threads() -> int:
    """How many threads kernels may run on; see `set_num_threads`."""
    from .kernels import threads

    return threads.get_num_threads()


def set_workspace_limit(nbytes: int) -> None:
    """Hold at most `nbytes` of memory between steps for the kernels to use again.

    Parameters
    ----------
    nbytes : int
        0 or more: 0 gives everything back to the system at once, at the price of slower steps. What is in use does
        not count. The default is a quarter of the machine's memory.

    Raises
    ------
    InputError
        If `nbytes` is not an integer of 0 or more.
    """
    from .kernels import workspace

    workspace.set_workspace_limit(_integer("set_workspace_limit", "nbytes", nbytes, 0))


def _integer(what: str, name: str, value: Any, least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least or isinstance(value, bool):
        raise InputError(f"{what}: {name} is {value!r}.", f"pass an integer of {least} or more.")
    return number
