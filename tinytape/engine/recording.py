"""`Tape`: the ordered list of what was recorded inside a ``with`` block, to print, price, differentiate and replay."""

from __future__ import annotations

import linecache
import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from .call import ALL_ARGUMENTS
from .errors import TapeError
from .tape import Node, here
from .tree import flatten, is_array, unflatten

if TYPE_CHECKING:
    from .op import Op

__all__ = ["Record", "Tape", "users_line"]


class Record(NamedTuple):
    """One line of a tape: the node, the user's line that made it and, on request, the whole call."""

    node: Node
    file: str
    line: int
    args: tuple[Any, ...] = ()
    params: dict[str, Any] = {}  # noqa: RUF012 - never written
    out: Any = None


class Tape:
    """Record what runs inside a ``with`` block as an ordered list.

    Tensors that require gradients are differentiable without it; a Tape is for looking at what was recorded, and
    for gradients of one result with respect to anything on it.

    Parameters
    ----------
    keep_calls : bool
        Also keep every op's arguments and result, so that the tape can be run forward again. It holds on to all
        values. Default False.

    Examples
    --------
    >>> with tt.Tape() as tape:
    ...     loss = (model(x) - y).square().mean()
    >>> print(tape)
    >>> gradients = tape.gradient(loss, model)
    """

    def __init__(self, keep_calls: bool = False) -> None:
        self.records: list[Record] = []
        self.keep_calls = keep_calls
        self.outer: Tape | None = None
        self._open = False

    def __enter__(self) -> Tape:
        if self._open:
            raise TapeError("Tape: it is open already.", "make another Tape() for the inner block.")
        self._open = True
        self.outer = here.context.tape
        here.context.tape = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        here.context.tape = self.outer
        self.outer = None
        self._open = False

    def __len__(self) -> int:
        return len(self.records)

    def append(self, node: Node, args: tuple[Any, ...], params: dict[str, Any], out: Any) -> None:
        """Called by every op that records while this tape, or one inside it, is open."""
        file, line = users_line()
        if self.keep_calls:
            self.records.append(Record(node, file, line, args, params, out))
        else:
            self.records.append(Record(node, file, line))
        if self.outer is not None:
            self.outer.append(node, args, params, out)

    def note(self, op: Op, args: tuple[Any, ...], params: dict[str, Any], out: Any) -> None:
        """Called by every op that runs and is not recorded, its results being constants. A tape has no use for it."""

    def gradient(
        self, target: Any, sources: Any, gradient: Any = None, retain_graph: bool = False, create_graph: bool = False
    ) -> Any:
        """Gradient of `target` with respect to `sources`, which may be any tensors on the tape.

        Parameters
        ----------
        target : Tensor
            A scalar, or any tensor if `gradient` is given.
        sources : Tensor, list, tuple, dict or Module
            What to differentiate with respect to. The result has the same structure; for a Module it is a dict
            keyed by parameter name.
        gradient : array, optional
            dL/dtarget, of target's shape.
        retain_graph, create_graph : bool
            As in `Tensor.backward`.

        Returns
        -------
        The structure of `sources`, with None where `target` does not depend on a source. ``.grad`` is not touched.
        """
        from .tensor import gradient as gradient_of

        if hasattr(sources, "named_parameters"):
            sources = dict(sources.named_parameters())
        return unflatten(sources, gradient_of(target, flatten(sources), gradient, retain_graph, create_graph))

    @property
    def nbytes(self) -> int:
        """What all records keep alive for their derivatives, in bytes; parameters are not counted."""
        buffers: dict[int, int] = {}
        for record in self.records:
            buffers.update(kept_buffers(record.node))
        return sum(buffers.values())

    def __str__(self) -> str:
        rows = [("number", "step", "op", "shapes", "kept", "line")]
        for record in self.records:
            node = record.node
            kept = kept_buffers(node)
            came = ", ".join("·" if p is None else str(p.shape) for p in node.parents or ())
            step = "" if node.step is None else str(node.step)
            freed = "freed" if node.parents is None else f"{sum(kept.values()):,} B"
            text = linecache.getline(record.file, record.line).strip()
            source = f"{record.file.rsplit('/', 1)[-1]}:{record.line} {text}"
            rows.append((str(node.number), step, node.name, f"{came} -> {node.shape}", freed, source[:70]))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        total = f"{len(self.records)} records keep {self.nbytes:,} bytes (parameters not counted)"
        return "\n".join([*lines, total])


def kept_buffers(node: Node) -> dict[int, int]:
    """What a node keeps alive: bytes by buffer, so that what two nodes share can be counted once.

    Memory that belongs to a leaf, or is a view of a leaf's, is not counted: it is there with the tape or without it.
    What is kept and is no array, such as the state of a kernel, tells of its memory by a method of this name.
    """
    buffers: dict[int, int] = {}
    if node.op is None or not node.kept:
        return buffers
    watched = iter(node.watched or ())
    for source, value in zip(node.op.sources, node.kept, strict=True):
        if hasattr(value, "kept_buffers"):
            buffers.update(value.kept_buffers())
        for array in value if source == ALL_ARGUMENTS else (value,):
            storage = next(watched, None) if source >= 0 or source == ALL_ARGUMENTS else None
            if storage is None and is_array(array):
                owner = array if array.base is None else array.base
                buffers[id(owner)] = owner.nbytes if is_array(owner) else array.nbytes
    return buffers


_PACKAGE = __name__.split(".", 1)[0] + "."


def users_line() -> tuple[str, int]:
    """The innermost line on the call stack that is not inside this package."""
    frame = sys._getframe(2)  # pyright: ignore[reportPrivateUsage]
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_PACKAGE):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno
