"""NumPy source for a program: to read, and to run where there is no Numba."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from .keep import Phases
from .program import Piece, Program, Ref, Shape, Value

__all__ = ["inputs_of", "names_of", "numpy_source"]

_INFIX = {
    "add": "+", "subtract": "-", "multiply": "*", "divide": "/", "equal": "==", "not_equal": "!=", "less": "<",
    "less_equal": "<=", "greater": ">", "greater_equal": ">=",
}  # fmt: skip
_INFIX_NUMBERS = {"add", "subtract", "multiply", "divide"}
_OURS = {"erf", "erfc"}
_WRITTEN = {
    "sigmoid": """def sigmoid(x):
    t = np.exp(-np.absolute(x))
    return np.where(x >= 0, 1, t) / (1 + t)
""",
    "relu": """def relu(x):
    return np.maximum(x, 0)
""",
    "silu": """def silu(x):
    return x * sigmoid(x)
""",
    "softplus": """def softplus(x, beta, threshold):
    return np.where(x * beta > threshold, x, np.logaddexp(x * beta, 0) / beta)
""",
    "where": """def where(condition, a, b):
    return np.where(condition != 0, a, b)
""",
}
_HERE = {*_OURS, *_WRITTEN}
_PREFIX = {"carry": "c", "x": "x", "fixed": "f", "seed_carry": "dc", "seed_y": "dy"}


def numpy_source(program: Program, phases: Phases, title: str) -> str:
    """A module with ``forward`` and, where the program has an adjoint, ``backward``."""
    names = names_of(program, phases)
    body = [*_forward(program, phases, names), "", ""]
    body += [*_backward(program, phases, names), ""] if program.carry_seeds else []
    text = "\n".join(body[:-1])
    used = set(re.findall(r"[a-z]+", text))
    if "silu" in used:
        used.add("sigmoid")
    given = [f"    {name:<5}{about}" for name, about in inputs_of(program, names)]
    head = [
        f'"""{title}, over time, in NumPy.',
        "",
        "init, xs[t], fixed, weights, dcarry and dys[t] are tuples, of:",
        "",
        *given,
        "",
        "xs and dys have a tuple for each step. forward returns the last carry, each step's outputs, and a tape for",
        "backward, which returns gradients: of init, of each step's inputs, of fixed, and sums over all steps.",
        '"""',
        "",
        "import numpy as np",
        *["from math import " + ", ".join(sorted(used & {"inf", "nan"}))] * bool(used & {"inf", "nan"}),
        *["from tinytape.ops.activation import " + ", ".join(sorted(used & _OURS))] * bool(used & _OURS),
        "",
        f"dtype = np.{np.dtype(program.dtype).name}",
        "",
        "",
    ]
    return "\n".join([*head, *(f"{text}\n" for name, text in _WRITTEN.items() if name in used), text])


def inputs_of(program: Program, names: dict[Value, str]) -> Iterable[tuple[str, str]]:
    """What comes from outside: each name, its shape, and what it is."""
    kinds = {"carry": "the carry, leaf {}", "x": "xs, leaf {}", "fixed": "from outside, a row for each batch row"}
    for value in program.inputs:
        yield names[value], f"{list(value.shape)} {kinds[value.kind].format(value.index)}"
    for value in program.invariants:
        source = "from outside" if value.recipe.op is None else f"{_recipe(value, names)}, once for all steps"
        yield names[value], f"{list(value.shape)} {source}"


def _recipe(value: Any, names: dict[Value, str]) -> str:
    """How an invariant is computed from others."""
    if not isinstance(value, Value) or value.recipe is None or value.recipe.op is None:
        return names.get(value, "a constant") if isinstance(value, Value) else str(value)
    args = [names[a] if a in names else _recipe(a, names) for a in value.recipe.args]
    return f"{value.recipe.op.name}({', '.join(args)})"


def names_of(program: Program, phases: Phases) -> dict[Value, str]:
    """A name for each value."""
    names: dict[Value, str] = {}
    for value in (*program.inputs, *program.carry_seeds, *program.output_seeds):
        if value.kind != "none":
            names[value] = f"{_PREFIX[value.kind]}{value.index}"
    for i, value in enumerate(program.invariants):
        names[value] = f"w{i}"
    for value in (*phases.forward, *phases.again):
        names.setdefault(value, f"v{len(names)}")
    for value in (*phases.adjoint, *phases.sums):
        names.setdefault(value, f"d{len(names)}")
    return names


