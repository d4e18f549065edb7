"""Files: exact round trips, whole or not at all, and clear words about damaged ones."""

import errno
import json
import math
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import tinytape as tt
from tinytape import io, nn, optim
from tinytape.engine.errors import DTypeError, InputError
from tinytape.engine.tensor import tensor

ROOT = Path(__file__).resolve().parent.parent
DTYPES = [*io.CODES]


def same(a, b):
    """Equal to the last bit, and of the same types."""
    if isinstance(a, np.ndarray):
        return type(b) is np.ndarray and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, float):
        return type(b) is float and struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


# ---- round trips ----------------------------------------------------------------------------------------------------

arrays = hnp.arrays(st.sampled_from(DTYPES), hnp.array_shapes(min_dims=0, min_side=0, max_dims=3, max_side=3))
scalars = st.none() | st.booleans() | st.integers() | st.integers(-(2**130), 2**130) | st.floats() | st.text(max_size=8)
keys = st.text(st.sampled_from("ab/~.0"), max_size=4)
trees = st.recursive(
    scalars | arrays,
    lambda x: st.dictionaries(keys, x, max_size=3) | st.lists(x, max_size=3) | st.lists(x, max_size=3).map(tuple),
    max_leaves=12,
)


@given(tree=st.dictionaries(keys, trees, max_size=4))
def test_any_state_comes_back_to_the_last_bit(tree, tmp_path_factory):
    path = tmp_path_factory.mktemp("io") / "run.safetensors"
    io.save_state(path, tree)
    assert same(tree, io.load_state(path))


@pytest.mark.parametrize(
    "value",
    [
        0.1, -0.0, 5e-324, math.inf, -math.inf, math.nan, struct.unpack("d", bytes([1, 0, 0, 0, 0, 0, 0xF8, 0xFF]))[0],
        2**63, -(2**64), 10**5000, True, None, "é\ud800\0", [], (), {}, [[1, (2.5, "x")], {"a": None}],
        {"~array": "x", "~0": 1, "a/b": {"c": 2}},
    ],
    ids=lambda value: repr(value)[:20] if not isinstance(value, int) else hex(value)[:20],
)  # fmt: skip
def test_plain_values(value, tmp_path):
    io.save_state(tmp_path / "x", {"value": value})
    assert same({"value": value}, io.load_state(tmp_path / "x"))


@pytest.mark.parametrize("generator", [np.random.PCG64, np.random.MT19937, np.random.Philox, np.random.SFC64])
def test_a_generators_state(generator, tmp_path):
    rng = np.random.Generator(generator(7))
    rng.random(5)
    io.save_state(tmp_path / "x", {"rng": rng.bit_generator.state})
    after = rng.random(3)
    rng.bit_generator.state = io.load_state(tmp_path / "x")["rng"]
    assert np.array_equal(rng.random(3), after)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_any_layout_any_byte_order(dtype, tmp_path):
    x = np.arange(24).reshape(2, 3, 4).astype(dtype)
    big_endian = x.astype(x.dtype.newbyteorder(">"))
    for array in (x, x.T, x[:, ::2], x[::-1], np.asfortranarray(x), big_endian, x[0, 0, 0], x[:0]):
        io.save(tmp_path / "x", {"x": array})
        loaded = io.load(tmp_path / "x")[0]["x"]
        assert loaded.dtype == np.dtype(dtype) and loaded.flags.writeable
        assert np.array_equal(loaded, array) and loaded.shape == np.shape(array)


def test_tensors_and_numpy_scalars_come_back_as_arrays(tmp_path):
    io.save_state(tmp_path / "x", {"t": tensor([1.0, 2.0], requires_grad=True), "s": np.float32(3), "n": np.int64(4)})
    back = io.load_state(tmp_path / "x")
    assert same(back, {"t": np.array([1, 2], "f4"), "s": np.array(3, "f4"), "n": np.array(4)})


def test_array_names_read_as_paths():
    arrays, _ = io.flatten_state({"model": {"lstm.weight_ih_l0": np.zeros(2)}, "h": (np.ones(1), [np.ones(2)])})
    assert sorted(arrays) == ["h/0", "h/1/0", "model/lstm.weight_ih_l0"]


