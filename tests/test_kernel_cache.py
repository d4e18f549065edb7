"""Compiled kernels on disk: found again, never trusted, announced once."""

import logging
import os
import stat
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest

from tinytape.compile import cache
from tinytape.kernels import compiler, fingerprint, folder, store

pytestmark = pytest.mark.skipif(not compiler.usable(), reason="needs Numba's compiler")

SOURCE = """\
from numba import njit

@njit(nogil=True)
def inner(x):
    return x * x

@njit(nogil=True, error_model="numpy")
def squares(a):
    total = 0.0
    for i in range(a.size):
        total += inner(a[i])
    return total
"""


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TINYTAPE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(folder, "_temporary", None)
    monkeypatch.setattr(folder, "_pruned", False)
    monkeypatch.setattr(cache, "_modules", {})
    monkeypatch.setattr(cache, "_told", 0)
    return tmp_path / "cache"


def compiled_by_a_run(name="test", source=SOURCE) -> int:
    """How many functions had to be compiled, with nothing left in this process of earlier loads."""
    cache._modules.clear()
    before = cache.compilations()
    assert cache.load(name, source).squares(np.arange(4.0)) == 14
    return cache.compilations() - before


def kernels():
    return sorted(folder.location().glob("*/*.kernel"))


def fresh(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | environment)


PROGRAM = f"""
import numpy as np
from tinytape.compile import cache
with cache.announced("Squares 3"):
    value = cache.load("test", {SOURCE!r}).squares(np.arange(4.0))
print(value, cache.compilations())
"""


# ---- found again ----------------------------------------------------------------------------------------------------


def test_compiled_once_for_this_machine():
    assert compiled_by_a_run() == 2
    assert compiled_by_a_run() == 0
    assert fresh(PROGRAM).stdout == "14.0 0\n"


def test_load_is_remembered():
    assert cache.load("test", SOURCE) is cache.load("test", SOURCE)
    assert cache.load("test", SOURCE) is not cache.load("test", SOURCE + "\n")
    assert cache.load("test", SOURCE) is not cache.load("another", SOURCE)


def test_other_types_are_compiled_and_kept_too():
    function = cache.load("test", SOURCE).squares
    function(np.arange(4.0))
    before = cache.compilations()
    assert function(np.arange(4, dtype=np.float32)) == 14
    assert cache.compilations() > before
    before = cache.compilations()
    cache._modules.clear()
    again = cache.load("test", SOURCE).squares
    assert again(np.arange(4, dtype=np.float32)) == 14 == again(np.arange(4.0))
    assert again(np.arange(100.0)) == (np.arange(100.0) ** 2).sum()  # and other sizes are no other types
    assert cache.compilations() == before


def test_everything_lies_in_the_folder(empty_folder):
    compiled_by_a_run("LSTMCell(3, 4) ../x")
    module = cache.load("LSTMCell(3, 4) ../x", SOURCE)
    assert module.__file__.startswith(str(empty_folder / fingerprint.fingerprint() / "LSTMCell_3_4_x_"))
    assert {path.suffix for path in empty_folder.glob("*/*")} <= {".py", ".kernel"}
    assert module.squares.stats.cache_path == str(empty_folder / fingerprint.fingerprint())


def test_other_users_may_read_what_the_umask_lets_them(monkeypatch):
    before = os.umask(0o022)
    try:
        compiled_by_a_run()
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in kernels()} <= {0o644, 0o666}


def test_a_function_in_a_closure_is_told_by_what_it_is():
    source = """\
from numba import njit
from tinytape.kernels.store import keep

def make(factor, inner):
    @njit
    def scaled(x):
        return inner(x) * factor
    return keep(scaled)

@keep
@njit
def double(x):
    return 2 * x

@keep
@njit
def triple(x):
    return 3 * x

made = [make(1, double), make(1, triple), make(10, triple)]
"""
    expected = [14, 21, 210]
    assert [function(7) for function in cache.load("closures", source).made] == expected
    before = cache.compilations()
    cache._modules.clear()
    assert [function(7) for function in cache.load("closures", source).made] == expected
    assert cache.compilations() == before


def test_an_error_in_the_source_leaves_nothing_behind():
    modules = set(sys.modules)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            cache.load("wrong", "1 / 0")
    assert set(sys.modules) == modules


# ---- never trusted --------------------------------------------------------------------------------------------------


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(
    "spoil",
    [lambda data: b"", lambda data: data[:-1], lambda data: data[:20], lambda data: b"\0" * len(data), flipped],
    ids=["empty", "truncated", "a stump", "zeros", "one bit"],
)
def test_a_spoilt_file_is_compiled_anew_and_written_over(spoil):
    compiled_by_a_run()
    good = {path: path.read_bytes() for path in kernels()}
    for path, data in good.items():
        path.write_bytes(spoil(data))
    assert compiled_by_a_run() == 2
    assert compiled_by_a_run() == 0
    assert kernels() == sorted(good)


