"""Folders in a bucket: conditions in place of appends, locks and renames; checkpoints; an outage.

The bucket is a server on this machine, which speaks Google Cloud Storage's protocol.
"""

import dataclasses
import json
import os
import re
import threading
import time
import warnings

import chex
import jax
import numpy as np
import pytest

from occ import sources
from occ.buckets import UnreachableError, is_bucket, outage, path
from occ.models import pretrained
from occ.models.config import LoRAConfig
from occ.models.policy import create_policy
from occ.training.durable import checkpoints as checkpoints_module
from occ.training.durable import disk, lock
from occ.training.durable.checkpoints import Checkpoints, DamagedError
from occ.training.durable.history import History
from occ.training.durable.lock import LockedError
from occ.training.durable.run_folder import RunFolder, check_usable, read_rows
from occ.training.start.saved import load_start, save_start
from tests import bucket_server, tiny
from tests.test_checkpoints import CONFIG, state_after

if not bucket_server.missing():
    from occ.training.durable import bucket_lock

needs_server = bucket_server.needs_server
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]


@pytest.fixture
def server():
    return bucket_server.server()


@pytest.fixture
def folder(server, request):
    """A folder of the bucket that no other test has."""
    name = re.sub(r"\W+", "-", request.node.name)
    return path(f"gs://{bucket_server.BUCKET}/{name}")


@pytest.fixture
def quick(monkeypatch):
    """Locks that are watched for a second."""
    monkeypatch.setattr(bucket_lock, "BEAT", 0.1)
    monkeypatch.setattr(bucket_lock, "SILENCE", 1.0)


# -- paths ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["gs://a", "gs:/a/b", "s3://a/b", "https://a/b", "gs:///a"])
def test_what_is_no_path_and_no_bucket_is_refused(text):
    with pytest.raises(ValueError, match=r"expected a path or gs://BUCKET/FOLDER, got"):
        path(text)


def test_a_local_path_stays_one():
    assert not is_bucket(path("runs/a:b")) and path("runs") == path(path("runs"))


@needs_server
def test_a_bucket_that_is_not_there_is_named(server):
    with pytest.raises(ValueError, match="there is no bucket 'nowhere'"):
        RunFolder(path("gs://nowhere/run"), CONFIG)


# -- objects ----------------------------------------------------------------------------------


@needs_server
def test_rows_are_appended_replaced_and_read_back(folder):
    file = folder / "rows.jsonl"
    disk.append_text(file, '{"a": 1}\n')
    disk.append_text(file, '{"a": 2}\n')
    assert read_rows(file) == [{"a": 1}, {"a": 2}]
    disk.replace(file, '{"a": 1}\n')
    disk.append_text(file, '{"a": 3}\n')
    assert read_rows(file) == [{"a": 1}, {"a": 3}]


@needs_server
def test_an_append_to_what_another_process_wrote_is_refused(folder):
    from occ.buckets.store import ChangedError

    file = folder / "rows.jsonl"
    disk.append_text(file, "1\n")
    file.write_text("1\nanother\n")
    with pytest.raises(ChangedError, match=r"rows.jsonl: another process has written to it"):
        disk.append_text(file, "2\n")
    assert file.read_text() == "1\nanother\n"


@needs_server
def test_a_small_object_takes_one_request(folder, monkeypatch):
    """A session of an upload, which the server forgets when it is away, would be lost with it."""
    from occ.buckets import store

    asked, request = [], store.PatientStore._request

    async def count(self, method, at, *args, **options):
        asked.append((method, options.get("uploadType")))
        return await request(self, method, at, *args, **options)

    monkeypatch.setattr(store.PatientStore, "_request", count)
    (folder / "text").write_text("one")  # as Orbax and JAX do
    disk.replace(folder / "file", "two")
    assert asked == [("POST", "multipart")] * 2
    large = bytes(range(256)) * 2**15
    (folder / "large").write_bytes(large)
    assert (folder / "large").read_bytes() == large
    assert (folder / "text").read_text() + (folder / "file").read_text() == "onetwo"


@needs_server
def test_a_write_holds_its_condition_and_may_be_asked_for_twice(folder):
    from occ.buckets import store

    file = folder / "object"
    assert store.read(file) is None
    first = store.write(file, b"\r\n--border\r\n\0", 0)
    assert store.read(file) == (b"\r\n--border\r\n\0", first)
    assert store.write(file, b"other", 0) is None
    assert store.write(file, b"\r\n--border\r\n\0", 0) == first  # a reply that was lost
    second = store.write(file, b"other", first)
    assert second not in (None, first) and store.write(file, b"third", first) is None
    assert store.read(file) == (b"other", second)


# -- the lock ---------------------------------------------------------------------------------


@needs_server
def test_one_process_has_a_folder_of_a_bucket(folder):
    held = lock.take(folder)
    with pytest.raises(LockedError, match=rf"{folder} is in use by process {os.getpid()}"):
        lock.take(folder)
    held.close()
    assert not (folder / "lock.json").exists()
    lock.take(folder).close()


