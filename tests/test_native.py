"""Kernels as C functions: found without Numba, never trusted, and Numba's own where they cannot be loaded."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

import tinytape as tt
from tinytape.compile import attempt, cache
from tinytape.kernels import compiler, folder, native

pytestmark = pytest.mark.skipif(not compiler.usable(), reason="needs Numba's compiler")

SOURCE = """\
from numba import njit

@njit
def weighted(a, b, c):
    return a + 10 * b + 100 * c

@njit
def nothing(a):
    pass
"""


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TINYTAPE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(folder, "_temporary", None)
    monkeypatch.setattr(cache, "_modules", {})
    monkeypatch.setattr(native, "_found", {})
    return tmp_path / "cache"


def call(*numbers):
    """What a kernel gives, and how many functions had to be compiled, with nothing left of earlier calls."""
    cache._modules.clear()
    native._found.clear()
    before = native.compilations()
    return cache.kernel("test", SOURCE, "weighted", 3)(*numbers), native.compilations() - before


def fresh(code: str, **environment: str) -> str:
    command = [sys.executable, "-c", code]
    settings = os.environ | {"TINYTAPE_QUIET": "1"} | environment
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=settings)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout.strip()


def kernels():
    return sorted(folder.location().glob("*/*.native"))


# ---- as functions of C ----------------------------------------------------------------------------------------------


def test_integers_in_and_out():
    assert call(1, 2, 3) == (321, 1)
    assert call(-1, 0, 1 << 40) == ((100 << 40) - 1, 0)
    assert cache.kernel("test", SOURCE, "nothing", 1)(5) == 0


def test_bytes_are_an_address():
    source = """\
from numba import njit
from tinytape.kernels.table import word

@njit
def second(at):
    return word(at, 1)
"""
    words = np.arange(7, 10).tobytes()
    assert cache.kernel("test", source, "second", 1)(words) == 8
    dispatcher = cache.load("test", source).second
    assert native._dispatched(dispatcher, words) == 8


def test_a_zero_comes_first():
    source = "from numba import njit\n\n@njit\ndef size(zero, n):\n    return int(n + zero) if zero == 0 else -1\n"
    for kind in ("float32", "float64"):
        functions = native.functions(kind, {"size": 1}, lambda: vars(cache.load("test", source)), kind)
        assert functions["size"](7) == 7


@pytest.mark.parametrize(
    ("expression", "expected"),
    [("a > 3", 1), ("a < 3", 0), ("int32(-a)", -9), ("uint8(a)", 9), ("5", 5), ("a * 0.5", 4.5), ("None", 0)],
)
def test_what_a_kernel_gives_is_an_integer_or_is_left_to_numba(expression, expected):
    source = f"from numba import int32, njit, uint8\n\n@njit\ndef found(a):\n    return {expression}\n"
    assert cache.kernel("test", source, "found", 1)(9) == expected


def test_other_threads_run_meanwhile():
    """A kernel that waits for what another thread writes would never return if it held the interpreter."""
    flag = np.zeros(1, np.int64)
    wait = native.module("spin", wait_for_change=3).wait_for_change
    timer = threading.Timer(0.05, lambda: flag.fill(1))
    timer.start()
    wait(flag.ctypes.data, 0, 1 << 40)
    timer.join()
    assert flag[0] == 1


def test_threads_that_ask_together_compile_once():
    before, found = native.compilations(), []
    threads = [
        threading.Thread(target=lambda: found.append(cache.kernel("test", SOURCE, "weighted", 3))) for _ in "abc"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert native.compilations() == before + 1
    assert found[0] is found[1] is found[2]


# ---- found again ----------------------------------------------------------------------------------------------------

GRADIENT = """
import sys, numpy as np, tinytape as tt
import tinytape.ops.softmax
from tinytape.compile.cache import compilations
layer = tt.nn.RNN(3, 5, generator=tt.random.Generator(0))
x = tt.tensor(np.linspace(-1, 1, 24, dtype=np.float32).reshape(4, 2, 3), requires_grad=True)
tinytape.ops.softmax.LEAST = 0
tt.cross_entropy(layer(x)[0].reshape(8, 5), np.arange(8) % 5).backward()
optimizer = tt.optim.SGD(layer.parameters(), lr=0.1, clip_norm=1.0)
optimizer.step()
values = b"".join(t.numpy().tobytes() for t in (x.grad, *layer.parameters()))
print("numba" in sys.modules, compilations(), values.hex())
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which a process has left its kernels, and what it computed."""
    path = tmp_path_factory.mktemp("trained")
    imported, compiled, values = fresh(GRADIENT, TINYTAPE_CACHE_DIR=str(path)).split()
    assert imported == "True" and int(compiled) > 0
    return path, values


@pytest.fixture
def others(trained, monkeypatch):
    """That process's folder for this test, and what it computed."""
    path, values = trained
    monkeypatch.setenv("TINYTAPE_CACHE_DIR", str(path))
    return values