def test_other_programs_can_read_our_files(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    x = {"a": np.arange(3, dtype=np.int8), "b": np.array(2.5), "c": np.zeros((0, 2), np.float32), "é": np.ones((2, 2))}
    io.save(tmp_path / "x", x, {"note": "naïve"})
    read = numpy.load_file(tmp_path / "x")
    assert all(np.array_equal(read[k], x[k]) and read[k].dtype == x[k].dtype for k in x) and len(read) == 4
    start = int.from_bytes((tmp_path / "x").read_bytes()[:8], "little") + 8
    header = json.loads((tmp_path / "x").read_bytes()[8:start])
    for name, array in x.items():  # aligned, also for those who map the file into memory
        assert (start + header[name]["data_offsets"][0]) % array.itemsize == 0


def test_we_can_read_other_programs_files(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    numpy.save_file({"w": np.ones((2, 3), np.float32)}, tmp_path / "x", metadata={"format": "pt", "checksum": "mine"})
    arrays, metadata = io.load(tmp_path / "x")
    assert same(arrays, {"w": np.ones((2, 3), np.float32)}) and metadata == {"format": "pt", "checksum": "mine"}


def test_the_same_content_gives_the_same_bytes(tmp_path):
    tree = {"b": np.ones(3), "a": {"x": 1, "y": np.zeros(2, "f4")}}
    program = (
        "import sys, numpy as np; from tinytape import io; "
        "io.save(sys.argv[1], {'b': np.ones(3), 'a': np.zeros(2)}, {c: c for c in 'qwertyuiop'})"
    )
    for name in "xy":
        io.save_state(tmp_path / name, tree)
        subprocess.run([sys.executable, "-c", program, str(tmp_path / (name * 2))], cwd=ROOT, check=True)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    assert (tmp_path / "xx").read_bytes() == (tmp_path / "yy").read_bytes()


# ---- whole or not at all --------------------------------------------------------------------------------------------

OLD, NEW = {"step": 1, "w": np.zeros(5)}, {"step": 2, "w": np.ones(100_000)}


@pytest.fixture
def old(tmp_path):
    io.save_state(tmp_path / "run", OLD)
    return tmp_path / "run"


def fail(number):
    def failing(*_, **__):
        raise OSError(number, os.strerror(number))

    return failing


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(old, monkeypatch, where):
    monkeypatch.setattr(os, where, fail(errno.ENOSPC))
    with pytest.raises(InputError, match=r"cannot be written \(80\d,\d+ bytes\): No space left"):
        io.save_state(old, NEW)
    monkeypatch.undo()
    assert same(io.load_state(old), OLD)
    assert os.listdir(old.parent) == ["run"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_a_write_that_really_fails(old):
    """The process may write 100 kB a file: the kernel itself refuses the rest, halfway through."""
    program = (
        "import resource, signal, sys, numpy as np; from tinytape import io, InputError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: io.save_state(sys.argv[1], {'w': np.ones(100_000)})\n"
        "except InputError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(old)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "cannot be written (800," in done.stdout and "File too large" in done.stdout and "help:" in done.stdout
    assert same(io.load_state(old), OLD)
    assert os.listdir(old.parent) == ["run"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_kill_leaves_the_old_file(old, where):
    program = (
        "import os, signal, sys, numpy as np; from tinytape import io\n"
        f"os.{where} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "io.save_state(sys.argv[1], {'w': np.ones(100_000)})"
    )
    done = subprocess.run([sys.executable, "-c", program, str(old)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert same(io.load_state(old), OLD)
    io.save_state(old, NEW)  # what the kill left behind is in nobody's way
    assert same(io.load_state(old), NEW)


def test_ctrl_c_leaves_the_old_file_and_nothing_else(old, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        io.save_state(old, NEW)
    monkeypatch.undo()
    assert same(io.load_state(old), OLD) and os.listdir(old.parent) == ["run"]


def test_the_file_is_on_the_disk_before_it_has_its_name(old, monkeypatch):
    calls = []
    real = {name: getattr(os, name) for name in ("fsync", "replace")}
    for name in real:
        monkeypatch.setattr(os, name, lambda *args, name=name: (calls.append(name), real[name](*args))[1])
    io.save_state(old, NEW)
    assert calls == ["fsync", "replace", "fsync"]  # the file, the rename, the folder


def test_mode_and_links_are_kept(old):
    old.chmod(0o640)
    link = old.parent / "link"
    link.symlink_to(old)
    io.save_state(link, NEW)
    assert link.is_symlink() and same(io.load_state(old), NEW)
    assert old.stat().st_mode & 0o777 == 0o640


def test_bad_content_never_touches_the_disk(old):
    for bad in (
        {"x": object()}, {"x": {1: 2}}, {"x": np.array(["a"])}, {"x": np.zeros(2, complex)}, {"x": {1, 2}}, [1],
        {"__metadata__": np.zeros(1)}, {"\ud800": np.zeros(1)},
    ):  # fmt: skip
        with pytest.raises(DTypeError, match="help:"):
            io.save_state(old, bad)
    with pytest.raises(DTypeError, match="'n'"):
        io.save(old, {}, {"n": 3})
    with pytest.raises(DTypeError, match="a/b/1 is a object"):
        io.flatten_state({"a": {"b": [1, object()]}})
    assert same(io.load_state(old), OLD) and os.listdir(old.parent) == ["run"]


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "no" / "such" / "file", tmp_path / "folder", Path(os.devnull)):
        with pytest.raises(InputError, match="cannot be written"):
            io.save_state(path, OLD)
    assert os.listdir(tmp_path) == ["folder"] and not Path(os.devnull).is_file()


# ---- damaged and foreign files --------------------------------------------------------------------------------------


def test_a_file_cut_anywhere_is_refused(old):
    whole = old.read_bytes()
    for size in [*range(0, len(whole), 7), len(whole) - 1]:
        old.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"not a whole safetensors file"):
            io.load_state(old)


def test_any_changed_byte_is_noticed(old):
    whole = bytearray(old.read_bytes())
    for i in range(len(whole)):
        changed = bytearray(whole)
        changed[i] ^= 0x15
        old.write_bytes(changed)
        try:
            same_after_all = same(io.load_state(old), OLD)  # a space of the header for another, say
        except InputError:
            continue
        assert same_after_all


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\0" * 64, b"PK\3\4" + bytes(99), b"\x80\x04K\x05." * 9, bytes(range(99, 1, -1))]
)
def test_foreign_bytes(content, tmp_path):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(InputError, match=f"{len(content)} bytes.*not a whole safetensors file"):
        io.load_state(tmp_path / "x")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match=r"nothere.*no such file"):
        io.load_state(tmp_path / "nothere")
    with pytest.raises(InputError, match="folder"):
        io.load_state(tmp_path)


def test_safetensors_of_others_versions_and_contradictions(tmp_path):
    path = tmp_path / "x"
    io.save(path, {"lstm.weight": np.zeros(3)}, {"format": "pt"})
    with pytest.raises(InputError, match=r"not one of save_state.*'pt'.*1 arrays \(lstm.weight\)"):
        io.load_state(path)
    io.save(path, {}, {"format": io.FORMAT, "version": "99", "tree": "{}"})
    with pytest.raises(InputError, match=r"version '99'.*'1'"):
        io.load_state(path)
    for arrays, text in (
        ({}, "{"), ({}, '{"a":{"~array":"b"}}'), ({"b": np.zeros(1)}, "{}"), ({}, "[]"), ({}, '{"a":{"~int":"zz"}}'),
        ({}, '{"a":{"~float":"00"}}'), ({}, '{"a":{"~tuple":3}}'),
    ):  # fmt: skip
        io.save(path, arrays, {"format": io.FORMAT, "version": io.VERSION, "tree": text})
        with pytest.raises(InputError, match="load_state"):
            io.load_state(path)


def test_dtypes_that_numpy_lacks_are_named(tmp_path):
    header = json.dumps({"x": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(InputError, match="bfloat16"):
        io.load(tmp_path / "x")


def test_safetensors_is_imported_only_for_a_file():
    program = "import sys, tinytape.io; print('safetensors' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ---- a whole run ----------------------------------------------------------------------------------------------------


class Run:
    """A small character model with everything that a run has: dropout, a carried state, a schedule, a vocabulary."""

    def __init__(self, seed):
        tt.manual_seed(seed)
        self.model = nn.ModuleList([nn.Embedding(7, 4), nn.LSTM(4, 5, num_layers=2, dropout=0.5), nn.Linear(5, 7)])
        self.optimizer = optim.Adam(self.model, clip_norm=0.5)
        self.scheduler = optim.Scheduler(self.optimizer, optim.schedule.cosine(1e-2, 0.0, 20, warmup=3))
        self.state = None
        self.step = 0

    def train(self, steps):
        embedding, lstm, head = self.model
        for _ in range(steps):
            ids = tt.default_generator.integers(0, 7, (6, 3))
            self.optimizer.zero_grad()
            y, (h, c) = lstm(embedding(ids), self.state)
            loss = nn.functional.cross_entropy(head(y), np.roll(ids, -1))
            loss.backward()
            norm = self.optimizer.step()
            self.scheduler.step()
            self.state = h.detach(), c.detach()
            self.step += 1
        return loss.item(), norm

    def save(self, path):
        rng = tt.default_generator.state()
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        tree = {name: part.state_dict() for name, part in parts.items()}
        io.save_state(path, tree | {"rng": rng, "carried": self.state, "step": self.step, "symbols": "abcdefg"})

    def load(self, path):
        tree = io.load_state(path)
        self.model.load_state_dict(tree["model"])
        self.optimizer.load_state_dict(tree["optimizer"])
        self.scheduler.load_state_dict(tree["scheduler"])
        tt.default_generator.set_state(tree["rng"])
        h, c = tree["carried"]
        self.state, self.step = (tt.tensor(h), tt.tensor(c)), tree["step"]


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path):
    before = tt.default_generator.state()
    try:
        whole = Run(seed=1)
        whole.train(4)
        whole.save(tmp_path / "half")
        last = whole.train(5)
        whole.save(tmp_path / "whole")
        resumed = Run(seed=2)
        resumed.load(tmp_path / "half")
        assert resumed.train(5) == last
        resumed.save(tmp_path / "resumed")
        assert (tmp_path / "whole").read_bytes() == (tmp_path / "resumed").read_bytes()
    finally:
        tt.default_generator.set_state(before)
