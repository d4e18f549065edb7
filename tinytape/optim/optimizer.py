"""`Optimizer`: what all optimisers share, and that is nearly everything.

An optimiser says which arrays it keeps beside a parameter (`slots`) and how a block of numbers is updated (`update`).
Groups of parameters, clipping, weight decay, names, saving and loading are here.

Arrays are updated in place: by compiled kernels where these pay (`fused`), otherwise in blocks that stay in the
processor's cache, so that the dozen NumPy passes of an update cost about one trip through memory. Both give the same
numbers. Nothing of it is recorded on a tape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ..engine.errors import InputError, TapeError, TinytapeError
from ..engine.tape import no_grad
from ..engine.tensor import Tensor
from ..engine.tree import Array
from . import fused
from .clip import measure
from .inputs import named, within
from .saved import differences

Group = dict[str, Any]

__all__ = ["Optimizer"]

BLOCK = 1 << 14  # numbers: six arrays of float32 then take 384 kB, which a second-level cache holds


class Job(NamedTuple):
    """The update of one parameter; the arrays are flat, and `w` and the slots are written."""

    w: Array
    g: Array
    slots: dict[str, Array]
    prepare: tuple[float, float, float]  # bring g into [-first, first], times the second, plus the third times w
    options: Group
    step: int


class Optimizer:
    """Base of the optimisers.

    Parameters
    ----------
    params : Module, iterable of Tensor, iterable of (name, Tensor), dict of Tensor, or list of dict
        What to optimise. Given a Module or names, the saved state is keyed by name, otherwise by position. A list
        of dicts makes groups; each has "params" and may set options of its own, as in
        ``[{"params": encoder, "lr": 1e-4}, {"params": decoder}]``. A name that an earlier group has taken gets the
        group's number in front.
    defaults : dict
        Every option, with its value for groups that do not set it.
    clip_norm : float, optional
        In `step`, scale the gradients so that their norm over all parameters of all groups is at most this.
    clip_value : float, optional
        In `step`, bring every entry of the gradients into [-clip_value, clip_value]. At most one of the two.

    Attributes
    ----------
    param_groups : list of dict
        "params" (a list of Tensors) and the options, which may be changed between steps.
    state : dict of Tensor to dict
        "step", the number of updates, and the slots. Filled at a parameter's first update.

    Raises
    ------
    InputError
        If there are no parameters, one is given twice, or an option is unknown or out of its range.
    DTypeError
        If the parameters are not Tensors in an ordered collection.
    TapeError
        If a parameter is the recorded result of an op.
    """

    decoupled: ClassVar[bool] = False
    """Whether `update` does the weight decay, instead of finding it in the gradient."""

    kernel: ClassVar[tuple[str, ...]] = ()
    """The kernel that does what `update` does, and its slots in order; empty if there is none."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "kernel" not in vars(cls) and {"update", "numbers"} & set(vars(cls)):
            cls.kernel = ()  # its parent's does something else

    def __init__(
        self, params: Any, defaults: Group, clip_norm: float | None = None, clip_value: float | None = None
    ) -> None:
        what = type(self).__name__
        if clip_norm is not None and clip_value is not None:
            raise InputError(
                f"{what}: clip_norm is {clip_norm} and clip_value is {clip_value}; at most one of the two.",
                "use clip_norm, which keeps the gradient's direction.",
            )
        self.defaults = defaults
        self.clip_norm = None if clip_norm is None else within(what, "clip_norm", clip_norm, 0.0, ends="(]")
        self.clip_value = None if clip_value is None else within(what, "clip_value", clip_value, 0.0, ends="(]")
        self.param_groups: list[Group] = []
        self.state: dict[Tensor, dict[str, Any]] = {}
        self._names: dict[Tensor, str] = {}
        self._scratch: dict[Any, Array] = {}
        self.check(defaults)
        groups: Any = params if type(params) in (list, tuple) else ()
        if not any(isinstance(group, dict) for group in groups):
            groups = [{"params": named(params, what)}]
        for group in groups:
            self.add_param_group(group)

    def add_param_group(self, group: Group) -> None:
        """Add parameters with options of their own. Errors as for the class; nothing is changed then."""
        what = f"{type(self).__name__}: group {len(self.param_groups)}"
        if not isinstance(group, dict) or "params" not in group:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(f"{what} is not a dict with 'params': {group!r:.60}", "pass {'params': ..., 'lr': ...}.")
        if unknown := sorted(set(group) - {"params", *self.defaults}):
            raise InputError(
                f"{what} has unknown options: {', '.join(unknown)}.", f"there are {', '.join(self.defaults)}."
            )
        options = {**self.defaults, **group}
        del options["params"]
        self.check(options)
        given = group["params"]
        pairs = named([given] if isinstance(given, Tensor) else given, what)
        if not pairs:
            raise InputError(f"{what} has 0 parameters; it needs 1 or more.", "is the iterator used up? pass a list.")
        counted = all(name == str(i) for i, (name, _) in enumerate(pairs))
        names, taken = dict(self._names), set(self._names.values())
        for name, p in pairs:
            if not p.is_leaf:
                raise TapeError(
                    f"{what}: parameter {name} is the result of {p.node!r}, not a leaf.",
                    "optimise what it was computed from, or x.detach() with requires_grad = True.",
                )
            if p in names:
                raise InputError(
                    f"{what}: parameter {name} is the same Tensor as parameter {names[p]}.",
                    "give each once: it would be updated twice.",
                )
            name = str(len(names)) if counted else name
            while name in taken:
                name = f"{len(self.param_groups)}.{name}"
            names[p] = name
            taken.add(name)
        self.param_groups.append({"params": [p for _, p in pairs], **options})
        self._names = names

    # ---- what each optimiser fills in -------------------------------------------------------------------------------

    def check(self, options: Group) -> None:
        """Refuse options that are out of range."""
        raise NotImplementedError

    def slots(self, options: Group) -> tuple[str, ...]:
        """The arrays that these options need beside a parameter."""
        raise NotImplementedError

    def start(self, slot: str, options: Group) -> float:
        """The value that fills a slot before a parameter's first update."""
        return 0.0

    def numbers(self, options: Group, step: int) -> tuple[float, ...]:
        """What `update` and its kernel compute with, beside arrays: made from the options once for all entries."""
        return ()

    def update(self, w: Array, g: Array, s: dict[str, Array], t: Array, options: Group, step: int) -> None:
        """Update one block: four flat arrays of one length and dtype.

        Parameters
        ----------
        w : array
            The parameter, to be written.
        g : array
            The gradient after clipping and weight decay. Read only.
        s : dict of array
            The slots, to be written.
        t : array
            Scratch.
        options : dict
            The group's.
        step : int
            Which update of this parameter it is, from 1.
        """
        raise NotImplementedError

    # ---- what users call --------------------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, or fill them with zeros. A parameter without a gradient is skipped by `step`."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad = None if set_to_none else np.zeros(p.shape, p.dtype)

    def step(self) -> float | None:
        """Update every parameter that has a gradient.

        The gradients are clipped, then weight decay is added to them. Both happen on a copy: ``.grad`` stays what
        ``backward`` made it.

        Returns
        -------
        float or None
            The norm of all gradients together before clipping; None if the optimiser does not clip.

        Raises
        ------
        InputError
            If gradients to be clipped have a NaN, or their norm is to be clipped and infinite. They are named;
            parameters, state and step counts are as before.
        """
        found = [(p, p.grad.raw, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm, scale = None, 1.0
        if self.clip_norm is not None or self.clip_value is not None:
            leaves = [(self._names[p], p, g) for p, g, _ in found]
            norm, scale = measure(f"{type(self).__name__}.step", leaves, self.clip_norm, clip_value=self.clip_value)
        for p, _, group in found:
            state = self.state.setdefault(p, {"step": 0})
            for slot in self.slots(group):
                if slot not in state:
                    state[slot] = np.full(p.shape, self.start(slot, group), p.dtype)
                elif state[slot].dtype != p.dtype:  # the module was cast since
                    state[slot] = state[slot].astype(p.dtype)
        with no_grad():
            self._update([(p.writable("step"), p, g, group) for p, g, group in found], scale)
        return norm

    def _update(self, found: list[tuple[Array, Tensor, Array, Group]], scale: float) -> None:
        jobs = [self._job(array, p, g, group, scale) for array, p, g, group in found]
        kernel = fused.find(self.kernel, [job.w for job in jobs])
        if kernel is None:
            for job in jobs:
                self._update_in_blocks(job)
        else:
            self._update_fused(kernel, jobs)
        for job, (array, *_) in zip(jobs, found, strict=True):
            if not array.flags.c_contiguous:  # then the job has a copy
                array[...] = job.w.reshape(array.shape)

    def _job(self, array: Array, p: Tensor, gradient: Array, options: Group, scale: float) -> Job:
        state = self.state[p]
        state["step"] += 1
        bound = math.inf if self.clip_value is None else self.clip_value
        factor = -scale if options["maximize"] else scale
        decay = 0.0 if self.decoupled else float(options["weight_decay"])
        slots = {slot: state[slot].reshape(-1) for slot in self.slots(options)}
        return Job(array.reshape(-1), gradient.reshape(-1), slots, (bound, factor, decay), options, state["step"])

    def _update_fused(self, kernel: Any, jobs: list[Job]) -> None:
        arrays: list[tuple[Array, ...]] = []
        made: dict[Any, Array] = {}  # parameters of one group are mostly at the same step
        for job in jobs:
            key = (id(job.options), job.step, job.w.dtype)
            if key not in made:
                made[key] = np.array((*job.prepare, *self.numbers(job.options, job.step)), job.w.dtype)
            slots = [job.slots.get(slot, job.w[:0]) for slot in self.kernel[1:]]
            arrays.append((job.w, job.g, *slots, made[key]))
        fused.run(kernel, arrays)

    def _update_in_blocks(self, job: Job) -> None:
        bound, factor, decay = job.prepare
        if job.w.dtype not in self._scratch:
            self._scratch[job.w.dtype] = np.empty((2, BLOCK), job.w.dtype)
        for at in range(0, job.w.size, BLOCK):
            block = slice(at, at + BLOCK)
            w, g = job.w[block], job.g[block]
            prepared, t = self._scratch[w.dtype][:, : w.size]
            if bound != math.inf:
                g = np.clip(g, -bound, bound, out=prepared)
            if factor != 1.0:
                g = np.multiply(g, factor, out=prepared)
            if decay:
                g = np.add(g, np.multiply(w, decay, out=t), out=prepared)
            self.update(w, g, {slot: x[block] for slot, x in job.slots.items()}, t, job.options, job.step)

    # ---- saving and loading -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What it takes to go on bit for bit: numbers, names, and copies of the arrays.

        Returns
        -------
        dict
            "state", by parameter name; "param_groups", the options with names for "params"; "clip_norm";
            "clip_value".
        """
        state = {
            self._names[p]: {k: v if k == "step" else v.copy() for k, v in entry.items()}
            for p, entry in self.state.items()
        }
        groups = [self._with_names(group) for group in self.param_groups]
        return {"state": state, "param_groups": groups, "clip_norm": self.clip_norm, "clip_value": self.clip_value}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, here or in another process. Arrays are copied.

        Raises
        ------
        InputError
            If it does not fit this optimiser and its parameters, by name, shape and dtype. Every mismatch is listed,
            and nothing is changed.
        """
        what = f"{type(self).__name__}.load_state_dict"
        keys = ("state", "param_groups", "clip_norm", "clip_value")
        found: Any = dict.fromkeys(state_dict) if hasattr(state_dict, "keys") else state_dict
        wrong = differences(found, dict.fromkeys(keys), "state_dict")
        if not wrong:
            saved_state, saved_groups, *bounds = (state_dict[key] for key in keys)
            groups = self._read_groups(saved_groups, wrong)
            for name, bound in zip(keys[2:], bounds, strict=True):
                if bound is not None:
                    wrong += _refused(name, within, what, name, bound, 0.0, ends="(]")
            state = self._read_state(saved_state, groups, wrong)
            if not wrong:
                self.param_groups, self.state = groups, state
                self.clip_norm, self.clip_value = bounds
                return
        rows = "".join(f"\n  - {row}" for row in wrong)
        raise InputError(
            f"{what}: this state does not fit (mismatches: {len(wrong)}); nothing was changed.{rows}",
            "load it into the same kind of optimiser, made with the same groups of the same parameters.",
        )

    def _read_groups(self, saved: Any, wrong: list[str]) -> list[Group]:
        """The groups with the saved options, or, if they do not fit, as they are."""
        unlike = differences(saved, [self._with_names(group) for group in self.param_groups], "param_groups")
        if unlike:
            wrong += unlike
            return self.param_groups
        groups: list[Group] = []
        for i, (mine, theirs) in enumerate(zip(self.param_groups, saved, strict=True)):
            options = {k: tuple(v) if k == "betas" else v for k, v in theirs.items()}
            wrong += _refused(f"param_groups/{i}", self.check, options)
            groups.append(options | {"params": mine["params"]})
        return groups

    def _read_state(self, saved: Any, groups: list[Group], wrong: list[str]) -> dict[Tensor, dict[str, Any]]:
        """The saved state by Tensor. Which slots it must have depends on the saved options."""
        present: Any = saved if hasattr(saved, "keys") else {}
        wanted: dict[str, Any] = {}
        for group in groups:
            for p in group["params"]:
                if self._names[p] in present:  # the others have not been updated yet
                    empty = np.broadcast_to(np.zeros((), p.dtype), p.shape)
                    wanted[self._names[p]] = {"step": 0, **dict.fromkeys(self.slots(group), empty)}
        wrong += differences(saved, wanted, "state")
        return {
            p: {k: int(v) if k == "step" else np.array(v, order="C") for k, v in present[name].items()}
            for p, name in self._names.items()
            if name in present and not wrong
        }

    def _with_names(self, group: Group) -> Group:
        """A group as it is saved: names, numbers and bools of Python's own."""
        plain = {key: _plain(group[key]) for key in self.defaults}
        return plain | {"params": [self._names[p] for p in group["params"]]}


def _plain(value: Any) -> Any:
    if hasattr(value, "__len__"):
        return [float(x) for x in value]
    return value if isinstance(value, bool) else float(value)


def _refused(where: str, check: Any, *args: Any, **options: Any) -> list[str]:
    """The complaint of a check, if it has one."""
    try:
        check(*args, **options)
    except TinytapeError as error:
        return [f"{where}: {error.what}"]
    return []