def test_the_next_process_does_without_numba(others):
    assert fresh(GRADIENT).split() == ["False", "0", others]
    with_numba = GRADIENT.replace("import sys", "import numba, sys")
    assert fresh(with_numba).split() == ["True", "0", others]


def test_numba_itself_gives_the_same(others):
    """Where object code cannot be loaded, the kernels run as Numba's dispatchers."""
    for broken in ("_loaded = lambda code: None", "_able = lambda: False"):
        imported, _, values = fresh(f"from tinytape.kernels import native; native.{broken}\n{GRADIENT}").split()
        assert imported == "True" and values == others


def test_code_says_what_it_needs(others):
    """Nothing is left undefined but what the list has, and that is nothing of Python's or Numba's."""
    assert len(kernels()) >= 6
    for path in kernels():
        code = native.Code.unpacked(folder.read_checked(path.parent.name, path.name))
        undefined = undefined_symbols(code.text)
        assert undefined <= set(code.needs), path.name
        ours = {name for name in undefined if name.startswith("tinytape_")}
        assert undefined - ours <= {"memcpy", "memmove", "memset"}, path.name


@pytest.mark.parametrize("environment", [{"NUMBA_OPT": "1"}, {"NUMBA_CPU_FEATURES": "+sse2"}])
def test_other_settings_of_numba_have_their_own_files(environment):
    program = f"from tinytape.compile import cache; cache.kernel('test', {SOURCE!r}, 'weighted', 3)"
    fresh(program)
    fresh(program, **environment)
    assert len(kernels()) == 2 == len({path.parent for path in kernels()})


def test_a_file_that_lacks_a_function_is_compiled_anew():
    cache.kernel("test", SOURCE, "weighted", 3)
    stem = kernels()[0].stem.rpartition(".")[0]
    origin = lambda: vars(cache.load("test", SOURCE))  # noqa: E731
    native._found.clear()
    both = native.functions(f"{stem}.weighted", {"weighted": 3, "nothing": 1}, origin)
    assert both["weighted"](1, 2, 3) == 321 and both["nothing"](0) == 0


@pytest.mark.parametrize("environment", [{}, {"NUMBA_WARNINGS": "0"}])
def test_what_a_program_sets_itself_is_not_kept(environment):
    program = f"from tinytape.compile import cache; cache.kernel('test', {SOURCE!r}, 'weighted', 3)"
    fresh("from numba import config; config.OPT = type(config.OPT)(0)\n" + program, **environment)
    assert not kernels()


def test_a_forked_child_compiles_for_itself():
    pytest.importorskip("fcntl", reason="needs fork")
    code = f"""
import os
from tinytape.compile import attempt, cache
source = {SOURCE!r}
cache.kernel("test", source, "nothing", 1)(0)
child = os.fork()
value = cache.kernel("test", source, "weighted", 3)(1, 2, 3)
if child == 0:
    os._exit(value % 256)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 321 % 256 and value == 321
"""
    fresh(code)


def test_a_child_forked_while_another_thread_compiles():
    pytest.importorskip("fcntl", reason="needs fork")
    code = f"""
import os, signal, threading, time
from tinytape.compile import attempt, cache
source = {SOURCE!r}
cache.kernel("test", source, "nothing", 1)(0)
ended = False
def compile_all_the_time():
    i = 0
    while not ended:
        i += 1
        cache.kernel("test", source + f"# {{i}}", "weighted", 3)
thread = threading.Thread(target=compile_all_the_time)
thread.start()
for i in range(3):
    time.sleep(0.05)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os._exit(cache.kernel("test", source + f"# child {{i}}", "weighted", 3)(1, 2, 3) % 256)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 321 % 256
ended = True
thread.join()
"""
    fresh(code)