def _forward(program: Program, phases: Phases, names: dict[Value, str]) -> list[str]:
    """Rows of all steps are kept in a list; ys is one array an output."""
    carries = [v for v in program.inputs if v.kind == "carry"]
    lines = ["def forward(init, xs, fixed, weights):", *_unpack(names, program.invariants, "weights")]
    lines += _unpack(names, [v for v in program.inputs if v.kind == "fixed"], "fixed")
    lines += _unpack(names, carries, "init")
    lines += [f"    rows = len({names[carries[0]]})"]
    lines += ["    ys, tape = [], []", "    for x in xs:"]
    lines += _unpack(names, [v for v in program.inputs if v.kind == "x"], "x", "        ")
    lines += _statements(phases.forward, names, "        ")
    kept = _kept(program, phases) if program.carry_seeds else []
    lines.append(f"        tape.append(({_list(names, kept)}))")
    lines.append(f"        ys.append(({_list(names, program.outputs)}))")
    if carries:
        lines.append(f"        {_list(names, carries)} = {_list(names, program.carries)}")
    lines.append(f"    return ({_list(names, carries)}), ys, tape")
    return lines


def _backward(program: Program, phases: Phases, names: dict[Value, str]) -> list[str]:
    seeds = [names.get(v, "_") for v in program.carry_seeds]
    lines = ["def backward(tape, dcarry, dys, xs, fixed, weights):", *_unpack(names, program.invariants, "weights")]
    lines += _unpack(names, [v for v in program.inputs if v.kind == "fixed"], "fixed")
    lines += [f"    {''.join(s + ', ' for s in seeds)} = dcarry", "    rows, dxs = len(dcarry[0]), []"]
    sums = [f"s{i}" for i in range(len(phases.sums))]
    shares = [f"r{i}" for i in program.fixed_gradients]
    lines += [f"    {name} = 0" for name in (*sums, *shares)]
    lines.append("    for (x, kept, dy) in zip(xs[::-1], tape[::-1], dys[::-1]):")
    inner = "        "
    lines += _unpack(names, [v for v in program.inputs if v.kind == "x"], "x", inner)
    kept = _kept(program, phases)
    if kept:
        lines.append(f"{inner}{_list(names, kept)} = kept")
    outputs = [names.get(v, "_") for v in program.output_seeds]
    if outputs:
        lines.append(f"{inner}{''.join(s + ', ' for s in outputs)} = dy")
    lines += _statements(phases.again, names, inner)
    lines += _statements(phases.adjoint, names, inner)
    for name, value in zip(sums, phases.sums, strict=True):
        lines.append(f"{inner}{name} = {name} + {_sum(value, names)}")
    for name, value in zip(shares, program.fixed_gradients.values(), strict=True):
        lines.append(f"{inner}{name} = {name} + {names[value]}")
    lines.append(f"{inner}dxs.append(({_list(names, program.input_gradients.values())}))")
    pairs = zip(seeds, program.carry_gradients, strict=True)
    real = [(s, f"np.zeros_like({s})" if g is None else names[g]) for s, g in pairs if s != "_"]
    if real:
        lines.append(f"{inner}{', '.join(s for s, _ in real)} = {', '.join(n for _, n in real)}")
    final = "".join("None, " if s == "_" else f"{s}, " for s in seeds)
    lines.append(f"    return ({final}), dxs[::-1], ({''.join(s + ', ' for s in shares)}), "
                 f"({''.join(s + ', ' for s in sums)})")  # fmt: skip
    return lines


def _kept(program: Program, phases: Phases) -> list[Value]:
    carries = [v for v in program.inputs if v.kind == "carry"]
    return list(dict.fromkeys([*carries, *phases.kept, *program.carries, *program.outputs]))


def _unpack(names: dict[Value, str], values: Iterable[Value], source: str, indent: str = "    ") -> list[str]:
    found = list(values)
    return [f"{indent}{_list(names, found)} = {source}"] if found else []


def _list(names: dict[Value, str], values: Iterable[Value]) -> str:
    return "".join(f"{names[v]}, " for v in values).rstrip()


def _statements(values: Iterable[Value], names: dict[Value, str], indent: str) -> list[str]:
    lines: list[str] = []
    for value in values:
        lines.extend(indent + line for line in _statement(value, names))
    return lines