def test_a_file_under_the_name_of_another_is_not_used():
    compiled_by_a_run()
    first, second = (path.read_bytes() for path in kernels())
    for path, data in zip(kernels(), (second, first), strict=True):
        path.write_bytes(data)
    assert compiled_by_a_run() == 2


def test_a_folder_in_the_place_of_a_file():
    compiled_by_a_run()
    for path in kernels():
        path.unlink()
        path.mkdir()
    with pytest.warns(RuntimeWarning, match="cannot be kept"):
        assert compiled_by_a_run() == 2


def test_the_text_that_is_given_runs_and_not_that_in_the_file():
    module = cache.load("test", SOURCE)
    with open(module.__file__, "a") as file:
        file.write("raise SystemExit\n")
    compiled_by_a_run()
    with open(module.__file__) as file:
        assert file.read() == SOURCE


def test_the_fingerprint_knows_the_kernels_and_the_processor(monkeypatch, tmp_path):
    (tmp_path / "a.py").write_text("a = 1")

    def found():
        return fingerprint.fingerprint.__wrapped__()

    here = found()
    monkeypatch.setattr(fingerprint, "__file__", str(tmp_path / "fingerprint.py"))
    one = found()
    (tmp_path / "a.py").write_text("a = 2")
    two = found()
    (tmp_path / "b.py").write_text("")
    three = found()
    monkeypatch.setenv("NUMBA_CPU_NAME", "nehalem")
    four = found()
    monkeypatch.setenv("NUMBA_CPU_FEATURES", "+sse4.2,+ssse3")
    five = found()
    monkeypatch.setattr(fingerprint.llvm, "get_host_cpu_name", lambda: "another")
    six = found()
    assert len({here, one, two, three, four, five, six}) == 7
    monkeypatch.setenv("NUMBA_NUM_THREADS", "1")  # which no code depends on
    assert found() == six
    monkeypatch.setattr(fingerprint, "HEAD", -1)
    assert found() != six


def test_the_fingerprint_knows_what_lies_in_the_current_folder(monkeypatch, tmp_path):
    before = fingerprint.fingerprint.__wrapped__()
    monkeypatch.chdir(tmp_path)
    assert fingerprint.fingerprint.__wrapped__() == before
    (tmp_path / ".numba_config.yaml").write_text("opt: 0")
    assert fingerprint.fingerprint.__wrapped__() != before


def test_the_fingerprint_knows_numbas_version(monkeypatch, tmp_path):
    """It is read from the file that releases have; what has no such file is asked."""
    import numba

    assert f'"version": "{numba.__version__}"'.encode() in fingerprint._numba()
    found = fingerprint.find_spec("numba")
    found.origin = str(tmp_path / "__init__.py")
    monkeypatch.setattr(fingerprint, "find_spec", lambda name: found)
    assert fingerprint._numba() == numba.__version__
    monkeypatch.setattr(fingerprint, "find_spec", lambda name: None)
    assert fingerprint._numba() == ""


def test_numba_still_asks_the_store():
    """The store stands in for an object that Numba's dispatchers hold under a private name."""
    function = cache.load("test", SOURCE).squares
    assert isinstance(function._cache, store.Store)
    assert type(function._cache).__mro__[1].__abstractmethods__ <= set(vars(store.Store))


