"""`Module`: parameters by name.

A module is its attributes: what is a `Parameter`, a `Buffer` or a `Module` among them is found when asked for, in the
order of assignment. There is no registry to keep in step, and nothing to call before assigning.
"""

from __future__ import annotations

import textwrap
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar, cast, overload

import numpy as np
import numpy.typing as npt

from ..engine.errors import DTypeError, InputError, ShapeError
from ..engine.stand_in import standing_in
from ..engine.tape import Leaf, Storage, no_grad
from ..engine.tensor import Tensor

__all__ = [
    "Buffer", "Module", "ModuleDict", "ModuleList", "Parameter", "Sequential", "Unmatched", "evaluating",
    "functional_call",
]  # fmt: skip

M = TypeVar("M", bound="Module")
T = TypeVar("T")
Array = np.ndarray[Any, np.dtype[Any]]


class _Kept(Tensor):
    """A tensor that belongs to a module."""

    __slots__ = ()

    def cast_(self, dtype: npt.DTypeLike) -> None:
        """Change the dtype in place, if it is of floats: the tensor stays the same object, its gradient is dropped."""
        wanted = np.dtype(dtype)
        if self.dtype.kind != "f" or self.dtype == wanted:
            return
        self.raw = self.raw.astype(wanted)
        self.storage = Storage()
        if isinstance(self.node, Leaf):
            hooks = self.node.hooks
            self.node = Leaf(self.shape, wanted, self.storage)
            self.node.hooks = hooks


class Parameter(_Kept):
    """A tensor that a module learns: a leaf that requires gradients.

    Parameters
    ----------
    data : array_like
        Copied. Arrays keep their dtype, Python floats become the default dtype.
    requires_grad : bool
        Default True; False for a frozen parameter.
    dtype : dtype, optional

    Notes
    -----
    To write values: ``with tt.no_grad(): parameter.copy_(values)``.
    """

    __slots__ = ()

    def __init__(self, data: Any, requires_grad: bool = True, dtype: npt.DTypeLike | None = None) -> None:
        super().__init__(data, requires_grad, dtype)


class Buffer(_Kept):
    """A tensor that a module keeps and saves but does not learn: a running mean, a table of positions."""

    __slots__ = ()


class Unmatched(NamedTuple):
    """What ``load_state_dict(strict=False)`` passed over."""

    missing: list[str]
    unexpected: list[str]