def _statement(value: Value, names: dict[Value, str]) -> list[str]:
    name = names[value]
    if value.kind == "map":
        args = [_argument(a, value.shape, names) for a in value.args]
        expression = _expression(value.fn, args)
        refs = [a for a in value.args if isinstance(a, Ref)]
        if not refs or not any(_full(ref, value.shape) for ref in refs) or value.fn == "copy":
            return [f"{name} = np.broadcast_to({expression}, (rows, {_inner(value.shape)}))"]
        return [f"{name} = {expression}"]
    if value.kind == "reduce":
        argument = _argument(value.args[0], value.space, names)
        if not _full(value.args[0], value.space):
            argument = f"np.broadcast_to({argument}, (rows, {_inner(value.space)}))"
        axes = tuple(a + 1 for a in value.axes)
        return [f"{name} = np.{value.fn}({argument}, axis={axes})"]
    if value.kind == "product":
        return [f"{name} = {names[value.args[0]]} @ {names[value.args[1]]}"]
    if value.kind == "alias":
        return [f"{name} = {names[value.args[0]]}.reshape(-1, {_inner(value.shape)})"]
    if value.kind == "join":
        lines = [f"{name} = np.zeros((rows, {_inner(value.shape)}), dtype)"]
        return lines + [f"{name}[:, {_place(p)}] = {_argument(p.ref, tuple(n for _, _, n in p.place), names)}"
                        for p in value.pieces]  # fmt: skip
    raise AssertionError(value.kind)


def _inner(shape: Shape) -> str:
    return "".join(f"{n}, " for n in shape).rstrip()


def _place(piece: Piece) -> str:
    return ", ".join(_slice(start, step, n) for start, step, n in piece.place)


def _slice(start: int, step: int, n: int) -> str:
    stop: Any = start + step * n
    stop = "" if stop < 0 else stop
    return f"{start}:{stop}:{step}" if step != 1 else f"{start}:{stop}"


def _full(ref: Ref, extent: Shape) -> bool:
    followed = {axis for _, _, axis in ref.index if axis is not None}
    return ref.value.kind != "invariant" and all(i in followed or n == 1 for i, n in enumerate(extent))


def _expression(fn: str, args: list[str]) -> str:
    if fn in _INFIX:
        text = f"{args[0]} {_INFIX[fn]} {args[1]}"
        return text if fn in _INFIX_NUMBERS else f"({text}).astype(dtype)"
    if fn == "negative":
        return f"-{args[0]}"
    if fn == "copy":
        return args[0]
    return f"{'' if fn in _HERE else 'np.'}{fn}({', '.join(args)})"


def _argument(arg: Any, extent: Shape, names: dict[Value, str]) -> str:
    """How the loop over `extent` reads an argument."""
    if not isinstance(arg, Ref):
        return repr(arg)
    value, index = arg
    name = names[value]
    batched = value.kind != "invariant"
    if not index:
        return name if not batched or not extent else f"{name}[:, {', '.join(['None'] * len(extent))}]"
    items, order = list[str](), list[int]()
    for n, (start, step, axis) in zip(value.shape, index, strict=True):
        if axis is None:
            items.append(str(start))
        else:
            order.append(axis)
            whole = start == 0 and step == 1 and n == extent[axis]
            items.append(":" if whole else _slice(start, step, extent[axis]))
    lead = [":"] if batched else []
    text = name if all(item == ":" for item in items) else f"{name}[{', '.join(lead + items)}]"
    if order != sorted(order):
        ranks = sorted(range(len(order)), key=lambda i: order[i])
        moved = [0, *(r + 1 for r in ranks)] if batched else ranks
        text = f"{text}.transpose({', '.join(map(str, moved))})"
    missing = [i for i in range(len(extent)) if i not in order]
    if missing and (batched or any(i > min(order, default=-1) for i in missing)):
        news = ["None" if i in missing else ":" for i in range(len(extent))]
        text = f"{text}[{', '.join(lead + news)}]"
    return text


def _sum(value: Value, names: dict[Value, str]) -> str:
    if value.kind == "outer":
        a, b = (names[v] for v in value.args)
        k, n = value.shape
        return f"{a}.reshape(-1, {k}).T @ {b}.reshape(-1, {n})"
    return f"{names[value.args[0]]}.sum(axis=0)"
