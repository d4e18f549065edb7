"""The whole training step of a language model: embedding, two LSTM layers, linear, cross entropy, clipping, optimiser.

The word model has the sizes, clipping and rate of the small model of Zaremba, Sutskever & Vinyals 2014, and as there
the loss is summed over the time steps, and SGD takes the step. The char model is that of `models.char_lm --preset
shakespeare`: Adam, and dropout 0.1 between and above the layers. Words are drawn by the Zipf-Mandelbrot law, so that
rows of the embedding repeat as they do in text. The first steps, which are compared, are without dropout.
"""

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Sequence
from itertools import count, cycle
from pathlib import Path
from typing import Any

import numpy as np

from bench import cells, peers, report, runner, worker
from bench.report import Row

CONTENDERS = ("tinytape", "torch", "jax")
CLIP, BOUND = 5.0, 0.1
WINDOWS = 20  # different inputs before they come round again
STEPS_COMPARED = 3
# Relative to float64. PyTorch's float32 norm of two million numbers is itself off by 1e-4.
TOLERANCE = {"loss": 1e-4, "norm of the gradient": 1e-3}
SIZES = ("words", "embedding", "hidden", "layers", "rows", "steps")
MODELS = {
    "word": dict(zip(SIZES, (10_000, 200, 200, 2, 20, 20), strict=True)) | {"lr": 1.0, "adam": False, "dropout": 0.0},
    "char": dict(zip(SIZES, (65, 64, 128, 2, 50, 50), strict=True)) | {"lr": 2e-3, "adam": True, "dropout": 0.1},
}
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


def words(options: dict[str, Any]) -> np.ndarray:
    """Windows of words, (WINDOWS, steps + 1, rows): a step's inputs, and one further on its targets."""
    shape = (WINDOWS, options["steps"] + 1, options["rows"])
    chances = 1 / (np.arange(options["words"]) + 3.7)
    return np.random.default_rng(0).choice(options["words"], shape, p=chances / chances.sum())


def weights(options: dict[str, Any]) -> dict[str, np.ndarray]:
    """By the names that the modules give them."""
    rng, V, E, H = np.random.default_rng(1), options["words"], options["embedding"], options["hidden"]
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (V, E), "head.weight": (V, H), "head.bias": (V,)}
    for layer in range(options["layers"]):
        kinds = {
            "weight_ih": (4 * H, H if layer else E),
            "weight_hh": (4 * H, H),
            "bias_ih": (4 * H,),
            "bias_hh": (4 * H,),
        }
        shapes |= {f"lstm.{kind}_l{layer}": shape for kind, shape in kinds.items()}
    drawn = {name: rng.uniform(-BOUND, BOUND, shape).astype(np.float32) for name, shape in shapes.items()}
    return {name: value.astype(options["dtype"]) for name, value in drawn.items()}


def prepare(contender: str, options: dict[str, Any]) -> worker.Step:
    """A step on the next window, the state carried over; its results are the loss and the norm before clipping."""
    return {"tinytape": tinytape, "torch": torch, "jax": jax}[contender](options)


def scale(options: dict[str, Any]) -> int:
    """What the mean loss is multiplied with: SGD's is a sum over the steps."""
    return 1 if options["adam"] else options["steps"]


def told(loss: float, norm: float) -> dict[str, np.ndarray]:
    return {"loss": np.array(loss), "norm of the gradient": np.array(norm)}


def language_model(nn: Any, options: dict[str, Any], dtype: Any) -> Any:
    """One text for tinytape and PyTorch, which share these names."""
    V, E, H, p = options["words"], options["embedding"], options["hidden"], options["dropout"]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(V, E, dtype=dtype)
            self.lstm = nn.LSTM(E, H, options["layers"], dropout=p, dtype=dtype)
            self.drop = nn.Dropout(p)
            self.head = nn.Linear(H, V, dtype=dtype)

        def forward(self, tokens, state):
            y, state = self.lstm(self.embedding(tokens), state)
            return self.head(self.drop(y)), state

    return Model()


def tinytape(options: dict[str, Any]) -> worker.Step:
    import tinytape as tt

    model = language_model(tt.nn, options, options["dtype"])
    model.load_state_dict(weights(options))
    make = tt.optim.Adam if options["adam"] else tt.optim.SGD
    optimizer = make(model.parameters(), lr=options["lr"], clip_norm=CLIP)
    windows, carried, number = cycle(words(options)), None, count()

    def step():
        nonlocal carried
        window = next(windows)
        model.train(next(number) >= STEPS_COMPARED)
        optimizer.zero_grad()
        logits, state = model(window[:-1], carried)
        loss = tt.nn.functional.cross_entropy(logits, window[1:]) * scale(options)
        loss.backward()
        norm = optimizer.step()
        carried = [part.detach() for part in state]
        return lambda: told(loss.item(), norm)

    return step


