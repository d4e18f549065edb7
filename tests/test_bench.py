"""The benchmarks' own machinery: what is compared, what is counted, what the tables say."""

import ast
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tinytape as tt
from bench import cases, lm, memory, ours, report, runner, scan, start, worker
from bench.cases import BUILT_IN, CELLS, Case
from bench.report import Row

SMALL = (5, 3, 4, 6)
VARIANTS = [
    {}, {"last": True}, {"lengths": True}, {"layers": 2}, {"bidirectional": True}, {"input_gradient": False},
    {"layers": 2, "bidirectional": True, "lengths": True, "last": True},
]  # fmt: skip


# ---- cases ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_operations_counted(cell):
    T, B, I, H = 7, 5, 3, 11
    gates = {"lstm": 4, "gru": 3, "rnn": 1}.get(cell, 4)
    plain = Case(cell, T, B, I, H)
    assert plain.flops == 3 * 2 * T * B * gates * H * (I + H)
    assert replace(plain, token=True).flops == plain.flops / 3
    assert replace(plain, input_gradient=False).flops == 2 * T * B * gates * H * (2 * I + 3 * H)
    assert replace(plain, bidirectional=True).flops == 2 * plain.flops
    assert replace(plain, layers=2).flops == plain.flops + 3 * 2 * T * B * gates * H * 2 * H


def test_steps_beyond_a_rows_end_are_not_counted():
    case = Case("lstm", 40, 6, 3, 4, lengths=True)
    lengths = cases.row_lengths(case)
    assert lengths.max() == 40 and 20 <= lengths.min() < 40
    assert case.flops == replace(case, lengths=False).flops * lengths.sum() / (40 * 6)
    assert np.array_equal(cases.keep_flags(case).sum((0, 2)), lengths)


@pytest.mark.parametrize("cell", BUILT_IN)
def test_weights_are_those_of_the_layer(cell):
    case = Case(cell, *SMALL, layers=2, bidirectional=True)
    model = {"lstm": tt.nn.LSTM, "gru": tt.nn.GRU, "rnn": tt.nn.RNN}[cell](4, 6, 2, bidirectional=True)
    drawn = {name: value.shape for name, value in cases.weights(case).items()}
    assert drawn == {name: p.shape for name, p in model.named_parameters()}


def test_a_case_tells_what_is_unusual_and_survives_json():
    case = Case("gru", *SMALL, layers=2, lengths=True, dtype="float64")
    assert case.label == "5,3,4,6 2 layers lengths float64"
    assert Case(**json.loads(json.dumps(case.options()))) == case


def test_float64_has_the_same_numbers():
    case = Case("layernorm", *SMALL)
    wide = replace(case, dtype="float64")
    for a, b in zip(cases.inputs(wide), cases.inputs(case), strict=True):
        assert a.dtype == np.float64 and b.dtype == np.float32 and np.array_equal(a, b)
    assert all(np.array_equal(value, cases.weights(case)[name]) for name, value in cases.weights(wide).items())


# ---- contenders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: "-".join(changes) or "plain")
@pytest.mark.parametrize("cell", BUILT_IN)
def test_the_cells_text_is_the_layer(cell, changes):
    case = Case(cell, *SMALL, dtype="float64", **changes)
    off, where = worker.error(ours.prepare(case)()(), ours.prepare(case, eager=True)()())
    assert off < 1e-10, where


@pytest.mark.parametrize("cell", CELLS)
def test_token_by_token_is_the_whole_sequence(cell):
    case = Case(cell, *SMALL, layers=2, dtype="float64")
    whole = ours.prepare(case, eager=True)()()["y"]
    by_token = ours.prepare(replace(case, token=True), eager=True)()()
    assert by_token.keys() == {"y"}
    np.testing.assert_allclose(by_token["y"], whole, rtol=1e-12)


@pytest.mark.peer
@pytest.mark.parametrize("changes", [*VARIANTS, {"token": True}], ids=lambda changes: "-".join(changes) or "plain")
@pytest.mark.parametrize("cell", CELLS)
def test_torch_computes_the_same(cell, changes):
    from bench import peers

    case = Case(cell, *SMALL, dtype="float64", **changes)
    got = ours.prepare(case, eager=True)()()
    for peer in (peers.torch_loop, peers.torch_layer)[: 1 + (cell in BUILT_IN)]:
        off, where = worker.error(peer(case, 1)()(), got)
        assert off < 1e-10, (peer.__name__, where)


