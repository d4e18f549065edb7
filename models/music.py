"""Which keys sound next? A small GRU and LSTM on chorales, beside what needs no network.

python -m models.music --data JSB_Chorales.mat     the chorales of Bach, as in the literature
python -m models.music                             without a file: four-part pieces made up by the program
python -m models.music --networks gru --hidden 100 --out runs/large
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import tinytape as tt
from models import command
from models.chorales import KEYS, PARTS, Piece, baselines, invented, read

F = tt.nn.functional
HIDDEN = {"gru": 46, "lstm": 36}  # some 20,000 parameters each


# ---- the network ----------------------------------------------------------------------------------------------------


class Music(tt.nn.Module):
    """Logits of the keys of the next frame: read from the state, and from whether the key sounds now.

    While training, keys, outputs and the recurrent weights (Merity, Keskar & Socher 2018) are dropped out.
    """

    def __init__(self, network: str, hidden: int, options: argparse.Namespace, generator: tt.Generator) -> None:
        kind = {"gru": tt.nn.GRU, "lstm": tt.nn.LSTM}[network]
        self.layer = kind(KEYS, hidden, generator=generator)
        self.head = tt.nn.Linear(hidden, KEYS, generator=generator)
        self.hold = tt.nn.Parameter(np.zeros(KEYS, np.float32))
        self.dropout_in = tt.nn.Dropout(options.dropout_in, generator=generator)
        self.dropout = tt.nn.Dropout(options.dropout, generator=generator)
        self.weight_drop = tt.nn.Dropout(options.weight_drop, generator=generator)
        tt.nn.init.orthogonal_(self.layer.weight_hh_l0, gates={"gru": 3, "lstm": 4}[network], generator=generator)
        tt.nn.init.normal_(self.layer.weight_ih_l0, 0.0, 0.7, generator)  # of 88 inputs four are 1: variance about 2

    def forward(self, x: np.ndarray, lengths: np.ndarray) -> tt.Tensor:
        weights = {"weight_hh_l0": self.weight_drop(self.layer.weight_hh_l0)}
        y, _ = tt.nn.functional_call(self.layer, weights, self.dropout_in(x), lengths=lengths)
        return self.head(self.dropout(y)) + self.hold * x


def loss_of(model: Music, pieces: Sequence[Piece], reduction: str = "mean") -> tt.Tensor:
    """Nats of frames 2 to the last: their sum, or a frame."""
    x, lengths = tt.data.pad_sequences(pieces)
    mask = tt.data.length_mask(lengths - 1)
    total = F.binary_cross_entropy_with_logits(model(x[:-1], lengths - 1), x[1:], reduction="sum", mask=mask)
    return total / float(mask.sum()) if reduction == "mean" else total


def score(model: Music, pieces: Sequence[Piece]) -> float:
    with tt.no_grad():
        return loss_of(model, pieces).item()


def train(network: str, data: dict[str, list[Piece]], options: argparse.Namespace, digest: str) -> tuple[Any, dict]:
    """The network with its best weights, and the curve of its validations."""
    generator = tt.Generator(options.seed)
    hidden = options.hidden or HIDDEN[network]
    model = Music(network, hidden, options, generator)
    pieces = data["train"]
    lengths = [len(piece) for piece in pieces]
    updates = options.epochs * -(-len(pieces) // options.batch)
    optimizer = tt.optim.AdamW(
        model, lr=options.lr, betas=(0.9, 0.98), weight_decay=options.weight_decay, clip_norm=options.clip
    )
    schedule = tt.optim.schedule.cosine(options.lr, options.lr / 50, updates, warmup=min(30, updates - 1))
    scheduler = tt.optim.Scheduler(optimizer, schedule)
    about = {name: value for name, value in vars(options).items() if name not in ("data", "networks", "out")}
    about |= {"network": network, "hidden": hidden, "data": digest}
    with tt.train.Run(
        Path(options.out) / network, model, optimizer, scheduler, parts={"generator": generator}, about=about,
        resume=True, patience=options.patience,
    ) as run:  # fmt: skip
        for epoch in run.epochs(options.epochs):
            for chosen in run.batches(tt.data.bucket_batches(lengths, options.batch, generator, pool=4)):
                run.step(loss_of(model, [pieces[i] for i in chosen]))
            if epoch % 5 == 4 or epoch == options.epochs - 1:
                run.validate(lambda: score(model, data["valid"]))
        curve = run.history("valid")
        seconds = run.notes.setdefault("seconds", run.seconds)
        note = {"seconds": seconds, "epoch": run.best.epoch + 1, "curve": curve}
        run.load_best()
    model.eval()
    return model, note


# ---- what is shown --------------------------------------------------------------------------------------------------


def draw(models: dict[str, Music], notes: dict[str, dict], rows: dict, piece: Piece, path: Path) -> None:
    figure, axes = command.figure(1, 1 + len(models), (5 * (1 + len(models)), 4))
    for number, (name, note) in enumerate(notes.items()):
        axes[0].plot(*note["curve"], color=f"C{number}", label=name)
    for (name, row), style in zip(list(rows.items())[:2], (":", "--"), strict=True):
        axes[0].axhline(row["valid"], color="black", ls=style, lw=1, label=name)
    axes[0].set(xlabel="steps", ylabel="nats a frame", title="pieces for choosing")
    axes[0].legend(fontsize=8)
    keys = np.flatnonzero(piece.any(0)) if piece.any() else np.arange(KEYS)
    low, high = max(keys[0] - 3, 0), keys[-1] + 4
    for axis, (name, model) in zip(axes[1:], models.items(), strict=True):
        with tt.no_grad():
            chances = tt.sigmoid(model(piece[:-1, None], np.array([len(piece) - 1]))).numpy()[:, 0]
        axis.imshow(chances.T, origin="lower", aspect="auto", cmap="Greys", extent=(1.5, len(piece) + 0.5, -0.5, 87.5))
        t, key = np.nonzero(piece[1:])
        axis.plot(t + 2, key, "s", color="C3", ms=2)
        axis.set(ylim=(low, high), xlabel="frame", ylabel="key", title=f"{name}: a test piece (red) and its chances")
    figure.savefig(path, dpi=90)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m models.music", description=(__doc__ or "").partition("\n")[0])
    add, number = parser.add_argument, command.number
    add("--data", metavar="FILE", help=".mat or .json; default: pieces made up by the program")
    add("--networks", nargs="+", choices=HIDDEN, default=list(HIDDEN), help="default both")
    add("--hidden", type=number(int, 1), metavar="N", help="units; default 46 for gru, 36 for lstm")
    add("--epochs", type=number(int, 1), default=200, metavar="N", help="at most, default %(default)s")
    add("--patience", type=number(int, 1), default=12, metavar="N", help="validations, every 5 epochs; %(default)s")
    add("--batch", type=number(int, 1), default=8, metavar="N", help="pieces a step, default %(default)s")
    add("--lr", type=number(float, 1e-9), default=1e-2, metavar="N", help="learning rate, default %(default)s")
    add("--dropout-in", type=number(float, 0, 1), default=0.2, metavar="P", help="of the keys, default %(default)s")
    add("--dropout", type=number(float, 0, 1), default=0.1, metavar="P", help="of the outputs, default %(default)s")
    add("--weight-drop", type=number(float, 0, 1), default=0.25, metavar="P", help="recurrent, default %(default)s")
    add("--weight-decay", type=number(float, 0), default=0.05, metavar="N", help="default %(default)s")
    add("--clip", type=number(float, 1e-9), default=1.0, metavar="N", help="norm, default %(default)s")
    add("--seed", type=number(int, 0), default=0, metavar="N", help="default %(default)s")
    add("--out", default="runs/music", metavar="FOLDER", help="default %(default)s")
    return parser.parse_args(arguments)


def program(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    if options.data is None:
        generator = tt.Generator(0)
        data = {part: invented(count, generator) for part, count in zip(PARTS, (200, 50, 50), strict=True)}
    else:
        data = read(options.data)
    digest = hashlib.sha256(b"".join(piece.tobytes() for part in PARTS for piece in data[part])).hexdigest()
    told = ", ".join(f"{len(data[p])} pieces ({sum(map(len, data[p])):,} frames) to {p}" for p in PARTS)
    print(told.replace("to valid", "to choose by"))
    rows, models, notes = baselines(data), {}, {}
    for network in dict.fromkeys(options.networks):
        model, note = train(network, data, options, digest)
        name = f"{network.upper()} {model.layer.hidden_size}"
        models[name], notes[name] = model, note
        rows[name] = {part: score(model, data[part]) for part in PARTS}
    print(f"\n{'nats a frame, frames 2 to the last':36}{'train':>8}{'valid':>8}{'test':>8}")
    for name, row in rows.items():
        note = ""
        if name in notes:
            size = sum(p.size for p in models[name].parameters())
            note = f"   {size:,} parameters, best in epoch {notes[name]['epoch']}, {notes[name]['seconds']:.0f} s"
        print(f"{name:36}" + "".join(f"{row[part]:8.2f}" for part in PARTS) + note)
    if options.data is not None:
        print("published for the chorales of Bach, GRU 46 and LSTM 36: test 8.54 and 8.67 (Chung et al. 2014)")
    picture = Path(options.out) / "music.png"
    draw(models, notes, rows, data["test"][0], picture)
    print(f"\npicture: {picture}")


def main(arguments: Sequence[str]) -> None:
    command.run(program, arguments, again=lambda _: arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
