"""A character language model: train an LSTM on a text, set it beside n-grams, and let it write.

python -m models.char_lm                                  train on the help texts that come with Python
python -m models.char_lm --text FILE --out FILE           train on a text of your own
python -m models.char_lm --resume FILE                    go on, bit for bit as if never stopped
python -m models.char_lm sample FILE --prompt "The " --temperature 0.7 --seed 1
"""

from __future__ import annotations

import argparse
import hashlib
import math
import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

import tinytape as tt

DEFAULTS = {
    "text": "", "hidden": 256, "embedding": 128, "batch": 32, "window": 32, "steps": 3000, "lr": 6e-3,
    "weight_decay": 0.1, "dropout": 0.1, "clip": 0.3, "validate": 300, "seed": 1,
}  # fmt: skip
OUT = "runs/char_lm.safetensors"
SAVED = {
    "kind", "options", "vocabulary", "text", "step", "model", "optimizer", "state", "generator", "best", "curves",
}  # fmt: skip


class CharLM(tt.nn.Module):
    """Embedding, one LSTM layer, and a linear read-out of the next character's logits."""

    def __init__(self, symbols: int, embedding: int, hidden: int, dropout: float, generator: tt.Generator) -> None:
        super().__init__()
        self.embedding = tt.nn.Embedding(symbols, embedding, generator=generator)
        self.lstm = tt.nn.LSTM(embedding, hidden, generator=generator)
        self.head = tt.nn.Linear(hidden, symbols, generator=generator)
        init = tt.nn.init
        init.xavier_uniform_(self.lstm.weight_ih_l0, generator=generator)
        init.orthogonal_(self.lstm.weight_hh_l0, gates=4, generator=generator)
        for bias in (self.lstm.bias_ih_l0, self.lstm.bias_hh_l0, self.head.bias):
            init.zeros_(bias)
        init.forget_gate_bias_(self.lstm, 1.0)
        self.dropout_in = tt.nn.Dropout(dropout / 2, generator=generator)
        self.dropout_out = tt.nn.Dropout(dropout, generator=generator)

    def forward(self, tokens, state=None):
        """Logits (T, B, symbols) for tokens (T, B), and the state after the last."""
        y, state = self.lstm(self.dropout_in(self.embedding(tokens)), state)
        return self.head(self.dropout_out(y)), state


