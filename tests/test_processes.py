"""Two processes as one run: the rows of one process, an end for all when one is killed."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from occ.training import meeting, processes
from occ.training.durable.run_folder import read_rows

ROOT = pathlib.Path(__file__).parent.parent


def start(folder, devices, *options):
    """One process; what it says goes to a file beside the folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)
    environment["JAX_COMPILATION_CACHE_DIR"] = str(folder.parent / "cache")
    number = len(list(folder.parent.glob("log-*")))
    command = [sys.executable, "-m", "tests.process_run", str(folder), str(devices), *options]
    with (folder.parent / f"log-{folder.name}-{number}").open("w") as log:
        # In a folder of the test's own, where starting points are kept.
        return subprocess.Popen(
            command, cwd=folder.parent, env=environment, stdout=log, stderr=subprocess.STDOUT
        )


def start_two(folder, *options):
    port = free_port()
    return [
        start(
            folder,
            2,
            *("--coordinator", f"localhost:{port}", "--processes", "2", "--index", str(index)),
            *options,
        )
        for index in range(2)
    ]


def said(folder):
    return "\n".join(log.read_text() for log in sorted(folder.glob("log-*")))


def rows_of(folder):
    """Metrics without the clock."""
    rows = read_rows(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


def check_same(alone, together):
    """The same samples, so the same rewards; the other metrics to rounding."""
    assert len(alone) == len(together) == 4
    for expected, got in zip(alone, together, strict=True):
        assert got["reward"] == expected["reward"]
        for name, value in expected.items():
            np.testing.assert_allclose(got[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


LONGER = ("--rollouts", "60")


@pytest.mark.release
def test_two_processes_are_one_run_and_end_together(tmp_path):
    """Four devices in one process or two in each of two: the same rewards, and losses to rounding.

    Then one of two is killed: the other ends by itself, with a word, and the run goes on.
    """
    one = start(tmp_path / "one", 4)
    assert one.wait(300) == 0, said(tmp_path)
    two = start_two(tmp_path / "two")
    assert [process.wait(300) for process in two] == [0, 0], said(tmp_path)
    together = rows_of(tmp_path / "two")
    check_same(rows_of(tmp_path / "one"), together)

    killed = tmp_path / "killed"
    two = start_two(killed, *LONGER)
    deadline = time.monotonic() + 300
    while len(read_rows(killed / "metrics.jsonl")) < 3:
        assert time.monotonic() < deadline and two[0].poll() is None, said(tmp_path)
        time.sleep(0.1)
    two[1].send_signal(signal.SIGKILL)
    died = time.monotonic()
    assert two[0].wait(60) != 0
    assert time.monotonic() - died < 60
    assert two[1].wait() == -signal.SIGKILL
    assert "another task died" in said(tmp_path)
    two = start_two(killed, *LONGER)
    assert [process.wait(300) for process in two] == [0, 0], said(tmp_path)
    rows = rows_of(killed)
    assert [row["rollout"] for row in rows] == list(range(60))
    assert rows[:4] == together


@pytest.mark.release
def test_packing_slots_and_evaluation_are_the_same_in_two_processes(tmp_path):
    """Every process packs all rows alike, and refills slots with all samples, not with its own."""
    one = start(tmp_path / "one", 4, "--packed")
    assert one.wait(300) == 0, said(tmp_path)
    two = start_two(tmp_path / "two", "--packed")
    assert [process.wait(300) for process in two] == [0, 0], said(tmp_path)
    check_same(rows_of(tmp_path / "one"), rows_of(tmp_path / "two"))

    # The run is evaluated alike: the same lines, and a summary that the first process writes.
    one = start(tmp_path / "one", 4, "--evaluate", "alone")
    assert one.wait(300) == 0, said(tmp_path)
    two = start_two(tmp_path / "one", "--evaluate", "together")
    assert [process.wait(300) for process in two] == [0, 0], said(tmp_path)
    lines, summaries = (
        [(tmp_path / "one" / name / file).read_text() for name in ("alone", "together")]
        for file in ("test.jsonl", "summary.json")
    )
    assert lines[0] == lines[1] and lines[0].count("\n") == 30 and summaries[0] == summaries[1]


def test_shares_cover_all_rows_once():
    rows = np.arange(10)
    np.testing.assert_array_equal(processes.collect_shares(rows[processes.my_share(10)], 10), rows)


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def come(port, *numbers, count=3):
    """Other processes, in threads; what each ended with."""
    ends = {}

    def go(place, index):
        try:
            meeting.meet(f"localhost:{port}", count, index, patience=5)
            ends[place] = None
        except (ValueError, TimeoutError) as error:
            ends[place] = str(error)

    threads = [threading.Thread(target=go, args=both) for both in enumerate(numbers)]
    for thread in threads:
        thread.start()
    return threads, ends


def test_processes_meet_and_the_port_is_free_again():
    port = free_port()
    threads, ends = come(port, 1, 2)
    meeting.meet(f"localhost:{port}", 3, 0)
    for thread in threads:
        thread.join()
    assert ends == {0: None, 1: None}
    with socket.create_server(("", port)):
        pass


def test_who_does_not_come_is_named(caplog, monkeypatch):
    monkeypatch.setattr(meeting, "WORD_EVERY", 0.1)
    with pytest.raises(TimeoutError, match=r"1 of 2 processes \(numbers \[1\]\) did not come"):
        meeting.meet(f"localhost:{free_port()}", 2, 0, patience=0.3)
    assert "waiting for 1 of 2 processes (numbers [1]) at port" in caplog.text
    with pytest.raises(TimeoutError, match="process 0 is not at localhost"):
        meeting.meet(f"localhost:{free_port()}", 2, 1, patience=0.3)
    assert "waiting for process 0 at localhost" in caplog.text


def test_two_processes_of_one_number_end_all():
    port = free_port()
    threads, ends = come(port, 1, 1)
    with pytest.raises(ValueError, match="process 1 of 3 came .* numbers .2. were absent"):
        meeting.meet(f"localhost:{port}", 3, 0)
    for thread in threads:
        thread.join()
    assert len(ends) == 2 and all("process 0" in words for words in ends.values())


def test_a_port_in_use_is_named():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} of this host cannot be had"):
            meeting.meet(f"localhost:{port}", 2, 0)


def test_processes_that_differ_end_with_the_fields(monkeypatch):
    others = ['{"seed": 0, "rollouts": 2}', '{"seed": 1, "rollouts": 2}', '{"rollouts": 2}']
    monkeypatch.setattr(processes, "texts_of_all", lambda text: others)
    with pytest.raises(ValueError) as caught:
        processes.check_alike("configuration", {})
    assert "same configuration: seed is 0 on process 0 and 1 on process 1; seed" in str(
        caught.value
    )
    monkeypatch.undo()
    processes.check_alike("configuration", {"seed": 0})


def test_an_error_of_the_first_process_is_one_of_all(monkeypatch):
    def fail():
        raise OSError("no disk")

    with pytest.raises(OSError, match="no disk"):
        processes.on_first(fail)
    monkeypatch.setattr(processes, "is_first", lambda: False)
    processes.on_first(fail)
    monkeypatch.setattr(processes, "texts_of_all", lambda text: ["OSError: no disk", text])
    with pytest.raises(RuntimeError, match="the first process ended: OSError: no disk"):
        processes.on_first(fail)


def test_an_incomplete_address_is_refused():
    with pytest.raises(ValueError, match="together"):
        processes.join("localhost:1", 2, None)
