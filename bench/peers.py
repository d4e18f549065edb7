"""PyTorch and JAX as contenders over time, each written as its own documentation advises.

The product of the input with its weights is taken for all steps at once, outside the loops.
"""

from typing import Any

import numpy as np

from bench import cells, summed
from bench.cases import Case, inputs, keep_flags, row_lengths, weights
from bench.worker import Step

UNROLL = 2  # of JAX's scan: measured, it is the best of 1, 2 and 4 or equal to it


# ---- PyTorch --------------------------------------------------------------------------------------------------------


def start_torch(threads: int) -> Any:
    import torch

    torch.set_num_threads(threads)
    return torch


def torch_layer(case: Case, threads: int) -> Step:
    """`torch.nn`'s own layer."""
    torch = start_torch(threads)
    make = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn": torch.nn.RNN}[case.cell]
    options = {"num_layers": case.layers, "bidirectional": case.bidirectional}
    model = make(case.I, case.H, dtype=getattr(torch, case.dtype), **options)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights(case).items()})
    x = torch.from_numpy(inputs(case)[0]).requires_grad_(case.input_gradient and not case.token)
    if case.token:
        return torch_by_token(case, lambda t, state: model(x[t : t + 1], state), None)
    lengths = torch.from_numpy(row_lengths(case))

    def forward():
        if not case.lengths:
            return model(x)[0]
        packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        return torch.nn.utils.rnn.pad_packed_sequence(model(packed)[0], total_length=case.T)[0]

    dy = torch.from_numpy(inputs(case)[1])
    return cells.training(case, dict(model.named_parameters()), x, dy, forward)


def torch_library() -> cells.Library:
    import torch

    return cells.Library(
        tanh=torch.tanh,
        sigmoid=torch.sigmoid,
        split=lambda x, parts: x.chunk(parts, -1),
        recur=lambda a, h, weight: h @ weight if isinstance(a, float) else torch.addmm(a, h, weight),
        normalise=lambda x: torch.nn.functional.layer_norm(x, x.shape[-1:], eps=cells.EPS),
        where=torch.where,
    )


def torch_loop(case: Case, threads: int) -> Step:
    """The cell in a Python loop."""
    torch, lib = start_torch(threads), torch_library()
    leaves = {name: torch.from_numpy(value).requires_grad_(not case.token) for name, value in weights(case).items()}
    x = torch.from_numpy(inputs(case)[0]).requires_grad_(case.input_gradient and not case.token)
    flags = keep_flags(case)
    keep = [None] * case.T if flags is None else torch.from_numpy(flags).unbind(0)
    zeros = (torch.zeros(case.B, case.H, dtype=x.dtype),) * case.facts.states
    if case.token:
        layers = [turned(cells.of_direction(case, leaves, suffix)) for (suffix,) in case.suffixes]
        return torch_by_token(case, lambda t, s: cells.one_token(case, lib, layers, x[t], s), [zeros] * case.layers)

    def over_time(w: cells.Weights, x: Any, reverse: bool) -> Any:
        a, w = cells.from_input(case.cell, lib, w, x).unbind(0), turned(w)
        state, ys = zeros, [None] * case.T
        for t in reversed(range(case.T)) if reverse else range(case.T):
            state, ys[t] = cells.advance(case.cell, lib, w, a[t], keep[t], state)
        return torch.stack(ys)

    def forward():
        return cells.through_layers(case, leaves, x, over_time, lambda ys: torch.cat(ys, -1))

    return cells.training(case, leaves, x, torch.from_numpy(inputs(case)[1]), forward)


def turned(w: cells.Weights) -> cells.Weights:
    """With weight_hh transposed once, not in every step."""
    return w | {"weight_hh": w["weight_hh"].T}


def torch_by_token(case: Case, one: Any, initial: Any) -> Step:
    """``one(t, state)`` gives the output and the state to carry."""
    import torch

    def step():
        state, ys = initial, []
        with torch.inference_mode():
            for t in range(case.T):
                y, state = one(t, state)
                ys.append(y)
        return lambda: {"y": np.stack([y.numpy() for y in ys]).reshape(case.T, case.B, case.H)}

    return step


def torch_summed(task: summed.Task, how: str, threads: int) -> Step:
    """`torch.nn`'s layer over a long sequence, as one piece (``full``) or in several.

    ``checkpoint``: each piece is run again on the way back. ``truncated``: each is gone back through at once.
    """
    torch = start_torch(threads)
    from torch.utils.checkpoint import checkpoint

    held = {name: torch.from_numpy(value) for name, value in summed.weights(task).items()}
    readout = held.pop("readout").requires_grad_()
    model = torch.nn.LSTM(1, task.H, dtype=getattr(torch, task.dtype))
    model.load_state_dict(held)
    steps = {"full": task.T, "checkpoint": task.stretch, "truncated": summed.WINDOW}[how]
    parts = list(zip(*(torch.from_numpy(value).split(steps) for value in summed.data(task)), strict=True))

    def over(x: Any, target: Any, h: Any, c: Any) -> Any:
        y, (h, c) = model(x, (h, c))
        error = y @ readout - target
        return (error * error).sum() * task.share, h, c

    def backward():
        h = c = torch.zeros(1, task.B, task.H, dtype=readout.dtype)
        total = 0.0
        for x, target in parts:
            if how == "checkpoint":
                loss, h, c = checkpoint(over, x, target, h, c, use_reentrant=False, preserve_rng_state=False)
            else:
                loss, h, c = over(x, target, h, c)
            if how == "truncated":
                loss.backward()
                h, c = h.detach(), c.detach()
            else:
                total = total + loss
        if how != "truncated":
            total.backward()

    return summed.training(dict(model.named_parameters()) | {"readout": readout}, backward)