class Training:
    """Everything that a run consists of, in one place, so that it can be saved and taken up again."""

    def __init__(self, options: dict) -> None:
        self.options = options
        text = tt.data.read_text(options["text"], 16_000) if options["text"] else tt.data.default_text()
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        self.vocabulary = tt.data.Vocabulary.of(text)
        train, held_out, self.removed = tt.data.split_held_out(text)
        self.train, self.held_out = self.vocabulary.encode(train), self.vocabulary.encode(held_out)
        tt.data.streams(self.train, options["batch"])  # a text too short for that is refused now, not in the first step
        self.epoch, self.windows = -1, []
        self.generator = tt.Generator(options["seed"])
        self.model = build(options, self.vocabulary, self.generator)
        matrices = {name: p for name, p in self.model.named_parameters() if p.ndim > 1}
        biases = {name: p for name, p in self.model.named_parameters() if p.ndim == 1}
        self.optimizer = tt.optim.AdamW(
            [{"params": matrices, "weight_decay": options["weight_decay"]}, {"params": biases, "weight_decay": 0.0}],
            lr=options["lr"], betas=(0.5, 0.99), clip_norm=options["clip"],
        )  # fmt: skip
        self.schedule = tt.optim.schedule.cosine(options["lr"], 0.0, options["steps"], warmup=options["steps"] // 50)
        self.step, self.state = 0, None
        self.best: dict = {"bits": math.inf, "step": 0, "model": self.model.state_dict()}
        self.curves: dict = {"train": [], "held_out": []}

    def next_window(self) -> tuple[np.ndarray, np.ndarray, bool]:
        """Inputs and targets (T, B), and whether the streams start anew with them.

        Every pass starts from another place in the text, so that windows and streams are cut elsewhere.
        """
        per_pass = math.ceil(((len(self.train) - 1) // self.options["batch"]) / self.options["window"])
        epoch, at = divmod(self.step, per_pass)
        if epoch != self.epoch:
            start = tt.Generator(self.options["seed"] + epoch).integers(0, len(self.train))
            columns = tt.data.streams(np.roll(self.train, -start), self.options["batch"])
            self.epoch, self.windows = epoch, list(tt.data.windows(columns, self.options["window"]))
        return *self.windows[at], at == 0

    def one_step(self) -> tuple[float, float]:
        """Train on the next window; return the loss in nats a character and the gradient's norm."""
        inputs, targets, anew = self.next_window()
        logits, state = self.model(inputs, None if anew else self.state)
        loss = tt.nn.functional.cross_entropy(logits, targets)
        self.optimizer.zero_grad()
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule(self.step)
        norm = self.optimizer.step()
        self.state = [s.detach() for s in state]  # carried to the next window; gradients stop here
        self.step += 1
        return loss.item(), norm

    def validate(self) -> float:
        bits = bits_per_character(self.model, self.held_out, 32)
        self.curves["held_out"].append([self.step, bits])
        if bits < self.best["bits"]:
            self.best = {"bits": bits, "step": self.step, "model": self.model.state_dict()}
        return bits

    def tree(self) -> dict:
        return {
            "kind": "char_lm", "options": self.options, "vocabulary": self.vocabulary.symbols, "text": self.digest,
            "step": self.step, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "state": [s.numpy() for s in self.state or []], "generator": self.generator.state(),
            "best": self.best, "curves": self.curves,
        }  # fmt: skip

    def load(self, tree: dict, path: str) -> None:
        if tree["vocabulary"] != self.vocabulary.symbols or tree["text"] != self.digest:
            raise tt.InputError(
                f"--resume: {path} was trained on another text ({len(tree['vocabulary'])} symbols; "
                f"this one has {len(self.vocabulary)}).",
                "pass the text that it was trained on, as --text FILE.",
            )
        self.model.load_state_dict(tree["model"])
        self.optimizer.load_state_dict(tree["optimizer"])
        self.generator.set_state(tree["generator"])
        self.state = [tt.tensor(s) for s in tree["state"]] or None
        self.step, self.best, self.curves = tree["step"], tree["best"], tree["curves"]


def build(options: dict, vocabulary: tt.data.Vocabulary, generator: tt.Generator) -> CharLM:
    return CharLM(len(vocabulary), options["embedding"], options["hidden"], options["dropout"], generator)


def bits_per_character(model: CharLM, tokens: np.ndarray, batch: int = 1) -> float:
    """Score a text read as `batch` streams, the state carried along. Draws no random numbers."""
    model.eval()
    total, count, state = 0.0, 0, None
    columns = tt.data.streams(tokens, min(batch, len(tokens) - 1))
    with tt.no_grad():
        for inputs, targets in tt.data.windows(columns, 128):
            logits, state = model(inputs, state)
            total += tt.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
            count += targets.size
    model.train()
    return total / count / math.log(2)


def run(training: Training, path: str) -> bool:
    """Train to the end, or until Ctrl-C; save either way. True if it came to the end."""
    options, stopped = training.options, []
    stops = (signal.SIGINT, signal.SIGTERM)  # they are only noted, also the second time: the step and the saving end
    before = [signal.signal(number, lambda *_: stopped.append(True)) for number in stops]
    pause = 0.5 if sys.stderr.isatty() else 10  # a log file is not flooded
    shown = time.perf_counter()
    try:
        with tqdm(total=options["steps"], initial=training.step, unit="step", mininterval=pause) as bar:
            while training.step < options["steps"] and not stopped:
                loss, norm = training.one_step()
                bits = loss / math.log(2)
                if training.step % 25 == 0:
                    now = time.perf_counter()
                    rate, shown = 25 * options["batch"] * options["window"] / (now - shown), now
                    training.curves["train"].append([training.step, bits])
                    told = f"loss {loss:.3f}, {bits:.3f} bits/char, |g| {norm:.2f}, {rate:,.0f} chars/s"
                    bar.set_postfix_str(told, refresh=False)
                bar.update()
                if training.step % options["validate"] == 0 or training.step == options["steps"]:
                    bits, best = training.validate(), training.best["bits"]
                    tt.io.save_state(path, training.tree())
                    bar.write(f"step {training.step}: held out {bits:.3f} bits a character (best {best:.3f})")
        tt.io.save_state(path, training.tree())
    finally:
        for number, handler in zip(stops, before, strict=True):
            signal.signal(number, handler)
    return not stopped


def table(training: Training) -> str:
    """The model beside baselines, all scored on the held-out text read as one stream."""
    training.model.load_state_dict(training.best["model"])
    size = len(training.vocabulary)
    rows = [("uniform", math.log2(size), "")]
    for result in tt.data.best_ngrams(training.train, training.held_out, size):
        rows.append((f"{result.order}-gram", result.bits, result.smoothing.name))
    bits = bits_per_character(training.model, training.held_out)
    rows.append((f"LSTM {training.options['hidden']}", bits, f"best of the run, step {training.best['step']}"))
    lines = [f"{name:10} {value:6.3f}  {note}" for name, value, note in rows]
    head = f"{'model':10} bits/character on {len(training.held_out):,} held-out characters"
    return "\n".join([head, *lines, f"({training.removed:,} characters that repeat training text were left out)"])


def draw(training: Training, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, label in (("train", "training, one window"), ("held_out", "held out")):
        if training.curves[name]:
            axes.plot(*np.array(training.curves[name]).T, label=label, lw=0.8 if name == "train" else 2)
    axes.set(xlabel="step", ylabel="bits a character", title="LSTM character model")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def sample(model: CharLM, vocabulary, prompt: str, length: int, temperature: float, generator: tt.Generator) -> str:
    """Continue `prompt`. A temperature below 1 writes more likely text, above 1 more surprising text."""
    start = "\n" if "\n" in vocabulary.symbols else vocabulary.symbols[0]
    tokens = vocabulary.encode(prompt or start).tolist()
    model.eval()
    with tt.no_grad():
        logits, state = model(np.array(tokens)[:, None])
        for _ in range(length):
            chances = tt.softmax(logits[-1, 0].astype("float64") / temperature)
            edges = np.cumsum(chances.numpy())
            tokens.append(int(np.searchsorted(edges, generator.uniform() * edges[-1], side="right")))
            logits, state = model(np.array(tokens[-1:])[:, None], state)
    return vocabulary.decode(tokens[0 if prompt else 1 :])


def number(kind: type, low: float):
    """What argparse reads an option with: a number of at least `low`."""

    def read(text: str):
        if not (value := kind(text)) >= low:
            raise argparse.ArgumentTypeError(f"{text} given, at least {low} is needed")
        return value

    read.__name__ = kind.__name__  # for argparse's message where `kind` itself refuses the text
    return read


TEMPERATURE = {"type": number(float, 1e-6), "default": 0.7, "help": "of the sample: lower is more careful; default 0.7"}


def train_command(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m models.char_lm", usage="%(prog)s [options]", description="Train a character language model."
    )
    parser.add_argument("--resume", metavar="FILE", help="go on with a saved run")
    parser.add_argument("--out", metavar="FILE", help=f"default {OUT}, or the file that is resumed")
    parser.add_argument("--temperature", **TEMPERATURE)
    parser.add_argument("--text", metavar="FILE", help="a text in UTF-8; default: the help texts of Python itself")
    for name, value in DEFAULTS.items():
        if name != "text":
            kind = number(type(value), 0 if name == "seed" or isinstance(value, float) else 1)
            parser.add_argument("--" + name.replace("_", "-"), type=kind, metavar="N", help=f"default {value}")
    given = vars(parser.parse_args(arguments))
    changed = {name: given[name] for name in DEFAULTS if given[name] is not None}
    if given["resume"] is not None:
        if set(changed) - {"text"}:
            raise tt.InputError(
                f"--resume: {', '.join(sorted(set(changed) - {'text'}))} cannot be changed on the way.",
                "leave the options out: the file holds them.",
            )
        saved = load(given["resume"])
        training = Training(saved["options"] | changed)
        training.load(saved, given["resume"])
    else:
        training = Training(DEFAULTS | changed)
    path = (given["resume"] or OUT) if given["out"] is None else given["out"]
    check_writable(path)
    parameters = sum(p.size for p in training.model.parameters())
    print(
        f"{len(training.train):,} characters to train on, {len(training.held_out):,} held out, "
        f"{len(training.vocabulary)} symbols; {parameters:,} parameters"
    )
    if not run(training, path):
        raise SystemExit(
            f"stopped at step {training.step}; saved. Go on with: python -m models.char_lm --resume {shlex.quote(path)}"
        )
    print(f"saved: {path}\n\n{table(training)}")
    print(f"\nA sample at temperature {given['temperature']}:\n")
    print(sample(training.model, training.vocabulary, "", 400, given["temperature"], tt.Generator(0)))
    picture = Path(path).with_suffix(".png")
    draw(training, picture)
    print(f"\ncurves: {picture}")


def check_writable(path: str) -> None:
    """Refuse before training what could not be written after it, or would overwrite a text or a picture."""
    place = Path(path)
    if place.suffix != ".safetensors" or place.is_dir():
        raise tt.InputError(f"--out: {path} is not the name of a .safetensors file.", f"the default is {OUT}.")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=place.parent).close()
    except OSError as error:
        raise tt.InputError(
            f"--out: nothing can be written in {place.parent} ({error.strerror}).", "give another path."
        ) from None


def sample_command(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m models.char_lm sample", usage="%(prog)s FILE [options]", description="Let a trained model write."
    )
    parser.add_argument("file", help="what training saved")
    parser.add_argument("--prompt", default="", help="what it goes on from")
    parser.add_argument("--length", type=number(int, 0), default=500, help="characters to write, default %(default)s")
    parser.add_argument("--temperature", **TEMPERATURE)
    parser.add_argument("--seed", type=number(int, 0), default=0, help="default %(default)s")
    given = parser.parse_args(arguments)
    saved = load(given.file)
    vocabulary = tt.data.Vocabulary(saved["vocabulary"])
    model = build(saved["options"], vocabulary, tt.Generator(0))
    model.load_state_dict(
        saved["best"]["model"] if saved["best"]["step"] else saved["model"]
    )  # stopped early: none yet
    print(sample(model, vocabulary, given.prompt, given.length, given.temperature, tt.Generator(given.seed)))


def load(path: str) -> dict:
    saved = tt.io.load_state(path)
    if saved.get("kind") != "char_lm" or not saved.keys() >= SAVED:
        raise tt.InputError(f"{path} holds no character language model.", "pass a file that models.char_lm saved.")
    return saved | {"options": DEFAULTS | saved["options"]}


def main(arguments: list[str]) -> None:
    try:
        sample_command(arguments[1:]) if arguments[:1] == ["sample"] else train_command(arguments)
    except (tt.TinytapeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:  # outside of the training itself, which saves
        raise SystemExit("stopped.") from None


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack some of the text's characters
    main(sys.argv[1:])