# ---- folders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TINYTAPE_CACHE_DIR": "/a", "NUMBA_CACHE_DIR": "/b", "XDG_CACHE_HOME": "/c"}, "/a"),
        ({"NUMBA_CACHE_DIR": "/b", "XDG_CACHE_HOME": "/c"}, "/b/tinytape"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/tinytape"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="paths")
def test_location(monkeypatch, environment, expected):
    for name in ("TINYTAPE_CACHE_DIR", "NUMBA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(folder.location()) == expected


def unwritable(monkeypatch, tmp_path):
    """A folder that cannot be made, whoever runs the tests: a file is in its way."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TINYTAPE_CACHE_DIR", str(tmp_path / "file" / "cache"))


def test_an_unwritable_folder_is_warned_of_once(monkeypatch, tmp_path):
    unwritable(monkeypatch, tmp_path)
    assert not folder.writable()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert compiled_by_a_run() == 2
        assert compiled_by_a_run("another") == 2
        assert compiled_by_a_run("another") == 0
    (warning,) = caught
    assert "TINYTAPE_CACHE_DIR" in str(warning.message) and str(tmp_path) in str(warning.message)


def test_a_folder_that_cannot_even_be_looked_for(monkeypatch, tmp_path):
    program = "from tinytape.kernels import compiler; print(compiler.usable())\n" + PROGRAM
    done = fresh(program, TINYTAPE_CACHE_DIR=str(tmp_path / ("x" * 300)))
    assert done.stdout == "True\n14.0 2\n"
    assert done.stderr.count("RuntimeWarning") == 1


def test_a_spoilt_file_that_cannot_be_written_over(monkeypatch):
    compiled_by_a_run()
    for path in kernels():
        path.write_bytes(b"")
    write = folder._write

    def refuse(path, data):
        if path.is_relative_to(folder.location()):
            raise PermissionError(13, "Permission denied")
        return write(path, data)

    monkeypatch.setattr(folder, "_write", refuse)
    with pytest.warns(RuntimeWarning, match="cannot be kept"):
        assert compiled_by_a_run() == 2
    assert compiled_by_a_run() == 0, "the temporary folder has a good one"


def test_a_long_name_makes_no_long_file_name():
    assert compiled_by_a_run("a cell" * 100) == 2
    assert compiled_by_a_run("a cell" * 100) == 0


def test_the_temporary_folder_goes_with_the_process(monkeypatch, tmp_path):
    unwritable(monkeypatch, tmp_path)
    (tmp_path / "temporary").mkdir()
    done = fresh(PROGRAM, TMPDIR=str(tmp_path / "temporary"))
    assert done.stdout == "14.0 2\n"
    assert done.stderr.count("RuntimeWarning") == 1
    assert list((tmp_path / "temporary").iterdir()) == []


def test_no_folder_at_all(monkeypatch, tmp_path):
    unwritable(monkeypatch, tmp_path)

    def nowhere(*args, **options):
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr(folder.tempfile, "mkdtemp", nowhere)
    assert compiled_by_a_run() == 2


def test_a_folder_that_can_only_be_read_is_read(monkeypatch):
    compiled_by_a_run()

    def refuse(path, data):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(folder, "_write", refuse)
    assert compiled_by_a_run() == 0


def test_processes_that_start_together(empty_folder):
    command = [sys.executable, "-c", PROGRAM]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    results = [process.communicate(timeout=120) for process in started]
    for out, error in results:
        assert out.startswith("14.0 "), error
        assert "Warning" not in error
    assert list(empty_folder.glob("*/*.writing")) == []
    assert compiled_by_a_run() == 0


def test_pruning(empty_folder):
    now, day = time.time(), 86400

    def put(name, size, age):
        path = empty_folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size))
        os.utime(path, (now - age, now - age))
        return path

    old = put("0123456789abcdef/a.kernel", 10, 61 * day)
    new = put("fedcba9876543210/b.kernel", 100, 10)
    older = put("fedcba9876543210/c.py", 100, 2 * day)
    oldest = put("fedcba9876543210/d.kernel", 100, 3 * day)
    writing = put("fedcba9876543210/e.writing", 1, 60)
    abandoned = put("fedcba9876543210/f.writing", 1, day)
    others = [put("fedcba9876543210/notes.txt", 1000, 99 * day), put("mine/b.kernel", 1000, 99 * day)]
    folder.prune()
    assert not old.parent.exists() and not abandoned.exists()
    assert all(path.exists() for path in (new, older, oldest, writing, *others))
    assert folder.size() == 301
    folder.prune(limit=201)
    assert not oldest.exists()
    assert all(path.exists() for path in (new, older, writing, *others))


def test_use_keeps_a_file_young():
    compiled_by_a_run()
    for path in kernels():
        os.utime(path, (0, 0))
    compiled_by_a_run()
    used = [path for path in kernels() if path.stat().st_mtime > time.time() - 3600]
    assert [path.name.partition("-")[0] for path in used] == ["squares"]  # `inner` is in its code


# ---- announced once -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("environment", [{}, {"TINYTAPE_QUIET": "1"}])
def test_compiling_is_announced_on_standard_error(environment):
    first = fresh(PROGRAM, **environment)
    assert first.stdout == "14.0 2\n"
    if environment:
        assert first.stderr == ""
    else:
        assert first.stderr.startswith("tinytape: compiling Squares 3, once for this machine: ")
        assert first.stderr.endswith(" s\n") and first.stderr.count("\n") == 1
    assert fresh(PROGRAM, **environment).stderr == ""


def test_or_by_the_log_where_there_is_one(caplog, capsys):
    with caplog.at_level(logging.INFO, "tinytape.compile"):
        for label in ("first", "second"):
            with cache.announced("all"), cache.announced(label):
                compiled_by_a_run()
    (record,) = caplog.records
    assert record.levelname == "INFO" and "compiling first" in record.message
    assert capsys.readouterr() == ("", "")


def test_the_level_of_the_logger_silences_it():
    quiet = "import logging; logging.getLogger('tinytape.compile').setLevel(logging.WARNING)\n"
    assert fresh(quiet + PROGRAM).stderr == ""
