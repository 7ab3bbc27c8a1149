"""Worker processes: bounds, replacement, and that a fault is nobody else's."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from occ.tasks import workers
from occ.tasks.workers import Failure, Limits, WorkerPool
from tests.faulty_checks import FAULTS

SOURCE = pathlib.Path(__file__).with_name("faulty_checks.py")
LIMITS = Limits(cpu_seconds=0.3, wall_seconds=2.0, memory_mib=256)

# What each fault is reported as. Faults of time differ only in which bound ends them.
REASONS = {
    "spin": "time",
    "sleep": "waited",
    "big integer": "time",
    "raise": "raised",
    "recurse": "raised",
    "close pipe": "died",
}


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(SOURCE, "check", workers=2, limits=LIMITS) as pool:
        yield pool


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_fails_its_own_call_alone(pool, fault):
    """Others before, after and beside it get their results, in order."""
    requests = [("a",), ("b",), (fault,), ("c",), ("d",), ("e",)]
    results = pool.map(requests)
    failure = results.pop(2)
    assert results == ["A", "B", "C", "D", "E"]
    assert isinstance(failure, Failure)
    assert failure.reason == REASONS.get(fault, "died"), failure
    assert pool.map([("x",)] * 4) == ["X"] * 4


@pytest.mark.parametrize(
    "fault",
    ["eval", "exec", "write", "remove", "mkdir", "system", "process", "fork", "socket", "segfault"],
)
def test_what_a_worker_may_not_do_ends_it(pool, fault):
    [failure] = pool.map([(fault,)])
    assert failure == Failure("died", f"exit status {workers.PROGRAM_REFUSED}")


def test_a_worker_leaves_no_trace(pool, tmp_path):
    canary = tmp_path / "canary"
    [failure] = pool.map([(f"write {canary}",)])
    assert isinstance(failure, Failure) and not canary.exists()


def test_the_bound_on_computing_ends_one_operation_of_the_interpreter(pool):
    """So it does not rest on a handler, which would wait for the operation to end."""
    [failure] = pool.map([("big integer",)])
    assert failure == Failure("time", "more than 0.3 s of computing")


def test_a_worker_that_dies_idle_is_replaced_and_its_next_call_is_answered(pool):
    [process_id] = pool.map([("process id",)])
    before = pool.replaced
    os.kill(process_id, signal.SIGKILL)
    assert pool.map([("a",), ("b",)]) == ["A", "B"]
    assert pool.replaced == before + 1


def test_a_worker_is_replaced_after_its_share_of_calls():
    limits = Limits(calls=3)
    with WorkerPool(SOURCE, "check", workers=1, limits=limits) as pool:
        processes = pool.map([("process id",)] * 7)
    assert [processes.index(process) for process in processes] == [0, 0, 0, 3, 3, 3, 6]


def test_faults_and_order_do_not_change_the_other_results(pool):
    """Any order, many faults at once, both workers busy with them."""
    requests = [("kill",), ("one",), ("exit 0",), ("raise",), ("two",), ("kill",), ("three",)] * 2
    expected = [None, "ONE", None, None, "TWO", None, "THREE"] * 2
    for order in (requests, requests[::-1]):
        results = pool.map(order)
        found = [None if isinstance(r, Failure) else r for r in results]
        assert found == (expected if order is requests else expected[::-1])


def test_threads_share_a_pool(pool):
    results = {}

    def ask(name):
        results[name] = pool.map([(f"{name} {i}",) for i in range(50)])

    threads = [threading.Thread(target=ask, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: [f"{n.upper()} {i}" for i in range(50)] for n in "abc"}


def test_a_worker_sees_no_secrets_and_no_copy_of_this_process(pool, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "secret")
    with WorkerPool(SOURCE, "check", workers=1) as fresh:
        [names] = fresh.map([("environment",)])
    allowed = {*workers.PASSED_ON, "PYTHONHASHSEED", "LC_CTYPE"}  # Python itself sets the last
    assert "PYTHONHASHSEED" in names and set(names) <= allowed


def test_text_is_passed_on_unchanged(pool):
    texts = ["\0\x1b[31m", "\ud800", "\N{PILE OF POO}" * 1000, '"\\\n\r', "x" * 10**6]
    assert pool.map([(text,) for text in texts[:-1]]) == [text.upper() for text in texts[:-1]]
    [failure] = pool.map([(texts[-1] * 2,)])
    assert failure.reason == "died"  # its reply is longer than a reply may be
    assert pool.map([]) == []


def test_errors_say_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        WorkerPool(SOURCE, "check", workers=0)
    with pytest.raises(ValueError, match="expected the file of 'check', found no"):
        WorkerPool(tmp_path / "none.py", "check")
    with pytest.raises(ValueError, match="cpu_seconds must be positive, got 0"):
        Limits(cpu_seconds=0)
    with pytest.raises(RuntimeError, match=r"(?s)could not load 'chek'.*has no attribute 'chek'"):
        WorkerPool(SOURCE, "chek")
    missing = tmp_path / "missing.py"
    missing.write_text("import no_such_package\n")
    with pytest.raises(RuntimeError, match="No module named 'no_such_package'"):
        WorkerPool(missing, "check")
    with WorkerPool(SOURCE, "check") as pool:
        pass
    with pytest.raises(ValueError, match="closed; make a new one"):
        pool.map([("a",)])


def test_a_worker_that_cannot_start_again_fails_its_call(monkeypatch):
    with WorkerPool(SOURCE, "check", workers=1) as pool:
        [process_id] = pool.map([("process id",)])
        os.kill(process_id, signal.SIGKILL)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", "/no/such/python")
            [failure] = pool.map([("a",)])
        assert failure.reason == "start" and "/no/such/python" in failure.detail
        assert pool.map([("a",)]) == ["A"]


def test_closing_leaves_no_process():
    with WorkerPool(SOURCE, "check", workers=2) as pool:
        [process_id] = pool.map([("process id",)])
    with pytest.raises(ProcessLookupError):
        os.kill(process_id, 0)


ORPHANING = """
import importlib.util, pathlib, sys, threading
spec = importlib.util.spec_from_file_location("workers", sys.argv[1])
workers = importlib.util.module_from_spec(spec)
sys.modules["workers"] = workers
spec.loader.exec_module(workers)
limits = workers.Limits(wall_seconds=1.0)
pool = workers.WorkerPool(pathlib.Path(sys.argv[2]), "check", workers=1, limits=limits)
print(*pool.map([("process id",)]), flush=True)
pool.map([("sleep",)])
"""


def running(process):
    try:
        state = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # ended, in a container whose first process collects nobody


def test_a_busy_worker_does_not_outlive_a_program_that_is_killed():
    """That program loads one file of the package: a pool needs nothing else of it."""
    command = [sys.executable, "-c", ORPHANING, workers.__file__, str(SOURCE)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        worker = int(program.stdout.readline().strip("[]\n"))
        time.sleep(0.3)  # for the call to begin; an idle worker would end at once
        program.kill()
    assert running(worker)
    deadline = time.monotonic() + 10
    while running(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not running(worker)