def test_odd_cases_hold_what_breaks_tiles():
    found = cases.odd("lstm")
    assert {50, 77, 200} <= {case.H for case in found} and {1, 3, 7, 33} <= {case.B for case in found}
    assert {1, 10} <= {case.I for case in found} and {1, 5000} <= {case.T for case in found}
    for name in ("bidirectional", "lengths", "last", "token"):
        assert any(getattr(case, name) for case in found)


# ---- workers --------------------------------------------------------------------------------------------------------


def comes_to_a_stop(pid: int) -> bool:
    """Whether Linux soon says that a process is stopped; a signal takes a moment to arrive."""
    for _ in range(500):
        if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T":
            return True
        time.sleep(0.01)
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_worker_is_stopped_between_its_turns_and_gone_after(tmp_path):
    with worker.Worker("bench.scan", "tinytape-eager", {"case": Case("rnn", *SMALL).options(), "threads": 1}) as one:
        process = one._process
        assert len(one.times(1e-9)) == 3
        assert comes_to_a_stop(process.pid)
        got = one.results(tmp_path)
        assert comes_to_a_stop(process.pid)
    assert process.returncode is not None and not list(tmp_path.iterdir())
    assert worker.error(got, ours.prepare(Case("rnn", *SMALL), eager=True)()())[0] < 1e-6


def test_a_worker_that_fails_says_why():
    with pytest.raises(runner.ContenderFailed, match=r"(?s)nonsense failed \(1\).*KeyError"):
        worker.Worker("bench.scan", "nonsense", {"case": Case("rnn", *SMALL).options(), "threads": 1})


def test_blocks_of_times():
    calls = []
    times = worker.timed(lambda: calls.append(None), 0.0)
    assert len(times) == 3 and len(calls) == 4 and min(times) >= 0
    assert worker.median_of_medians([[1, 2, 100], [4, 5, 6], [9]]) == 5


def test_every_round_starts_with_another():
    assert [name for _, name in runner.turns("abc", 3)] == list("abcbcacab")
    assert list(runner.turns([], 2)) == []


# ---- comparing ------------------------------------------------------------------------------------------------------


def test_the_largest_error_and_where():
    wanted = {"y": np.array([3.0, 4.0]), "dx": np.array([1.0])}
    off, where = worker.error({"y": np.array([3.0, 4.5]), "dx": np.array([1.01])}, wanted)
    assert where == "y" and off == pytest.approx(0.1)
    assert worker.error(wanted, wanted)[0] == 0
    assert worker.error({"y": np.array([3.0, 4.0]), "dx": np.array([np.nan])}, wanted) == (math.inf, "dx")
    assert worker.error({"y": wanted["y"]}, wanted)[0] == math.inf
    assert worker.error(wanted | {"dx": np.array([1.0, 1.0])}, wanted)[0] == math.inf


class FakeWorker:
    """Right results, but for what `spoil` does to those of one contender; times by name."""

    def __init__(self, contender, case, spoil):
        self.contender, self.case, self.spoil = contender, case, spoil

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def results(self, folder):
        found = ours.prepare(self.case, eager=True)()()
        return self.spoil(found) if self.contender == "torch-loop" and self.case.dtype == "float32" else found

    def times(self, seconds):
        return [{"tinytape": 1.0, "torch-loop": 0.1, "jax": 3.0}[self.contender]] * 3


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (lambda found: found | {"dbias_l0": found["dbias_l0"] * np.float32(1.001)}, "dbias_l0 is off by 1.0e-03"),
        (lambda found: found | {"dx": np.full_like(found["dx"], np.nan)}, "dx is off by inf"),
        (lambda found: {k: v for k, v in found.items() if k != "dpeep_i_l0"}, "in place of"),
        (lambda found: found | {"y": found["y"].astype(np.float64)}, "y is float64"),
    ],
)
def test_a_wrong_contender_is_shown_as_wrong_and_not_timed(monkeypatch, spoil, complaint):
    monkeypatch.setattr(scan, "start", lambda contender, case, threads: FakeWorker(contender, case, spoil))
    row = scan.measure_case(Case("peephole", *SMALL), scan.CONTENDERS, 1, 2, 0.1)
    assert row.times.keys() == {"tinytape", "jax"}  # and torch.nn has no such layer
    assert complaint in row.problems["torch-loop"]
    assert row.ratios == {"jax": 3.0, "best": 3.0}
    assert "wrong" in report.table("", [row], scan.CONTENDERS).splitlines()[1]
    json.dumps(row.facts(), allow_nan=False)