def test_the_interpreter_ends_while_a_kernel_runs():
    code = """
import threading, time, numpy as np
from tinytape.kernels import native
wait = native.module("spin", wait_for_change=3).wait_for_change
flag = np.zeros(1, np.int64)
threading.Thread(target=wait, args=(flag.ctypes.data, 0, 1 << 40), daemon=True).start()
time.sleep(0.05)
"""
    fresh(code)
    fresh(code)


# ---- never trusted --------------------------------------------------------------------------------------------------


def flipped(data: bytes) -> bytes:
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


@pytest.mark.parametrize(
    "spoil",
    [lambda data: b"", lambda data: data[:-1], lambda data: data[:40], lambda data: b"\0" * len(data), flipped],
    ids=["empty", "truncated", "a stump", "zeros", "one bit"],
)
def test_a_spoilt_file_is_compiled_anew_and_written_over(spoil):
    call(1, 2, 3)
    (path,) = kernels()
    good = path.read_bytes()
    path.write_bytes(spoil(good))
    assert call(1, 2, 3) == (321, 1)
    assert call(1, 2, 3) == (321, 0)


def test_a_file_from_another_machine_is_not_used():
    call(1, 2, 3)
    (path,) = kernels()
    data = path.read_bytes()
    other = path.parent.with_name("0" * 16) / path.name
    other.parent.mkdir()
    other.write_bytes(data)
    assert folder.read_checked(other.parent.name, other.name) is None
    assert folder.read_checked(path.parent.name, path.name) == data[32:]


def rewritten(**changes):
    """Put other code into the one file, with a checksum that fits."""
    (path,) = kernels()
    code = native.Code.unpacked(folder.read_checked(path.parent.name, path.name))
    folder.write_checked(path.parent.name, path.name, code._replace(**changes).packed())


def test_code_that_needs_what_is_not_here_is_left_alone():
    """LLVM would end the process."""
    call(1, 2, 3)
    rewritten(needs=["memset", "no_such_function"])
    assert call(1, 2, 3) == (321, 1)
    rewritten(needs=["tinytape_no_such_routine_float128"])
    assert call(1, 2, 3) == (321, 1)


def test_a_function_that_the_code_has_not_is_not_called():
    call(1, 2, 3)
    rewritten(symbols={"weighted": "no_such_function"})
    assert call(1, 2, 3) == (321, 1)


def undefined_symbols(text: bytes) -> set[str]:
    """Of an object file for ELF on 64 bits."""
    if text[:5] != b"\x7fELF\x02":
        pytest.skip("another kind of object file")
    word = lambda at, size: int.from_bytes(text[at : at + size], sys.byteorder)  # noqa: E731
    table, size, count = word(0x28, 8), word(0x3A, 2), word(0x3C, 2)
    heads = [table + size * i for i in range(count)]
    found = set()
    for head in heads:
        if word(head + 4, 4) != 2:  # no table of symbols
            continue
        names = word(heads[word(head + 0x28, 4)] + 0x18, 8)
        start, length = word(head + 0x18, 8), word(head + 0x20, 8)
        for at in range(start + 24, start + length, 24):  # the first one is empty
            if word(at + 6, 2) == 0:
                begin = names + word(at, 4)
                found.add(text[begin : text.index(b"\0", begin)].decode())
    return found


# ---- folders --------------------------------------------------------------------------------------------------------


def test_where_nothing_can_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TINYTAPE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(RuntimeWarning, match="cannot be kept"):
        assert call(1, 2, 3) == (321, 1)
    assert call(1, 2, 3) == (321, 0), "this process keeps them in a folder of its own"


def test_processes_that_start_together():
    program = f"from tinytape.compile import cache; print(cache.kernel('test', {SOURCE!r}, 'weighted', 3)(1, 2, 3))"
    started = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate(timeout=240)[0] for process in started] == ["321\n"] * 3
    assert call(1, 2, 3) == (321, 0)


def test_warmup_fills_the_folder(monkeypatch):
    monkeypatch.setattr(native, "_found", {})  # as in a process that has run none yet
    attempt._plans.clear()
    assert not kernels()
    tt.warmup(tt.nn.RNN(3, 4), (2, 1, 3))
    assert any(path.name.startswith("RNN_") for path in kernels())