# ---- JAX ------------------------------------------------------------------------------------------------------------


def start_jax(case: Case) -> Any:
    import jax

    jax.config.update("jax_enable_x64", case.dtype == "float64")
    return jax


def jax_library() -> cells.Library:
    import jax
    import jax.numpy as jnp

    def normalise(x: Any) -> Any:
        centred = x - x.mean(-1, keepdims=True)
        return centred * jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + cells.EPS)

    return cells.Library(
        tanh=jnp.tanh,
        sigmoid=jax.nn.sigmoid,
        split=lambda x, parts: jnp.split(x, parts, axis=-1),
        recur=lambda a, h, weight: a + h @ weight,
        normalise=normalise,
        where=jnp.where,
    )


def jax_scan(case: Case) -> Step:
    """`lax.scan` under one `jit` of the values and all gradients."""
    jax, lib = start_jax(case), jax_library()
    jnp = jax.numpy
    x, dy = map(jnp.asarray, inputs(case))
    held = {name: jnp.asarray(value) for name, value in weights(case).items()}
    keep = None if (flags := keep_flags(case)) is None else jnp.asarray(flags)
    zeros = (jnp.zeros((case.B, case.H), x.dtype),) * case.facts.states
    if case.token:
        return jax_by_token(case, lib, held, x, zeros)

    def over_time(w: cells.Weights, x: Any, reverse: bool) -> Any:
        a, w = cells.from_input(case.cell, lib, w, x), turned(w)

        def one(state: Any, now: Any) -> Any:
            return cells.advance(case.cell, lib, w, *now, state)

        return jax.lax.scan(one, zeros, (a, keep), reverse=reverse, unroll=UNROLL)[1]

    def outputs(held: cells.Weights, x: Any) -> tuple[Any, Any]:
        y = cells.through_layers(case, held, x, over_time, lambda ys: jnp.concatenate(ys, -1))
        return (y[-1] if case.last else y), y

    def values_and_gradients(held: cells.Weights, x: Any, dy: Any) -> Any:
        asked = (held, x) if case.input_gradient else (held,)
        _, pull, y = jax.vjp(lambda held, x=x: outputs(held, x), *asked, has_aux=True)
        return y, pull(dy)

    compiled = jax.jit(values_and_gradients).lower(held, x, dy).compile()

    def step():
        y, (grads, *dx) = jax.block_until_ready(compiled(held, x, dy))
        named = {"y": y} | {"d" + name: grad for name, grad in grads.items()} | ({"dx": dx[0]} if dx else {})
        return lambda: {name: np.asarray(value) for name, value in named.items()}

    return step


def jax_by_token(case: Case, lib: cells.Library, held: cells.Weights, x: Any, zeros: Any) -> Step:
    """Each token waits for the one before, as it must where a text is being written."""
    import jax

    @jax.jit
    def one(held: cells.Weights, x: Any, states: Any) -> Any:
        layers = [turned(cells.of_direction(case, held, suffix)) for (suffix,) in case.suffixes]
        return cells.one_token(case, lib, layers, x, states)

    tokens = list(x)

    def step():
        states, ys = [zeros] * case.layers, []
        for token in tokens:
            y, states = jax.block_until_ready(one(held, token, states))
            ys.append(y)
        return lambda: {"y": np.stack(ys)}

    return step


def jax_summed(task: summed.Task, how: str) -> Step:
    """`lax.scan` over a long sequence (``full``), or over stretches of it, each a scan in a `jax.checkpoint`.

    The input's product stays inside, where it costs nothing for one number and keeps nothing.
    """
    jax, lib = start_jax(task.case), jax_library()
    jnp = jax.numpy
    held, data, zeros = jax.tree.map(jnp.asarray, (summed.weights(task), summed.data(task), summed.zeros(task)))
    steps = task.stretch
    stretches = task.T // steps
    whole = stretches * steps

    def total(held: cells.Weights, data: Any) -> Any:
        w = turned(summed.of_step(held))

        def over(state: Any, data: Any) -> Any:
            return jax.lax.scan(lambda s, now: summed.advance(lib, w, s, now), state, data, unroll=UNROLL)

        if how == "full":
            state, _ = over(zeros, data)
        else:
            cut = jax.tree.map(lambda x: x[:whole].reshape(stretches, steps, *x.shape[1:]), data)
            state, _ = jax.lax.scan(jax.checkpoint(over), zeros, cut)
            state, _ = jax.checkpoint(over)(state, jax.tree.map(lambda x: x[whole:], data))
        return state[-1].sum() * task.share

    compiled = jax.jit(jax.grad(total)).lower(held, data).compile()

    def step():
        grads = jax.block_until_ready(compiled(held, data))
        return lambda: {"d" + name: np.asarray(grad) for name, grad in grads.items()}

    return step