def torch(options: dict[str, Any]) -> worker.Step:
    torch = peers.start_torch(options["threads"])
    model = language_model(torch.nn, options, getattr(torch, options["dtype"]))
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights(options).items()})
    parameters = list(model.parameters())
    optimizer = (torch.optim.Adam if options["adam"] else torch.optim.SGD)(parameters, lr=options["lr"])
    windows, carried, number = cycle(torch.from_numpy(words(options))), None, count()

    def step():
        nonlocal carried
        window = next(windows)
        model.train(next(number) >= STEPS_COMPARED)
        optimizer.zero_grad()
        logits, state = model(window[:-1], carried)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), window[1:].flatten()) * scale(options)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        carried = tuple(part.detach() for part in state)
        return lambda: told(loss.item(), norm.item())

    return step


def jax(options: dict[str, Any]) -> worker.Step:
    import jax
    import jax.numpy as jnp

    lib, layers, keep = peers.jax_library(), range(options["layers"]), 1 - options["dropout"]

    def dropped(x: Any, keys: Any) -> Any:
        return x if keys is None else jnp.where(jax.random.bernoulli(next(keys), keep, x.shape), x / keep, 0)

    def model(held: Any, tokens: Any, states: Any, key: Any) -> tuple[Any, Any]:
        x, after = held["embedding.weight"][tokens], []
        keys = None if key is None else iter(jax.random.split(key, len(states)))
        for layer, state in zip(layers, states, strict=True):
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            w = {name: held[f"lstm.{name}_l{layer}"] for name in names}
            a, w = cells.from_input("lstm", lib, w, x), peers.turned(w)

            def one(state: Any, a: Any, w: Any = w) -> Any:
                return cells.advance("lstm", lib, w, a, None, state)

            last, x = jax.lax.scan(one, state, a, unroll=peers.UNROLL)
            x = dropped(x, keys)
            after.append(last)
        return x @ held["head.weight"].T + held["head.bias"], after

    def loss(held: Any, window: Any, states: Any, key: Any) -> tuple[Any, Any]:
        logits, after = model(held, window[:-1], states, key)
        right = jnp.take_along_axis(logits, window[1:, :, None], -1)[..., 0]
        return (jax.nn.logsumexp(logits, -1) - right).mean() * scale(options), after

    def moved(slots: Any, grads: Any, number: Any) -> tuple[Any, Any]:
        """What is taken from the weights, and Adam's moments."""
        if not options["adam"]:
            return grads, slots
        first = {name: BETA1 * m + (1 - BETA1) * grads[name] for name, m in slots[0].items()}
        second = {name: BETA2 * v + (1 - BETA2) * grads[name] ** 2 for name, v in slots[1].items()}
        one, two = 1 - BETA1 ** (number + 1.0), 1 - BETA2 ** (number + 1.0)
        return {name: first[name] / one / (jnp.sqrt(second[name] / two) + EPS) for name in first}, (first, second)

    def update(held: Any, slots: Any, window: Any, states: Any, number: Any, training: bool) -> Any:
        key = jax.random.fold_in(jax.random.key(0), number) if training and keep < 1 else None
        (value, after), grads = jax.value_and_grad(loss, has_aux=True)(held, window, states, key)
        norm = jnp.sqrt(sum((g * g).sum() for g in grads.values()))
        factor = jnp.minimum(1.0, CLIP / (norm + 1e-6))
        steps, slots = moved(slots, {name: factor * g for name, g in grads.items()}, number)
        return {name: w - options["lr"] * steps[name] for name, w in held.items()}, slots, after, value, norm

    held = {name: jnp.asarray(value) for name, value in weights(options).items()}
    slots = tuple({name: jnp.zeros_like(w) for name, w in held.items()} for _ in range(2 * options["adam"]))
    states = [(jnp.zeros((options["rows"], options["hidden"])),) * 2 for _ in layers]
    windows = [jnp.asarray(window, jnp.int32) for window in words(options)]
    compiled = jax.jit(update, static_argnums=5, donate_argnums=(0, 1))
    following, numbers = cycle(windows), count()

    def step():
        nonlocal held, slots, states
        number = next(numbers)
        found = compiled(held, slots, next(following), states, number, number >= STEPS_COMPARED)
        held, slots, states, value, norm = jax.block_until_ready(found)
        return lambda: told(float(value), float(norm))

    return step