@needs_server
@pytest.mark.parametrize("beats", [True, False])
def test_a_lock_of_another_machine_is_watched(beats, folder, quick):
    file = folder / "lock.json"
    file.write_text('{"process": 1, "host": "elsewhere", "machine": "x", "lock": "y"}')
    ended = threading.Event()

    def beat():
        while not ended.wait(0.2):
            file.write_text('{"process": 1, "host": "elsewhere", "machine": "x", "lock": "y"}')

    if beats:
        thread = threading.Thread(target=beat)
        thread.start()
        try:
            with pytest.raises(LockedError, match="process 1 on host elsewhere"):
                lock.take(folder)
        finally:
            ended.set()
            thread.join()
    else:
        began = time.monotonic()
        lock.take(folder).close()
        assert time.monotonic() - began >= 1.0


@needs_server
def test_what_a_dead_process_of_this_machine_left_is_taken_at_once(folder):
    left = {"process": 2**22 + 1, "host": "h", "machine": bucket_lock._machine(), "lock": "y"}
    (folder / "lock.json").write_text(json.dumps(left))
    began = time.monotonic()
    lock.take(folder).close()
    assert time.monotonic() - began < bucket_lock.SILENCE / 2


@needs_server
def test_who_was_silent_for_too_long_writes_no_more(folder, quick):
    with RunFolder(folder, CONFIG) as files:
        files.append({"rollout": 0, "reward": 0.5})
        (folder / "lock.json").write_text('{"process": 7, "host": "elsewhere", "lock": "z"}')
        time.sleep(1.0)
        for write in (lambda: files.append({"rollout": 1}), lambda: files.finish({})):
            with pytest.raises(LockedError, match="process 7 on host elsewhere"):
                write()
    assert len(read_rows(folder / "metrics.jsonl")) == 1
    assert "elsewhere" in (folder / "lock.json").read_text()


@needs_server
def test_another_configuration_is_refused(folder):
    with RunFolder(folder, CONFIG) as files:
        resolved = files._resolved
    check_usable(folder, resolved)
    with pytest.raises(ValueError, match="another configuration .seed: 0 -> 1"):
        RunFolder(folder, dataclasses.replace(CONFIG, seed=1))


# -- checkpoints ------------------------------------------------------------------------------


def numbers(folder):
    return sorted(int(found.name) for found in folder.iterdir() if found.name.isdigit())


def save(folder, *steps, keep=2):
    with Checkpoints(folder, keep) as checkpoints:
        for number in steps:
            checkpoints.save(number, state_after(number), History(seconds=float(number)))


def restore(folder):
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore(state_after(0))


@needs_server
def test_the_newest_comes_back_and_old_ones_go(folder):
    assert restore(folder) is None
    save(folder, 0, 1, 2)
    number, state, history = restore(folder)
    assert number == 2 and history == History(seconds=2.0)
    chex.assert_trees_all_equal(state, state_after(2))
    assert numbers(folder) == [1, 2]
    with Checkpoints(folder, read_only=True) as checkpoints:
        assert checkpoints.read(state_after(0)).number == 2


@needs_server
def test_one_that_was_not_finished_is_none(folder):
    save(folder, 1, 2)
    (folder / "2" / "commit_success.txt").unlink()
    with Checkpoints(folder, read_only=True) as checkpoints:
        assert checkpoints.read(state_after(0)).number == 1
    assert restore(folder).number == 1
    assert numbers(folder) == [1]
    save(folder, 2)
    assert restore(folder).number == 2


def drop(file):
    file.unlink()


def flip(file):
    content = bytearray(file.read_bytes())
    for place in range(0, len(content), 100):
        content[place] ^= 16
    file.write_bytes(content)


@needs_server
@pytest.mark.parametrize("damage", [drop, flip])
@pytest.mark.parametrize("where", ["state/ocdbt.process_0/d", "record"])
def test_a_damaged_one_is_set_aside_and_the_one_before_is_used(damage, where, folder):
    save(folder, 1, 2)
    for file in (folder / "2" / where).iterdir():
        if file.name != "commit_success.txt":
            damage(file)
    with pytest.warns(RuntimeWarning, match=r"2 cannot be used .* now 2.damaged.* goes on .* 1"):
        assert restore(folder).number == 1
    assert numbers(folder) == [1] and (folder / "2.damaged" / "commit_success.txt").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert restore(folder).number == 1


@needs_server
def test_a_bucket_that_does_not_answer_is_no_damage(folder, monkeypatch):
    save(folder, 1)

    def away(*args, **options):
        raise ValueError("UNAVAILABLE: Error reading manifest: Failed to connect")

    with Checkpoints(folder) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "restore", away)
        with pytest.raises(UnreachableError, match="may be whole"):
            checkpoints.restore(state_after(0))
    assert numbers(folder) == [1]
    monkeypatch.undo()
    local = checkpoints_module._UnreadableIsDamaged(in_bucket=False)
    with pytest.raises(DamagedError), local:  # as on disks, where nothing can be away
        away()


