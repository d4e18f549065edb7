"""Tasks run once each, on several threads, whatever happens meanwhile."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinytape as tt
from tinytape import runtime
from tinytape.kernels import compiler, threads


@pytest.fixture(autouse=True)
def three_threads(monkeypatch):
    monkeypatch.setattr(threads, "_threads", 3)


def program(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, which must end by itself."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | environment)


@given(n=st.integers(0, 20), count=st.integers(1, 5))
def test_every_task_runs_once(n, count):
    before, threads._threads = threads._threads, count
    try:
        calls = [0] * n

        def task(index):
            calls[index] += 1

        threads.run(task, n)
    finally:
        threads._threads = before
    assert calls == [1] * n


def test_tasks_run_side_by_side_and_the_first_on_the_caller():
    barrier, ran_on = threading.Barrier(3, timeout=30), {}

    def task(index):
        barrier.wait()  # passed only if three threads are inside
        ran_on[index] = threading.get_ident()

    threads.run(task, 3)
    assert ran_on[0] == threading.get_ident()
    assert len(set(ran_on.values())) == 3


def test_with_one_thread_tasks_run_in_order_on_the_caller(monkeypatch):
    monkeypatch.setattr(threads, "_threads", 1)
    ran = []
    threads.run(lambda index: ran.append((index, threading.get_ident())), 4)
    assert ran == [(index, threading.get_ident()) for index in range(4)]


@pytest.mark.parametrize("guilty", [{0}, {1}, {2, 3}, {0, 1, 2, 3, 4}])
def test_the_error_of_the_lowest_index_is_raised(guilty):
    barrier = threading.Barrier(min(3, len(guilty)), timeout=30)

    def task(index):
        if index in guilty:
            if index in sorted(guilty)[:3]:
                barrier.wait()  # so that all of them fail, and none is left out because of another
            raise ValueError(f"task {index}")

    with pytest.raises(ValueError, match=f"task {min(guilty)}"):
        threads.run(task, 5)
    threads.run(lambda index: None, 5)


def test_tasks_that_have_not_begun_when_one_fails_are_left_out(monkeypatch):
    monkeypatch.setattr(threads, "_threads", 2)
    failed, ran = threading.Event(), []

    def task(index):
        if index == 0:
            failed.set()
            raise ValueError
        failed.wait(30)
        ran.append(index)

    with pytest.raises(ValueError):
        threads.run(task, 1000)
    assert len(ran) < 1000 - 1


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_holds_on_to_the_task(fails):
    class Array:
        pass

    def call():
        array = Array()

        def task(index):
            assert array is not None
            if fails and index == 1:
                raise ValueError

        with contextlib.suppress(ValueError):
            threads.run(task, 3)
        return weakref.ref(array)

    gc.disable()
    try:
        found = call()
        deadline = time.monotonic() + 30
        while found() is not None and time.monotonic() < deadline:  # a worker may be letting go of it just now
            time.sleep(0.001)
        assert found() is None
    finally:
        gc.enable()


def test_a_task_may_call_run():
    calls = np.zeros((4, 4), int)

    def outer(i):
        def inner(j):
            calls[i, j] += 1

        threads.run(inner, 4)

    for _ in range(50):
        threads.run(outer, 4)
    assert (calls == 50).all()


def test_many_callers_at_once():
    totals = [0] * 8

    def call(who):
        for turn in range(200):
            parts = [0] * 5

            def task(index, parts=parts, turn=turn):
                parts[index] = turn * 10 + index

            threads.run(task, 5)
            totals[who] += sum(parts)

    callers = [threading.Thread(target=call, args=(who,)) for who in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert totals == [sum(turn * 50 + 10 for turn in range(200))] * 8


def test_a_caller_does_not_wait_for_the_work_of_another():
    """One call keeps all workers busy until another call, begun later, is done."""
    started, done = threading.Barrier(4, timeout=30), threading.Event()

    def long(index):
        started.wait()
        assert done.wait(30)

    first = threading.Thread(target=threads.run, args=(long, 3))
    first.start()
    started.wait()
    calls = []
    threads.run(calls.append, 6)
    done.set()
    first.join(30)
    assert sorted(calls) == list(range(6))


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("caller_has_ended", [False, True])
def test_an_interrupted_caller_waits_for_the_workers(monkeypatch, caller_has_ended):
    """Two of control-C while a worker is still writing: control comes back when it is done."""
    monkeypatch.setattr(threads, "_threads", 2)
    begun, finished = threading.Event(), []

    def task(index):
        if index == 1:
            begun.set()
            for _ in range(2):
                time.sleep(0.1)
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            time.sleep(0.2)
            finished.append(index)
        else:
            begun.wait(30)
            if not caller_has_ended:
                time.sleep(10)

    with pytest.raises(KeyboardInterrupt):
        threads.run(task, 2)
    assert finished == [1]
    threads.run(lambda index: None, 2)


@pytest.mark.skipif(not compiler.usable(), reason="needs Numba's compiler")
def test_a_look_at_memory_that_another_thread_changes():
    from tinytape.kernels.spin import wait_for_change

    word = np.zeros(1, np.int64)
    for_ever = 10**15
    wait_for_change(word.ctypes.data, 1, for_ever)  # it is not 1, so this returns
    wait_for_change(word.ctypes.data, 0, 10)  # it stays 0, but patience has an end
    waiting = threading.Thread(target=wait_for_change, args=(word.ctypes.data, 0, for_ever), daemon=True)
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    word[0] = 1
    waiting.join(30)
    assert not waiting.is_alive()


FORK = """
import os, sys, threading
from tinytape.kernels import threads
threads.set_num_threads(3)
def both(index):
    barrier.wait()
