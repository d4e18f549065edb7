"""The pool of memory: what is live never overlaps, what comes back is used again, and the account is exact."""

import gc
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

import tinytape as tt
from tinytape import runtime
from tinytape.kernels import workspace

MANY = 2**40


@pytest.fixture(autouse=True)
def fresh_pool(monkeypatch):
    pool = workspace._Pool()
    pool.set_limit(MANY)
    monkeypatch.setattr(workspace, "_pool", pool)


def rounded(nbytes):
    return (nbytes + 63) // 64 * 64


def allocations(monkeypatch):
    """The sizes that are allocated from now on."""
    made, allocate = [], workspace.Chunk
    monkeypatch.setattr(workspace, "Chunk", lambda capacity: (made.append(capacity), allocate(capacity))[1])
    return made


@given(nbytes=st.integers(0, 2**50))
def test_size_classes_are_few_and_close(nbytes):
    capacity = workspace._capacity(nbytes)
    assert capacity % 64 == 0
    assert max(nbytes, 64) <= capacity <= max(64, rounded(nbytes), 1.25 * nbytes)
    assert workspace._capacity(capacity) == capacity
    assert f"{capacity:b}".rstrip("0") in {"1", "11", "101", "111"}


@given(nbytes=st.integers(0, 100_000))
def test_blocks_are_aligned_and_their_arrays_writable(nbytes):
    block = workspace.take(nbytes)
    assert block.nbytes == nbytes and block.address % 64 == 0
    whole = block.array(np.uint8, (nbytes,))
    assert whole.ctypes.data == block.address or nbytes == 0
    whole[:] = 7
    assert whole.flags.c_contiguous and whole.flags.writeable