class Module:
    """Base of everything with parameters.

    Assign `Parameter`, `Buffer` and `Module` attributes and write `forward`; calling the module calls it.

    Examples
    --------
    >>> class Scale(nn.Module):
    ...     def __init__(self, size):
    ...         self.weight = nn.Parameter(np.ones(size, np.float32))
    ...
    ...     def forward(self, x):
    ...         return x * self.weight
    >>> Scale(3).state_dict()
    {'weight': array([1., 1., 1.], dtype=float32)}
    """

    training: bool = True
    """Whether dropout and the like are at work; see `train` and `eval`."""

    def forward(self, *args: Any, **options: Any) -> Any:
        """What calling the module computes; each module writes its own."""
        raise NotImplementedError(f"{type(self).__name__} has no forward.")

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.forward(*args, **options)

    def __setattr__(self, name: str, value: Any) -> None:
        before = vars(self).get(name)
        if isinstance(before, Parameter) and not (value is None or isinstance(value, Parameter)):
            raise DTypeError(
                f"{type(self).__name__}.{name} is a Parameter; a {type(value).__name__} would not be learned or saved.",
                "assign nn.Parameter(...), or write values: with tt.no_grad(): parameter.copy_(values).",
            )
        if isinstance(before, Buffer) and isinstance(value, Tensor | np.ndarray):
            value = Buffer(value)
        if isinstance(value, list | tuple | dict):
            items = cast(Any, value).values() if isinstance(value, dict) else cast("Iterable[Any]", value)
            self._refuse_hidden(name, items)
        object.__setattr__(self, name, value)

    def _refuse_hidden(self, name: str, items: Iterable[Any]) -> None:
        kept = [item for item in items if isinstance(item, Module | Parameter)]
        known = {id(entry) for _, entry in (*self.named_modules(), *self._entries(Parameter))} if kept else set[int]()
        if any(id(item) not in known for item in kept):
            raise InputError(
                f"{type(self).__name__}.{name}: a plain list or dict hides its modules and parameters; they would not "
                "be learned or saved.",
                "use nn.ModuleList([...]) or nn.ModuleDict({...}), or assign each to an attribute of its own.",
            )

    # ---- looking at it ------------------------------------------------------------------------------------------

    def _members(self) -> dict[str, Any]:
        """What is searched for parameters, buffers and modules, by name."""
        return vars(self)

    def _entries(self, kind: type[T] | tuple[type[T], ...], prefix: str = "") -> Iterator[tuple[str, T]]:
        """Every name of every parameter or buffer: the module's own first, then those of the modules in it."""
        members = self._members()
        yield from ((prefix + name, value) for name, value in members.items() if isinstance(value, kind))
        for name, value in members.items():
            if isinstance(value, Module):
                yield from value._entries(kind, f"{prefix}{name}.")

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """``("lstm.weight_ih_l0", parameter)`` and so on; a shared parameter once, under its first name."""
        return _once(self._entries(Parameter))

    def parameters(self) -> Iterator[Parameter]:
        """Every parameter once: what an optimiser takes."""
        return (parameter for _, parameter in self.named_parameters())

    def named_buffers(self) -> Iterator[tuple[str, Buffer]]:
        """Every buffer once, with its name."""
        return _once(self._entries(Buffer))

    def buffers(self) -> Iterator[Buffer]:
        """Every buffer once."""
        return (buffer for _, buffer in self.named_buffers())

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """The module itself, under the name "", and every module in it, each once."""

        def walk(module: Module, name: str) -> Iterator[tuple[str, Module]]:
            yield name, module
            for child, below in module.named_children():
                yield from walk(below, f"{name}.{child}" if name else child)

        return _once(walk(self, prefix))

    def modules(self) -> Iterator[Module]:
        """The module itself and every module in it, each once."""
        return (module for _, module in self.named_modules())

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """The modules directly in this one, with their names."""
        return ((name, value) for name, value in self._members().items() if isinstance(value, Module))

    def children(self) -> Iterator[Module]:
        """The modules directly in this one."""
        return (module for _, module in self.named_children())

    def register_buffer(self, name: str, values: Any) -> None:
        """Keep `values` as a `Buffer`: ``self.name = nn.Buffer(values)``. None keeps the name free."""
        setattr(self, name, None if values is None else Buffer(values))

    # ---- saving and loading -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Array]:
        """Copies of all parameters and buffers as arrays; a shared one under each of its names."""
        return {name: entry.numpy() for name, entry in self._entries(_Kept)}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Unmatched:
        """Write saved values into the parameters and buffers.

        Parameters
        ----------
        state_dict : mapping of str to array
            NumPy arrays, Tensors, or anything `np.asarray` takes; a PyTorch ``state_dict`` as it is. A shared
            parameter may come under one of its names or under each.
        strict : bool
            Whether names that are missing or unexpected are errors. Default True.

        Returns
        -------
        Unmatched
            The names that were missing and unexpected; both empty if `strict`.

        Raises
        ------
        InputError
            With every entry that is missing, unexpected, of another shape or dtype, or unreadable. Nothing is
            changed then.
        """
        if not isinstance(state_dict, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise DTypeError(
                f"load_state_dict: state_dict is a {type(state_dict).__name__}.", "pass a dict of names and arrays."
            )
        entries = dict(self._entries(_Kept))
        arrays: dict[int, Array] = {}
        problems: list[str] = []
        for name, target in entries.items():
            if name not in state_dict:
                continue
            array, problem = _readable(state_dict[name], target)
            if not problem and not np.array_equal(arrays.setdefault(id(target), array), array, equal_nan=True):
                problem = "shared with another name, under which the values differ"
            if problem:
                problems.append(f"{name}: {problem}")
        given = {id(entries[name]) for name in state_dict if name in entries}
        missing = [name for name, target in entries.items() if id(target) not in given]
        unexpected = [name for name in state_dict if name not in entries]
        if strict:
            problems += [f"{name}: missing, {_form(entries[name])} expected" for name in missing]
            problems += [f"{name}: unexpected" for name in unexpected]
        if problems:
            raise InputError(
                "\n  ".join([f"{type(self).__name__}.load_state_dict: nothing was loaded.", *problems]),
                "build the module with the sizes it was saved with; change its dtype with to(dtype); strict=False "
                "passes over what is missing and unexpected.",
            )
        with no_grad():
            for target in entries.values():
                if id(target) in arrays:
                    target.copy_(arrays[id(target)])
        return Unmatched(missing, unexpected)

    # ---- changing it --------------------------------------------------------------------------------------------

    def train(self: M, mode: bool = True) -> M:
        """Set `training` here and in every module below; returns the module itself."""
        for module in self.modules():
            module.training = mode
        return self

    def eval(self: M) -> M:
        """``train(False)``: dropout passes everything."""
        return self.train(False)

    def to(self: M, dtype: npt.DTypeLike) -> M:
        """Cast parameters and buffers of floats in place. They stay the same objects; their gradients are dropped.

        Raises
        ------
        DTypeError
            If `dtype` is not a float dtype.
        """
        if np.dtype(dtype).kind != "f":
            raise DTypeError(f"to: dtype is {np.dtype(dtype)}, not a float.", "use 'float32' or 'float64'.")
        for _, entry in self._entries(_Kept):
            entry.cast_(dtype)
        return self

    def float(self: M) -> M:
        """``to("float32")``."""
        return self.to(np.float32)

    def double(self: M) -> M:
        """``to("float64")``."""
        return self.to(np.float64)

    def zero_grad(self) -> None:
        """Drop the gradients of all parameters."""
        for parameter in self.parameters():
            parameter.grad = None

    def requires_grad_(self: M, requires_grad: bool = True) -> M:
        """Freeze (False) or free all parameters; returns the module itself."""
        for parameter in self.parameters():
            parameter.requires_grad = requires_grad
        return self

    # ---- printing -----------------------------------------------------------------------------------------------

    def extra_repr(self) -> str:
        """What stands in the brackets behind the module's name when it is printed."""
        return ""

    def __repr__(self) -> str:
        first: dict[int, str] = {}
        for name, parameter in self._entries(Parameter):
            first.setdefault(id(parameter), name)
        rows = list(_rows(self, "", "", first))
        wide, digits = (max(len(row[i]) for row in rows) for i in (0, 1))
        return "\n".join(f"{a:<{wide}}  {b:>{digits}}  {c}".rstrip() for a, b, c in rows)


def _rows(module: Module, path: str, label: str, first: dict[int, str]) -> Iterator[tuple[str, str, str]]:
    """A line for each module: what it is, how many parameters are counted first here or below, their shapes."""
    prefix = f"{path}." if path else ""
    count = sum(p.size for name, p in module.named_parameters() if first[id(p)] == prefix + name)
    own = [
        f"{name} {list(value.shape)}" if first.get(id(value), prefix + name) == prefix + name
        else f"{name} = {first[id(value)]}"
        for name, value in module._members().items()  # pyright: ignore[reportPrivateUsage]
        if isinstance(value, _Kept)
    ]  # fmt: skip
    indent = "  " * (path.count(".") + bool(path))
    extra = module.extra_repr()
    title = f"{indent}{label}{type(module).__name__}{f'({extra})' if extra else ''}"
    first_line, *more = textwrap.wrap(", ".join(own), 90) or [""]
    yield title, f"{count:,}", first_line
    yield from (("", "", line) for line in more)
    for name, child in module.named_children():
        yield from _rows(child, prefix + name, f"{name}: ", first)


def _once(named: Iterator[tuple[str, T]]) -> Iterator[tuple[str, T]]:
    seen: set[int] = set()
    for name, value in named:
        if id(value) not in seen:
            seen.add(id(value))
            yield name, value


def _form(array: Any) -> str:
    return f"{array.dtype}{list(array.shape)}"


def _readable(value: Any, target: Tensor) -> tuple[Array, str]:
    """A saved value as an array, and what is wrong with it."""
    try:
        detach = getattr(value, "detach", None)  # PyTorch gives no array of what requires gradients
        array = np.asarray(value if detach is None else detach())
    except Exception as error:
        return np.empty(0), f"unreadable: {error}"
    fits = array.shape == target.shape and array.dtype == target.dtype
    return array, "" if fits else f"{_form(array)} given, {_form(target)} expected"


class ModuleList(Module):
    """Modules by position: ``self.layers = nn.ModuleList([a, b])`` names them ``layers.0`` and ``layers.1``."""

    def __init__(self, modules: Iterable[Module] = ()) -> None:
        self._items: list[Module]
        vars(self)["_items"] = []
        for module in modules:
            self.append(module)

    def _members(self) -> dict[str, Any]:
        return vars(self) | {str(i): module for i, module in enumerate(self._items)}

    def append(self, module: Module) -> None:
        """Add a module at the end."""
        self.insert(len(self._items), module)

    def insert(self, index: int, module: Module) -> None:
        """Add a module before position `index`; those behind it move, and so do their names."""
        self._items.insert(index, _module(module, type(self).__name__))

    def extend(self, modules: Iterable[Module]) -> None:
        """Add modules at the end."""
        for module in modules:
            self.append(module)

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return self._items[index]

    def __setitem__(self, index: int, module: Module) -> None:
        self._items[index] = _module(module, type(self).__name__)

    def __delitem__(self, index: int | slice) -> None:
        del self._items[index]


class ModuleDict(Module):
    """Modules by name: ``self.heads = nn.ModuleDict({"up": a})`` names it ``heads.up``."""

    def __init__(self, modules: Mapping[str, Module] | None = None) -> None:
        self._items: dict[str, Module] = {}
        for name, module in (modules or {}).items():
            self[name] = module

    def _members(self) -> dict[str, Any]:
        return vars(self) | self._items

    def __getitem__(self, name: str) -> Any:
        return self._items[name]

    def __setitem__(self, name: str, module: Module) -> None:
        self._items[name] = _module(module, "ModuleDict")

    def __delitem__(self, name: str) -> None:
        del self._items[name]

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def keys(self) -> Iterable[str]:
        """The names."""
        return self._items.keys()

    def values(self) -> Iterable[Any]:
        """The modules."""
        return self._items.values()

    def items(self) -> Iterable[tuple[str, Any]]:
        """Names and modules."""
        return self._items.items()


class Sequential(ModuleList):
    """Modules one after the other: ``nn.Sequential(a, b)(x)`` is ``b(a(x))``."""

    def __init__(self, *modules: Module) -> None:
        super().__init__(modules)

    def forward(self, x: Any) -> Any:
        for module in self._items:
            x = module(x)
        return x


def functional_call(module: Module, parameters: Mapping[str, Any], *args: Any, **options: Any) -> Any:
    """``module(*args, **options)`` with other tensors in the place of parameters or buffers.

    It makes a module a function of its parameters, for `tt.grad`, `tt.jvp`, `tt.hessian` and their like::

        tt.grad(lambda w: loss(nn.functional_call(model, {"head.weight": w}, x)))(w)

    Parameters
    ----------
    module : Module
        As before once the call is done.
    parameters : mapping of str to Tensor or array
        By name, of the parameters' own shapes. A shared parameter is replaced under all of its names.

    Raises
    ------
    InputError
        If the module has no parameter or buffer of a name.
    ShapeError
        If a shape differs.
    """
    entries = dict(module._entries(_Kept))  # pyright: ignore[reportPrivateUsage]
    others: dict[int, Tensor] = {}
    for name, value in parameters.items():
        if name not in entries:
            raise InputError(
                f"functional_call: {type(module).__name__} has no parameter {name!r}.",
                f"its names are {', '.join(entries)}.",
            )
        other = value if isinstance(value, Tensor) else Tensor(value)
        if other.shape != entries[name].shape:
            raise ShapeError(
                f"functional_call: {name} has shape {other.shape}, the module's has {entries[name].shape}.",
                "pass tensors of the parameters' own shapes.",
            )
        others[id(entries[name])] = other
    members = [(vars(m), key, kept) for m in module.modules() for key, kept in vars(m).items()]
    with standing_in([(where, key, others[id(kept)]) for where, key, kept in members if id(kept) in others]):
        return module(*args, **options)


@contextmanager
def evaluating(module: Any) -> Generator[None]:
    """Inside, a module and those in it are in eval mode, and nothing is recorded; a plain function has no mode."""
    modes = [(m, m.training) for m in module.modules()] if isinstance(module, Module) else []
    for inner, _ in modes:
        inner.training = False
    try:
        with no_grad():
            yield
    finally:
        for inner, mode in modes:
            inner.training = mode


def _module(value: Any, what: str) -> Module:
    if not isinstance(value, Module):
        raise DTypeError(f"{what}: a {type(value).__name__} is not a Module.", "pass nn.Module instances.")
    return value