def start(contender: str, options: dict[str, Any]) -> worker.Worker:
    more = {} if contender == "tinytape" else runner.KEEP_MEMORY
    return worker.Worker("bench.lm", contender, options, options["threads"], more)


def first_steps(contender: worker.Worker, folder: Path) -> dict[str, np.ndarray]:
    """Loss and norm of the first steps, each as one array."""
    found = [contender.results(folder) for _ in range(STEPS_COMPARED)]
    return {name: np.stack([one[name] for one in found]) for name in found[0]}


def reference(options: dict[str, Any], folder: Path) -> dict[str, np.ndarray]:
    """The first steps in float64, by PyTorch where it is installed."""
    name = "torch" if runner.installed(["torch"])[0] else "tinytape"
    with start(name, options | {"dtype": "float64"}) as contender:
        return first_steps(contender, folder)


def judge(row: Row, contender: str, got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> bool:
    """Whether the first steps are right; if they are not, the row says so in place of a time."""
    for name, tolerance in TOLERANCE.items():
        off, _ = worker.error({name: got[name]}, {name: wanted[name]})
        if not off <= tolerance:
            row.errors[contender], row.problems[contender] = off, f"{name} is off by {off:.1e}"
            return False
    return True


def measure(contenders: Sequence[str], options: dict[str, Any], rounds: int, seconds: float) -> tuple[Row, list[float]]:
    """The row, and the losses of the first steps."""
    row = Row("{words:,} symbols, {layers}x{hidden}, B={rows}, T={steps}".format(**options))
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        wanted = reference(options, folder)
        ready: dict[str, worker.Worker] = {}
        for contender in contenders:
            try:
                started = stack.enter_context(start(contender, options))
                if judge(row, contender, first_steps(started, folder), wanted):
                    ready[contender] = started
            except runner.ContenderFailed as failure:
                row.problems[contender] = str(failure)
        for index, contender in runner.turns(list(ready), rounds):
            runner.progress(f"round {index + 1} of {rounds}: {contender}")
            row.times.setdefault(contender, []).append(ready[contender].times(seconds))
        runner.progress("")
    return row, wanted["loss"].tolist()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench lm", description=__doc__)
    add = parser.add_argument
    add("--model", choices=MODELS, default="word", help="default %(default)s")
    for name in SIZES:
        add(f"--{name}", type=int, help="default {:,}, or {:,} of char".format(*(m[name] for m in MODELS.values())))
    add("--threads", type=int, default=2, help="for every contender (default 2)")
    add("--rounds", type=int, default=7, help="turns for each contender (default 7)")
    add("--seconds", type=float, default=1.0, help="length of a turn (default 1)")
    add("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME", help=str(CONTENDERS))
    add("--json", type=Path, metavar="FILE", help="write everything measured to FILE")
    args = parser.parse_args(argv)
    for name in SIZES:
        if getattr(args, name) is None:
            setattr(args, name, MODELS[args.model][name])
    if min(args.rounds, args.threads, *(getattr(args, name) for name in SIZES)) < 1 or not args.seconds > 0:
        parser.error("sizes, rounds and threads are at least 1, seconds more than 0")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    contenders, absent = runner.installed(args.contenders)
    options = MODELS[args.model] | {name: getattr(args, name) for name in (*SIZES, "threads")} | {"dtype": "float32"}
    facts = runner.machine(("tinytape", "torch", "jax", "numba", "numpy"))
    try:
        row, losses = measure(contenders, options, args.rounds, args.seconds)
    except runner.ContenderFailed as failure:  # of the reference: the others' failures are in the row
        print(failure, file=sys.stderr)
        return 1
    print(f"a training step of a {args.model} model, float32, threads: {args.threads}, losses equal")
    print(runner.describe(facts))
    if absent:
        print(f"absent (not installed): {', '.join(absent)}")
    print("loss of the first steps: " + ", ".join(f"{loss:.4f}" for loss in losses))
    print("\n" + report.table("ms a step", [row], contenders))
    if row.problems:
        print("\n" + "\n".join(report.problems([row])), file=sys.stderr)
    if args.json:
        whole = {"benchmark": "lm", "options": options, "machine": facts, "absent": absent, "losses": losses}
        args.json.write_text(json.dumps(whole | row.facts(), indent=1) + "\n", "utf-8")
    return 1 if row.problems else 0