@given(nbytes=st.integers(0, 2 * workspace.LEAST))
def test_little_memory_is_not_of_the_pool(nbytes):
    memory = workspace.take_any(nbytes)
    assert memory.nbytes == nbytes and memory.address % 64 == 0
    assert workspace.usage().in_use == (rounded(nbytes) if nbytes >= workspace.LEAST else 0)
    whole = memory.view(np.uint8, (nbytes,))
    assert whole.ctypes.data == memory.address or nbytes == 0
    whole[:] = 7
    half = memory.view(np.uint8, (nbytes // 2,), nbytes - nbytes // 2)
    half[:] = 1
    assert whole.sum() == 7 * (nbytes - nbytes // 2) + nbytes // 2


def test_arrays_in_a_block():
    block = workspace.take(1000)
    a = block.array(np.float32, (3, 4), 64)
    b = block.array("float64", [5], 128)
    a[:], b[:] = 1, 2
    assert (a == 1).all() and (b == 2).all()
    assert a.ctypes.data == block.address + 64 and a.shape == (3, 4)
    with pytest.raises((TypeError, ValueError)):
        block.array(np.float64, (126,))


def test_an_array_keeps_its_block():
    gc.disable()
    try:
        array = workspace.take(4096).array(np.int64, (512,))[10:20].reshape(2, 5)
        array[:] = 5
        other = workspace.take(4096).array(np.int64, (512,))
        other[:] = 6
        assert (array == 5).all()
        assert workspace.usage().in_use == 8192
        del array, other
        assert workspace.usage() == workspace.Usage(in_use=0, idle=8192, peak=8192)
    finally:
        gc.enable()


def test_release():
    block = workspace.take(100)
    address = block.address
    block.release()
    block.release()
    assert workspace.usage() == workspace.Usage(in_use=0, idle=128, peak=128)
    assert workspace.take(100).address == address
    del block
    assert workspace.usage().idle == 128


def test_steady_steps_allocate_nothing(monkeypatch):
    sizes = [300_000, 4_000_000, 300_000, 64, 17_000]

    def step(scale):
        blocks = [workspace.take(int(nbytes * scale)) for nbytes in sizes]
        return len({block.address for block in blocks})

    step(1)
    step(0.4)  # a short last batch
    made = allocations(monkeypatch)
    for _ in range(5):
        assert step(1) == step(0.4) == len(sizes)
    assert made == []


def test_a_shorter_batch_does_with_the_memory_of_a_longer_one(monkeypatch):
    workspace.take(1 << 20)
    made = allocations(monkeypatch)
    for share in (0.9, 0.7, 0.51, 0.5):
        workspace.take(int((1 << 20) * share))
    assert made == []
    workspace.take(int((1 << 20) * 0.4))  # more than half would lie waste
    assert made == [7 << 16]


def test_what_is_idle_is_bounded(monkeypatch):
    sizes = [1 << 10, 1 << 12, 1 << 14]
    for nbytes in sizes:
        workspace.take(nbytes)
    runtime.set_workspace_limit(sum(sizes) - 1)  # the oldest goes
    assert workspace.usage().idle == sizes[1] + sizes[2]
    made = allocations(monkeypatch)
    workspace.take(sizes[1])
    assert made == []
    workspace.take(sizes[0])  # comes back, so what was used least recently must go
    assert workspace.usage().idle == sizes[1] + sizes[0]
    runtime.set_workspace_limit(0)
    assert workspace.usage().idle == 0
    del made[:]
    workspace.take(sizes[0])
    assert made == [sizes[0]] and workspace.usage().idle == 0


@pytest.mark.parametrize("nbytes", [-1, 0.5, "1 GB", None])
def test_set_workspace_limit_refuses(nbytes):
    with pytest.raises(tt.InputError, match="set_workspace_limit: nbytes is"):
        runtime.set_workspace_limit(nbytes)


def test_peak():
    a, b = workspace.take(100), workspace.take(1000)
    del a
    assert workspace.usage().peak == 128 + 1024
    workspace.reset_peak()
    assert workspace.usage().peak == 1024
    c = workspace.take(63)
    assert workspace.usage().peak == 1024 + 64
    del b, c


def test_idle_memory_is_freed_before_there_is_none(monkeypatch):
    workspace.take(1 << 20)
    allocate = workspace.Chunk

    def scarce(capacity):
        if workspace._pool._idle_bytes:
            raise MemoryError
        return allocate(capacity)

    monkeypatch.setattr(workspace, "Chunk", scarce)
    block = workspace.take(1 << 10)
    assert workspace.usage() == workspace.Usage(in_use=1 << 10, idle=0, peak=1 << 20)
    del block


def test_a_block_that_cannot_be_had_is_not_counted():
    with pytest.raises(MemoryError):
        workspace.take(2**60)
    assert workspace.usage().in_use == 0


def test_a_block_may_come_back_while_the_pool_is_busy():
    """As when a collection of garbage strikes in the middle of the pool's own work, in the same thread."""
    block = workspace.take(64)
    with workspace._pool.lock:
        del block
    assert workspace.usage() == workspace.Usage(in_use=0, idle=64, peak=64)


def test_several_threads():
    failures = []

    def work(who):
        rng = np.random.default_rng(who)
        for _ in range(300):
            array = workspace.take(int(rng.integers(1, 20_000))).array(np.uint8, (1,))
            array[0] = who
            if array[0] != who:
                failures.append(who)

    workers = [threading.Thread(target=work, args=(who,)) for who in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not failures
    assert workspace.usage().in_use == 0


FORK = """
import os, sys, threading
from tinytape.kernels import workspace
stop = False
def churn():
    while not stop:
        workspace.take(5000)
thread = threading.Thread(target=churn)
thread.start()
block = workspace.take(1 << 20)
codes = []
for _ in range(30):
    child = os.fork()
    if not child:
        del block
        workspace.take(1 << 20)
        os._exit(0 if workspace.usage().in_use <= 5056 else 1)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
stop = True
thread.join()
sys.exit(any(codes) or workspace.usage().in_use != 1 << 20)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork_while_another_thread_takes_blocks():
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


OUTLIVING = """
import os, sys
from tinytape.kernels import workspace
sys.kept = os
os.kept = os, workspace, workspace.take(9)
"""


@pytest.mark.parametrize(
    "code",
    ["from tinytape.kernels import workspace as w; a = w.take(9); b = w.take(9).array('u1', (9,))", OUTLIVING],
    ids=["of the program", "that outlive the module's names"],
)
def test_blocks_that_are_alive_at_the_end(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


class Pool(RuleBasedStateMachine):
    """Blocks are taken and dropped at random; each is filled with a number of its own."""

    blocks = Bundle("blocks")

    def __init__(self):
        super().__init__()
        self.before, workspace._pool = workspace._pool, workspace._Pool()
        self.limit = 20_000
        workspace.set_workspace_limit(self.limit)
        self.live = {}
        self.peak = self.count = 0

    def teardown(self):
        self.live.clear()
        workspace._pool = self.before

    @rule(target=blocks, nbytes=st.integers(0, 6000))
    def take(self, nbytes):
        self.count += 1
        block = workspace.take(nbytes)
        block.array(np.int8, (nbytes,))[:] = self.count % 100
        self.live[self.count] = block
        self.peak = max(self.peak, self.in_use())
        return self.count

    @rule(key=consumes(blocks), at_once=st.booleans())
    def drop(self, key, at_once):
        block = self.live.pop(key)
        if at_once:
            block.release()

    @rule(limit=st.integers(0, 20_000))
    def set_limit(self, limit):
        self.limit = limit
        workspace.set_workspace_limit(limit)

    def in_use(self):
        return sum(rounded(block.nbytes) for block in self.live.values())

    @invariant()
    def nothing_overlaps(self):
        for key, block in self.live.items():
            assert (block.array(np.int8, (block.nbytes,)) == key % 100).all()

    @invariant()
    def the_account_is_exact(self):
        usage = workspace.usage()
        assert (usage.in_use, usage.peak) == (self.in_use(), self.peak)
        assert usage.idle <= self.limit


TestPool = Pool.TestCase