def test_a_contender_that_fails_does_not_stop_the_others(monkeypatch):
    def started(contender, case, threads):
        if contender == "jax":
            raise runner.ContenderFailed("jax failed (1):\nno luck")
        return FakeWorker(contender, case, lambda found: found)

    monkeypatch.setattr(scan, "start", started)
    row = scan.measure_case(Case("peephole", *SMALL), scan.CONTENDERS, 1, 1, 0.1)
    assert row.times.keys() == {"tinytape", "torch-loop"} and "no luck" in row.problems["jax"]
    assert "failed" in report.table("", [row], scan.CONTENDERS).splitlines()[1]


def test_a_reference_that_fails_leaves_a_row_without_times(monkeypatch):
    def fail(*_):
        raise runner.ContenderFailed("no reference")

    monkeypatch.setattr(scan, "reference", fail)
    row = scan.measure_case(Case("rnn", *SMALL), ["tinytape"], 1, 1, 0.1)
    assert not row.times and row.problems == {"reference": "no reference"}


def test_a_training_step_with_another_loss_is_wrong():
    wanted = {"loss": np.array([9.0, 8.0]), "norm of the gradient": np.array([6.0, 5.0])}
    row = Row("")
    assert lm.judge(row, "right", {name: value * (1 + 1e-5) for name, value in wanted.items()}, wanted)
    assert not lm.judge(row, "loss", wanted | {"loss": np.array([9.0, 8.01])}, wanted)
    assert not lm.judge(row, "norm", wanted | {"norm of the gradient": np.array([6.0, np.nan])}, wanted)
    assert row.problems.keys() == {"loss", "norm"}


@pytest.mark.peer
@pytest.mark.parametrize("model", lm.MODELS)
def test_training_steps_agree_with_torch(model):
    sizes = dict(words=50, embedding=6, hidden=8, layers=2, rows=3, steps=4)
    options = lm.MODELS[model] | sizes | dict(threads=1, dtype="float64")
    steps = {name: lm.prepare(name, options) for name in ("tinytape", "torch")}
    for _ in range(lm.STEPS_COMPARED):
        told = {name: step()() for name, step in steps.items()}
        assert worker.error(told["tinytape"], told["torch"])[0] < 1e-6  # PyTorch's clip adds 1e-6 to the norm
    if options["dropout"]:
        told = {name: step()() for name, step in steps.items()}
        assert worker.error(told["tinytape"], told["torch"])[0] > 1e-6, "from here on with dropout"


def test_a_gradient_of_another_size_is_found():
    start.check("x", {"gradients": [1.0, 2.0]}, {"gradients": [1.0, 2.00001]})
    with pytest.raises(runner.ContenderFailed, match="x: a gradient"):
        start.check("x", {"gradients": [1.0, 2.0]}, {"gradients": [1.0, 2.1]})


# ---- start ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contender", start.SCRIPTS)
def test_scripts_are_python_and_import_their_library_only(contender):
    tree = ast.parse(start.script(contender, 2))
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert {name.split(".")[0] for name in names} == {contender, "numpy", "json"}


@pytest.mark.slow
def test_first_gradient_of_tinytape():
    found = start.measure(["tinytape"], 1, 2)["tinytape"]
    assert len(found["first"]) == 1 and len(found["gradient"]) == 2
    assert all(0 < alone < whole for alone, whole in zip(found["import"], found["gradient"], strict=True))


# ---- tables and options ---------------------------------------------------------------------------------------------