def check():
    global barrier
    barrier = threading.Barrier(3, timeout=20)
    threads.run(both, 3)
check()
child = os.fork()
check()
if not child:
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_parent_and_child_both_run_after_a_fork():
    done = program(FORK)
    assert done.returncode == 0, done.stderr


def test_the_interpreter_ends_while_a_thread_is_at_work():
    code = """
import threading, time
from tinytape.kernels import threads
threads.set_num_threads(2)
begun = threading.Barrier(3, timeout=20)
def task(index):
    begun.wait()
    time.sleep(1000)
threading.Thread(target=threads.run, args=(task, 2), daemon=True).start()
begun.wait()
print("end")
"""
    done = program(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


def test_run_at_exit():
    done = program(
        "import atexit\nfrom tinytape.kernels import threads\nthreads.set_num_threads(2)\n"
        "ran = []\natexit.register(lambda: (threads.run(ran.append, 4), print(sorted(ran))))"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[0, 1, 2, 3]\n", "")


COUNT = "import tinytape.runtime as r; print(r.get_num_threads())"


def test_the_environment_says_how_many():
    assert program(COUNT, TINYTAPE_NUM_THREADS="7").stdout == "7\n"
    without = program(COUNT, TINYTAPE_NUM_THREADS="")
    assert (without.stdout, without.stderr) == (f"{threads.processors()}\n", "")


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_a_number_of_threads_that_is_none_is_warned_of(text):
    done = program(COUNT, TINYTAPE_NUM_THREADS=text)
    assert done.stdout == f"{threads.processors()}\n"
    assert f"TINYTAPE_NUM_THREADS is '{text}'" in done.stderr


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs affinity")
def test_a_process_bound_to_one_processor_uses_one_thread():
    bind = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
    assert program(bind + COUNT, TINYTAPE_NUM_THREADS="").stdout == "1\n"


@pytest.mark.parametrize(
    ("text", "expected"), [("300000 100000\n", 3), ("350000 100000", 3), ("max 100000", None), ("", None)]
)
def test_the_quota_of_a_container(tmp_path, text, expected):
    (tmp_path / "cpu.max").write_text(text)
    assert threads._quota(str(tmp_path / "cpu.max")) == (expected or os.cpu_count())
    assert threads._quota(str(tmp_path / "none")) == os.cpu_count()


def test_without_the_interpreters_lock_the_caller_does_all(monkeypatch):
    monkeypatch.setattr(threads, "_SHARES", False)
    done = []
    threads.run(lambda k: done.append((k, threading.current_thread())), 5)
    assert done == [(k, threading.main_thread()) for k in range(5)]


def test_set_num_threads():
    runtime.set_num_threads(np.int64(2))
    assert runtime.get_num_threads() == 2


@pytest.mark.parametrize("n", [0, -1, 1.5, "2", None, True])
def test_set_num_threads_refuses(n):
    with pytest.raises(tt.InputError, match=r"set_num_threads: n is .*\n.*integer of 1 or more"):
        runtime.set_num_threads(n)
    assert runtime.get_num_threads() == 3
