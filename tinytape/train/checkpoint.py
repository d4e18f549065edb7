"""What a run's files hold: the states of its parts, and what it is about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..engine.errors import DTypeError, InputError
from ..io import flatten_state, load_state, save_state
from ..nn.module import Module
from ..random import Generator, default_generator

__all__ = ["BEST", "LAST", "LOG", "Best", "Parts", "load", "open_folder", "read", "write"]

LAST, BEST, LOG = "last.safetensors", "best.safetensors", "log.jsonl"
KIND = "tinytape.train 1"


@dataclass(frozen=True)
class Best:
    """The best validation of a run."""

    value: float
    count: int
    """Steps that had been taken."""
    epoch: int
    """Epochs that were complete."""


def load(folder: str | PathLike[str], which: Literal["best", "last"] = "best") -> dict[str, Any]:
    """Read the weights of a run, and what it is about.

    Parameters
    ----------
    folder : path
        The folder of a `Run`, or one of the files in it.
    which : {"best", "last"}
        Of a folder, which weights; "last" where nothing was validated yet.

    Returns
    -------
    dict
        "model", a state dict; "about"; "count" and "epoch"; "best", None or a dict of "value", "count" and "epoch".

    Raises
    ------
    InputError
        If there is no run there, or a file is damaged or of another kind.
    """
    place = Path(folder)
    if place.is_dir():
        names = [name for name in ((BEST, LAST) if which == "best" else (LAST,)) if (place / name).exists()]
        if not names:
            raise InputError(f"load: folder {fspath(folder)!r} holds no run.", "give a folder that a run was saved in.")
        place = place / names[0]
    tree = read(place)
    model = tree["model"] if "model" in tree else tree["parts"]["model"]
    return {"model": model, **{name: tree[name] for name in ("about", "count", "epoch", "best")}}


def read(path: Path) -> dict[str, Any]:
    """A file of a run."""
    tree = load_state(path)
    if tree.pop("kind", None) != KIND:
        raise InputError(f"load: {str(path)!r} is not a checkpoint of a run.", "give a run's folder, or a file in it.")
    return tree


def write(path: Path, tree: Mapping[str, Any]) -> None:
    """Write a file of a run, whole or not at all."""
    save_state(path, {"kind": KIND, **tree})


def open_folder(folder: Path, about: Mapping[str, Any], resume: bool) -> dict[str, Any] | None:
    """The checkpoint to go on with; None for a new run, whose folder is made."""
    if not resume and any((folder / name).exists() and (folder / name).stat().st_size for name in (LAST, BEST, LOG)):
        raise InputError(
            f"Run: folder {str(folder)!r} holds a run already.",
            "pass resume=True to go on with it, or give another folder.",
        )
    if (folder / LAST).exists():
        tree = read(folder / LAST)
        _check_about(tree["about"], about, folder)
        return tree
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"Run: folder {str(folder)!r} cannot be made: {error.strerror}.", "give another folder."
        ) from None
    return None


def _check_about(saved: Mapping[str, Any], given: Mapping[str, Any], folder: Path) -> None:
    """Refuse to go on with a run that is about something else."""
    wrong = [name for name in sorted({*saved, *given}) if not _same(saved, given, name)]
    if wrong:
        differences = (f"{name} is {_shown(saved, name)} there, {_shown(given, name)} here" for name in wrong)
        raise InputError(
            f"Run: the run in {str(folder)!r} is about something else: {'; '.join(differences)}.",
            "go on with what it was started with, or give another folder.",
        )


def _same(a: Mapping[str, Any], b: Mapping[str, Any], name: str) -> bool:
    if name not in a or name not in b:
        return False
    arrays, text = flatten_state({name: a[name]})
    others, other = flatten_state({name: b[name]})
    return text == other and all(np.array_equal(array, others[key]) for key, array in arrays.items())


def _shown(about: Mapping[str, Any], name: str) -> str:
    return f"{about[name]!r:.40}" if name in about else "nothing"


class Parts:
    """Everything of a run that has a state, by name.

    Generators are those given, those that the model's modules draw from, and the default one; each once.
    """

    def __init__(self, model: Module, optimizer: Any, scheduler: Any, others: Mapping[str, Any]) -> None:
        self._parts: dict[str, Any] = {"model": model, "optimizer": optimizer}
        if scheduler is not None:
            self._parts["scheduler"] = scheduler
        named = dict(_generators_of(model))
        for name, part in others.items():
            if name in self._parts:
                raise InputError(f"Run: parts has the name {name!r}, which is taken.", "choose another name.")
            if isinstance(part, Generator):
                named[name] = part
            elif all(hasattr(part, method) for method in ("state_dict", "load_state_dict")):
                self._parts[name] = part
            else:
                raise DTypeError(
                    f"Run: parts[{name!r}] is a {type(part).__name__}, which has no state_dict.",
                    "give generators, or what has state_dict and load_state_dict; plain values go into run.notes.",
                )
        named["default"] = default_generator
        once = {id(generator): name for name, generator in reversed(named.items())}
        self._generators = {name: generator for name, generator in named.items() if once[id(generator)] == name}

    def states(self) -> dict[str, Any]:
        """Of all but the generators."""
        return {name: part.state_dict() for name, part in self._parts.items()}

    def load(self, states: Mapping[str, Any]) -> None:
        """Take over what `states` gave."""
        self._check(states, self._parts, "parts")
        for name, part in self._parts.items():
            part.load_state_dict(states[name])

    def generator_states(self) -> dict[str, Any]:
        """Where all generators stand."""
        return {name: generator.state() for name, generator in self._generators.items()}

    def set_generator_states(self, states: Mapping[str, Any]) -> None:
        """Take over what `generator_states` gave."""
        self._check(states, self._generators, "generators")
        for name, generator in self._generators.items():
            generator.set_state(states[name])

    def _check(self, saved: Mapping[str, Any], here: Mapping[str, Any], what: str) -> None:
        if saved.keys() != here.keys():
            raise InputError(
                f"Run: the saved run has the {what} {', '.join(saved)}; here they are {', '.join(here)}.",
                "make the run with the same model and parts as before.",
            )


def _generators_of(model: Module) -> Iterator[tuple[str, Generator]]:
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Generator):
                yield f"model.{path}.{name}" if path else f"model.{name}", value