def test_table_of_ratios():
    rows = [
        Row("a", 2e9, {"tinytape": [[0.1], [0.2], [0.3]], "torch": [[0.4, 0.4, 9.0]], "jax": [[0.1]]}),
        Row("b", 4e9, {"tinytape": [[0.2]], "torch": [[0.4]]}, problems={"jax": "out of memory"}),
    ]
    text = report.table("ms", rows, ["tinytape", "torch", "jax"], peak=40.0)
    assert [" ".join(line.split()) for line in text.splitlines()] == [
        "ms tinytape torch jax torch/ours jax/ours best/ours GFLOP/s of sgemm",
        "a 200 400 100 2.00 0.500 0.500 10.0 0.25",
        "b 200 400 failed 2.00 - 2.00 20.0 0.50",
        "geometric mean 2.00 0.500 1.00",
    ]


def test_table_without_us_or_without_peers():
    row = Row("a", 1e9, {"torch": [[0.5]]})
    assert report.table("ms", [row], ["torch"]).splitlines()[1].split() == ["a", "500"]
    row = Row("a", 1e9, {"tinytape": [[0.5]]})
    assert report.table("ms", [row], ["tinytape"]).splitlines()[1].split() == ["a", "500", "2.00"]
    assert row.ratios == {}


@pytest.mark.parametrize(
    "value, text", [(None, "-"), (0.0123456, "0.0123"), (9.999, "10.0"), (1.5, "1.50"), (1234.5, "1234"), (0.0, "0.0")]
)
def test_significant_digits(value, text):
    assert report.digits(value) == text


def test_a_busy_machine_is_named():
    facts = {"cpu": "c", "cores": 2, "system": "s", "date": "d", "versions": {"numpy": "2"}}
    assert "BUSY" in runner.describe(facts | {"busy": 1.5}) and "BUSY" not in runner.describe(facts | {"busy": 0.0})
    assert 0 <= runner.machine(["numpy"])["busy"] < 1000


def test_absent_packages():
    assert runner.installed(["numpy", "numpy-loop", "no_such_package"]) == (
        ["numpy", "numpy-loop"],
        ["no_such_package"],
    )


def test_options_make_cases():
    options = "--cells gru --shapes 1,2,3,4 --layers 2 --loss last --no-input-gradient --lengths"
    args = scan.parse(options.split())
    wanted = Case("gru", 1, 2, 3, 4, layers=2, last=True, input_gradient=False, lengths=True)
    assert scan.chosen_cases(args, "gru") == [wanted]
    assert scan.chosen_cases(scan.parse(["--odd"]), "rnn") == cases.odd("rnn")
    assert [case.shape for case in scan.chosen_cases(scan.parse([]), "rnn")] == list(cases.SHAPES)
    token = scan.chosen_cases(scan.parse(["--mode", "token", "--dtype", "float64"]), "rnn")
    assert all(case.token and case.dtype == "float64" for case in token)


@pytest.mark.parametrize(
    "parse, options, complaint",
    [
        (scan.parse, "--shapes 1,2,3", "a shape is T,B,I,H"),
        (scan.parse, "--shapes 1,2,3,0", "a shape is T,B,I,H"),
        (scan.parse, "--shapes 1,2,3,x", "--shapes"),
        (scan.parse, "--rounds 0", "at least 1"),
        (scan.parse, "--odd --shapes 1,2,3,4", "shapes of its own"),
        (scan.parse, "--mode token --lengths", "goes with"),
        (scan.parse, "--cells lstm transformer", "transformer"),
        (lm.parse, "--hidden 0", "at least 1"),
        (memory.parse, "--rounds 0", "at least 1"),
        (start.parse, "--threads 0", "at least 1"),
    ],
)
def test_refused_options(parse, options, complaint, capsys):
    with pytest.raises(SystemExit):
        parse(options.split())
    assert complaint in capsys.readouterr().err


@pytest.mark.slow
def test_quick_run_of_tinytape_alone(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    files = [str(tmp_path / name) for name in ("out.json", "out.png")]
    options = ["--quick", "--cells", "lstm", "peephole", "--contenders", "tinytape", "--threads", "1"]
    assert scan.main([*options, "--json", files[0], "--picture", files[1]]) == 0
    assert "peephole LSTM" in capsys.readouterr().out
    found = json.loads(Path(files[0]).read_text())
    assert all(row["gflops"] > 0 for rows in found["tables"].values() for row in rows) and found["sgemm_gflops"] > 0
    assert Path(files[1]).read_bytes().startswith(b"\x89PNG")
