"""What the two language models share: the network, what training leaves behind, and writing."""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

import tinytape as tt
from models.command import figure, number

F = tt.nn.functional
Curve = tuple[np.ndarray, np.ndarray]  # steps and values


class LanguageModel(tt.nn.Module):
    """Embedding, LSTM layers, and a linear read-out of the next symbol's logits.

    Dropout is on what goes up, from layer to layer, never on what goes on in time (Zaremba, Sutskever & Vinyals 2014);
    ``per="sequence"`` draws it once for a window (Gal & Ghahramani 2016). `weight_drop` drops weights of the
    recurrence, once for a window (Merity, Keskar & Socher 2018). `tied`: one matrix embeds and reads out.
    """

    def __init__(
        self,
        symbols: int,
        embedding: int,
        hidden: int,
        layers: int = 1,
        dropout: float = 0.0,
        dropout_in: float | None = None,
        weight_drop: float = 0.0,
        per: str = "element",
        tied: bool = False,
        generator: tt.Generator | None = None,
    ) -> None:
        if tied and embedding != hidden:
            raise tt.InputError(f"tied: embedding is {embedding}, hidden is {hidden}.", "tied weights need one size.")
        self.embedding = tt.nn.Embedding(symbols, embedding, generator=generator)
        sizes = [embedding] + [hidden] * (layers - 1)
        self.layers = tt.nn.ModuleList(tt.nn.LSTM(size, hidden, generator=generator) for size in sizes)
        self.head = tt.nn.Linear(hidden, symbols, generator=generator)
        if tied:
            self.head.weight = self.embedding.weight
        first = dropout if dropout_in is None else dropout_in
        drops = (tt.nn.Dropout(p, per=per, generator=generator) for p in [first] + [dropout] * layers)
        self.drops, self.weight_drop, self.generator = tt.nn.ModuleList(drops), weight_drop, generator

    def forward(self, tokens: Any, state: Any = None) -> tuple[Any, Any]:
        """Logits (T, B, symbols) for tokens (T, B), and for each layer the state after the last."""
        y, after = self.embedding(tokens), []
        for lstm, drop, before in zip(self.layers, self.drops, state or [None] * len(self.layers), strict=False):
            y, last = self._through(lstm, drop(y), before)
            after.append(last)
        return self.head(self.drops[-1](y)), after

    def _through(self, lstm: tt.nn.LSTM, x: Any, state: Any) -> tuple[Any, Any]:
        if not (self.training and self.weight_drop):
            return lstm(x, state)
        weight = F.dropout(lstm.weight_hh_l0, self.weight_drop, generator=self.generator)
        return tt.nn.functional_call(lstm, {"weight_hh_l0": weight}, x, state)


def detached(state: Any) -> Any:
    """The state of a `LanguageModel` as constants, to be carried over to the next window."""
    return [tuple(part.detach() for part in layer) for layer in state]


def trained(folder: str, kind: str) -> dict[str, Any]:
    """What a run saved, if it was of that kind."""
    saved = tt.train.load(folder)
    if saved["about"].get("kind") != kind:
        raise tt.InputError(f"{folder!r} holds no run of models.{kind}.", f"give a folder that models.{kind} made.")
    return saved


def draw_curves(path: Path, training: Curve, held_out: Curve, measure: str, scale: str = "linear") -> None:
    """Draw both against the step."""
    made, axes = figure(1, 1, (7, 4))
    axes.plot(*training, lw=0.8, label="training, 25 windows")
    axes.plot(*held_out, "o-", ms=3, lw=2, label="held out")
    axes.set(xlabel="step", ylabel=measure, yscale=scale, title="LSTM language model")
    axes.grid(alpha=0.3)
    axes.legend()
    made.savefig(path, dpi=100)


def sampling(parser: argparse.ArgumentParser) -> None:
    """Add the options of `written`."""
    parser.add_argument("--temperature", type=number(float, 0), default=0.7, help="0 is greedy; default %(default)s")
    parser.add_argument("--top-k", type=number(int, 1), metavar="K", help="draw from the K likeliest only")
    parser.add_argument("--top-p", type=number(float, 1e-6, 1), metavar="P", help="from the likeliest of chance P")
    parser.add_argument("--seed", type=number(int, 0), default=1, help="of all that is drawn; default %(default)s")


def written(model: LanguageModel, prompt: np.ndarray, length: int, options: argparse.Namespace) -> list[int]:
    """What a model writes after a prompt."""
    generator = tt.Generator(options.seed)
    tokens = tt.generate.sample(model, prompt, options.temperature, options.top_k, options.top_p, generator)
    return list(islice(tokens, length))