# -- starts, weights --------------------------------------------------------------------------


@needs_server
def test_a_start_is_found_when_it_is_whole_and_made_again_when_damaged(folder):
    state = state_after(3)
    start, decides = (state.params, {}), {"seed": 0}
    assert load_start(folder, decides, start) is None
    save_start(folder, decides, start)
    save_start(folder, decides, start)  # of another process; the first one stays
    assert len([found for found in folder.iterdir() if found.is_dir()]) == 1
    chex.assert_trees_all_equal(load_start(folder, decides, start), start)
    (named,) = [found for found in folder.iterdir() if not found.is_dir()]
    kept = folder / json.loads(named.read_text())["folder"]
    drop(kept / "0" / "record" / "metadata")
    with pytest.warns(RuntimeWarning, match="is made again"):
        assert load_start(folder, decides, start) is None
    save_start(folder, decides, start)
    chex.assert_trees_all_equal(load_start(folder, decides, start), start)


@needs_server
def test_weights_go_out_to_a_bucket_and_come_back(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("OCC_STAGING", str(tmp_path / "staged"))
    policy = create_policy(tiny.model_config(1), 0)
    target = folder / "model"
    pretrained.save(str(target), policy)
    chex.assert_trees_all_equal(pretrained.load(str(target)).params, policy.params)
    with pytest.raises(ValueError, match="exists already"):
        pretrained.save(str(target), policy)
    staged = sources.resolve(str(target))
    stamp = (staged / "model.safetensors").stat()
    assert sources.resolve(str(target)) == staged
    assert (staged / "model.safetensors").stat() == stamp  # not copied again
    moved = policy.replace(params=jax.tree.map(lambda x: x + 1, policy.params))
    target.rmtree()
    pretrained.save(str(target), moved)
    chex.assert_trees_all_equal(pretrained.load(str(target)).params, moved.params)
    with pytest.raises(ValueError, match="no such object or folder"):
        sources.resolve(str(folder / "nothing"))


@needs_server
def test_adapters_go_out_to_a_bucket_and_come_back(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("OCC_STAGING", str(tmp_path / "staged"))
    monkeypatch.chdir(tmp_path)
    policy = create_policy(tiny.model_config(1, lora=LoRAConfig(rank=2)), 0)
    target = folder / "adapters"
    pretrained.save_adapters(str(target), policy)
    fresh = policy.replace(params=jax.tree.map(lambda x: x + 1, policy.params))
    back = pretrained.load_adapters(str(target), fresh)
    chex.assert_trees_all_equal(back.params, policy.params)
    with pytest.raises(ValueError, match="exists already"):
        pretrained.save_adapters(str(target), policy)
    assert not (tmp_path / "gs:").exists()


# -- an outage --------------------------------------------------------------------------------


@pytest.mark.slow
@needs_server
def test_while_the_bucket_is_away_everything_waits_and_says_so(folder, server, capsys):
    save(folder / "checkpoints", 1)
    disk.append_text(folder / "rows", "1\n")
    server.stop()
    away = threading.Timer(4.0, server.start)
    away.start()
    began = time.monotonic()
    try:
        disk.append_text(folder / "rows", "2\n")
        assert time.monotonic() - began > 3.0
        assert (folder / "rows").read_text() == "1\n2\n"
    finally:
        away.join()
    said = capsys.readouterr().err
    assert re.search(r"waiting for gs://runs at http\S+, which does not answer \(Client", said)
    assert re.search(r"gs://runs at http\S+ answers again after \d+ s; going on", said)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(2, state_after(2), History())
        server.stop()
        away = threading.Timer(3.0, server.start)
        away.start()
        checkpoints.wait()
        away.join()
    assert restore(folder / "checkpoints").number == 2


def test_a_request_is_given_up_after_its_patience_and_others_errors_at_once(monkeypatch):
    import asyncio

    monkeypatch.setattr(outage, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(outage, "PATIENCE", 0.05)
    said, tries = [], []
    told = outage.Outage(said.append)

    async def fail():
        tries.append(1)
        raise ConnectionRefusedError("refused")

    def transient(error):
        return isinstance(error, ConnectionError)

    with pytest.raises(UnreachableError, match=r"b has not answered for 0 s .*refused"):
        asyncio.run(outage.patiently(fail, "b", transient, told))
    assert len(tries) > 2 and said[0].startswith("waiting for b, which does not answer (Conn")

    async def forbidden():
        raise PermissionError("no")

    with pytest.raises(PermissionError):
        asyncio.run(outage.patiently(forbidden, "b", transient, told))
    assert said[-1].startswith("b answers again after")


def test_waiting_is_said_once_for_all_requests():
    said = []
    told = outage.Outage(said.append)
    for _ in range(5):
        told.failed("b", ConnectionError("x"), 10.0)
    told.answered("b")
    told.answered("b")
    assert len(said) == 2 and np.char.startswith(said[1], "b answers again")
