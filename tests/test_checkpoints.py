"""Checkpoints alone: what is kept, and what becomes of damaged ones and of a full disk."""

import dataclasses
import errno
import gc
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from occ import json_files
from occ.training.durable import checkpoints as checkpoints_module
from occ.training.durable import disk, lock
from occ.training.durable.checkpoints import Checkpoints, DamagedError
from occ.training.durable.fingerprint import fingerprint
from occ.training.durable.history import History
from occ.training.durable.lock import FolderLock, LockedError
from occ.training.durable.run_folder import RunFolder, identity, read_rows
from occ.training.regimes import regime
from tests import tiny

# Orbax gives up at the first array that it cannot read; its reads of others then end unheard.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]

CONFIG = tiny.train_config(regime("occ_paper"))
MODEL = tiny.build_model(CONFIG.model)


def state_after(steps):
    state = tiny.state(CONFIG, MODEL)
    moved = jax.tree.map(lambda x: x + jnp.asarray(steps, x.dtype), state.params)
    rest = {"key": jax.random.key(steps)}
    return state.replace(step=state.step + steps, params=moved, rest=rest)


def numbers(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


@pytest.fixture(scope="module", autouse=True)
def _no_reads_left():
    yield
    gc.collect()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints 1 and 2; copied before any damage."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        for number in (1, 2):
            checkpoints.save(number, state_after(number), History(seconds=float(number)))
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def restore(folder):
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore(state_after(0))


def test_the_newest_comes_back_with_its_history(folder):
    number, state, history = restore(folder)
    assert number == 2 and history == History(seconds=2.0)
    chex.assert_trees_all_equal(state, state_after(2))


def test_two_threads_save_side_by_side(tmp_path):
    """As the lanes of the main job do, each in a folder of its own."""
    states, errors = [state_after(n) for n in range(4)], []

    def save(folder):
        try:
            with Checkpoints(folder) as checkpoints:
                for number, state in enumerate(states):
                    checkpoints.save(number, state, History(seconds=float(number)))
        except BaseException as error:
            errors.append(error)

    folders = [tmp_path / name for name in ("one", "other")]
    threads = [threading.Thread(target=save, args=(folder,)) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for folder in folders:
        number, state, history = restore(folder)
        assert number == 3 and history == History(seconds=3.0)
        chex.assert_trees_all_equal(state, states[3])


def test_without_checkpoints_there_is_nothing_to_restore(tmp_path):
    assert restore(tmp_path / "checkpoints") is None


def test_the_newest_and_the_best_are_kept(tmp_path):
    accuracies = [0.1, 0.7, 0.3, 0.7, float("nan"), 0.2]
    history = History()
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        for number, sampled in enumerate(accuracies):
            history = history.evaluated(number, sampled)
            checkpoints.save(number, state_after(number), history)
    assert (history.best_rollout, history.best_sampled) == (1, 0.7)  # the first of equal ones
    assert numbers(tmp_path / "checkpoints") == [1, 4, 5]


def array_files(checkpoint):
    """The files that hold the arrays, among versions of their index that nothing reads any more."""
    return sorted((checkpoint / "state" / "ocdbt.process_0" / "d").iterdir())


def cut(*files):
    """To less than any array takes: in a longer part the arrays may lie, before dead indices."""
    for file in files:
        file.write_bytes(file.read_bytes()[:16])


def flip_bits(*files):
    """One in every hundred bytes: some are in what is read, whatever the files hold beside it."""
    for file in files:
        content = bytearray(file.read_bytes())
        for place in range(0, len(content), 100):
            content[place] ^= 16
        file.write_bytes(content)


def delete(*files):
    for file in files:
        file.unlink()


def empty(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def copy_over(source, target):
    shutil.rmtree(target)
    shutil.copytree(source, target)


def change_the_history(checkpoint):
    file = checkpoint / "record" / "metadata"
    record = json.loads(file.read_text())
    record["history"]["bad_updates"] += 1
    file.write_text(json.dumps(record))


DAMAGES = {
    "arrays cut": lambda at: cut(*array_files(at)),
    "arrays deleted": lambda at: delete(*array_files(at)),
    "bits of arrays flipped": lambda at: flip_bits(*array_files(at)),
    "index deleted": lambda at: (at / "state" / "manifest.ocdbt").unlink(),
    "index emptied": lambda at: (at / "state" / "manifest.ocdbt").write_bytes(b""),
    "metadata cut": lambda at: cut(at / "state" / "_METADATA"),
    "dtypes deleted": lambda at: (at / "state" / "array_metadatas" / "process_0").unlink(),
    "state deleted": lambda at: shutil.rmtree(at / "state"),
    "record cut": lambda at: cut(at / "record" / "metadata"),
    "record deleted": lambda at: (at / "record" / "metadata").unlink(),
    "history changed": change_the_history,
    "folder empty": empty,
    "another over it": lambda at: copy_over(at.parent / "1", at),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_is_set_aside_and_the_one_before_is_used(damage, folder):
    DAMAGES[damage](folder / "2")
    with Checkpoints(folder) as checkpoints:
        with pytest.warns(RuntimeWarning, match=r"checkpoints/2 cannot be used .* goes on .* 1"):
            number, state, _ = checkpoints.restore(state_after(0))
        assert number == 1
        chex.assert_trees_all_equal(state, state_after(1))
        checkpoints.save(2, state_after(2), History())
    assert (folder / "2.damaged").is_dir()
    number, state, _ = restore(folder)
    assert number == 2
    chex.assert_trees_all_equal(state, state_after(2))


def test_the_same_number_may_be_damaged_twice(folder):
    for name in ("2.damaged", "2.damaged-2"):
        empty(folder / "2") if (folder / "2").exists() else (folder / "2").mkdir()
        with pytest.warns(RuntimeWarning, match=f"it is now {name}"):
            restore(folder)


@pytest.mark.parametrize("seed", range(20))
def test_a_single_flipped_bit_is_noticed_or_changes_nothing(seed, folder):
    """Anywhere in the arrays' files, which hold bytes that nothing reads as well."""
    rng = np.random.default_rng(seed)
    files = array_files(folder / "2")
    file = files[rng.integers(len(files))]
    content = bytearray(file.read_bytes())
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    file.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        number, state, history = restore(folder)
    assert number in (1, 2)
    chex.assert_trees_all_equal(state, state_after(number))
    assert history == History(seconds=float(number))


def test_with_none_left_nothing_is_started_and_nothing_renamed(folder):
    for number in ("1", "2"):
        cut(*array_files(folder / number))
    with pytest.raises(DamagedError, match=r"none of the checkpoints in .* \(2: .*; 1: "):
        restore(folder)
    assert numbers(folder) == [1, 2]


def test_other_errors_are_no_damage(folder, monkeypatch):
    """A folder that may not be read, for one, is left as it is."""

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "refused")

    with Checkpoints(folder) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "restore", refuse)
        with pytest.raises(PermissionError):
            checkpoints.restore(state_after(0))
    assert numbers(folder) == [1, 2]


# -- fingerprints -----------------------------------------------------------------------------


def test_a_fingerprint_is_the_weighted_sum_of_the_words():
    x = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    words = [int(word) for word in x.view(np.uint32).ravel()]
    expected = sum((2 * i + 1) * word for i, word in enumerate(words)) % 2**32
    assert int(fingerprint(x)) == expected


@pytest.mark.parametrize("dtype", ["bool", "int8", "int32", "bfloat16", "float32", "float64"])
def test_a_fingerprint_sees_every_entry(dtype, x64):
    bits = np.arange(6).reshape(2, 3) % 2
    prints = {int(fingerprint(jnp.asarray(bits, dtype)))}
    for index in np.ndindex(2, 3):
        changed = bits.copy()
        changed[index] = 1 - changed[index]
        prints.add(int(fingerprint(jnp.asarray(changed, dtype))))
    assert len(prints) == 7


def test_a_fingerprint_does_not_depend_on_the_layout():
    x = jax.random.normal(jax.random.key(0), (8, 6))
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharded = jax.device_put(x, jax.NamedSharding(mesh, jax.P("a", "b")))
    assert int(fingerprint(sharded)) == int(fingerprint(x))
    key = jax.random.key(3)
    assert int(fingerprint(key)) == int(fingerprint(jax.random.key_data(key)))


# -- files and the disk -----------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch):
    """Every wait for the disk fails as on a full one."""

    def refuse(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)


def test_a_full_disk_says_what_to_delete(tmp_path, full_disk):
    for name, size in {"3": 10, "6": 10, "9.orbax-checkpoint-tmp": 30, "4.damaged": 20}.items():
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "file").write_bytes(bytes(size))
    with pytest.raises(disk.DiskFullError) as caught:
        RunFolder(tmp_path, CONFIG)
    assert caught.value.errno == errno.ENOSPC
    assert re.search(r": [\d,]+ bytes .* written, [\d,]+ are free", str(caught.value))
    assert str(caught.value).endswith(
        "In this folder the run can do without checkpoints/4.damaged (20 bytes), "
        "checkpoints/3 (10 bytes)."
    )


def test_a_failed_write_leaves_the_old_text(tmp_path, monkeypatch):
    file = tmp_path / "file"
    disk.replace(file, "old")

    def refuse(descriptor):
        raise OSError(errno.EIO, "cable pulled")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="cable pulled"):
        disk.replace(file, "new")
    assert file.read_text() == "old"


def test_full_is_full_in_the_words_of_each_library():
    assert disk.is_full(OSError(errno.EDQUOT, "quota"))
    assert disk.is_full(ValueError("RESOURCE_EXHAUSTED: ...: No space left on device [...]"))
    assert not disk.is_full(PermissionError(errno.EACCES, "refused"))
    assert not disk.is_full(ValueError("NOT_FOUND"))


def test_a_failed_save_is_explained_and_the_first_error_wins(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device")

    with (
        pytest.raises(disk.DiskFullError, match="bytes and their index"),
        Checkpoints(tmp_path / "c") as saving,
    ):
        monkeypatch.setattr(saving._manager, "save", refuse)
        saving.save(1, state_after(1), History())
    with pytest.raises(KeyboardInterrupt), Checkpoints(tmp_path / "c") as saving:
        monkeypatch.setattr(saving._manager, "wait_until_finished", refuse)
        raise KeyboardInterrupt
    monkeypatch.setattr(checkpoints_module.ocp.CheckpointManager, "wait_until_finished", refuse)
    with (
        pytest.raises(disk.DiskFullError, match="bytes and their index"),
        Checkpoints(tmp_path / "c"),
    ):
        pass


def rows(*rollouts):
    return [{"rollout": rollout, "reward": 0.5} for rollout in rollouts]


TAILS = [
    b'{"rollout": 2, "rew',
    b'{"rollout": 2, "reward": 0.5}',
    b"\0\0",
    b"12\n",
    b"{}\n",
    b"\xff\n",
]


@pytest.mark.parametrize("tail", TAILS)
def test_rows_after_a_cut_line_are_whole(tail, tmp_path):
    with RunFolder(tmp_path, CONFIG) as files:
        files.append(*rows(0, 1))
        with (tmp_path / "metrics.jsonl").open("ab") as file:
            file.write(tail)
        assert files.recorded() == (3 if b"0.5}" in tail else 2, b"0.5}" not in tail)
        files.keep_rows_before(2)
        files.append(*rows(2))
        assert files.recorded() == (3, False) and files.rows(3) == rows(0, 1, 2)
    assert not (tmp_path / "lock.json").exists()


def test_rows_that_a_checkpoint_counts_must_be_there(tmp_path):
    with RunFolder(tmp_path, CONFIG) as files:
        files.append(*rows(0, 1))
        with pytest.raises(ValueError, match="row for each of the 3 rollouts .* and holds 2"):
            files.keep_rows_before(3)
        assert read_rows(tmp_path / "metrics.jsonl") == rows(0, 1)
        files.append(*rows(1, 2))  # of another process
        with pytest.raises(ValueError, match=r"one row for each of 3 rollouts, .* holds 4 rows"):
            files.rows(3)
        with pytest.raises(ValueError, match=r"expected the row of rollout 2, got that of 1"):
            files.recorded()


def test_no_warnings_without_damage(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        restore(folder)


def test_a_reader_that_fails_leaves_what_a_run_is_writing(folder):
    unfinished = folder / "3.orbax-checkpoint-tmp"
    unfinished.mkdir()
    with pytest.raises(KeyError), Checkpoints(folder, read_only=True) as checkpoints:
        assert checkpoints.read(state_after(0)).number == 2
        raise KeyError
    assert unfinished.exists() and numbers(folder) == [1, 2]


def test_a_checkpoint_after_rows_that_were_cut_is_not_used(folder):
    words = r"2 cannot be used .*cut after the rows of 1 "
    with Checkpoints(folder) as checkpoints, pytest.warns(RuntimeWarning, match=words):
        assert checkpoints.restore(state_after(0), most=1).number == 1
    with Checkpoints(folder) as checkpoints, pytest.raises(DamagedError, match="of 0 rollouts"):
        checkpoints.restore(state_after(0), most=0)
    assert numbers(folder) == [1]


def test_a_checkpoint_of_another_run_is_not_used(tmp_path):
    other = dataclasses.replace(CONFIG, seed=1)
    free = dataclasses.replace(CONFIG, keep_checkpoints=7)
    with Checkpoints(tmp_path, owner=identity(other)) as checkpoints:
        checkpoints.save(1, state_after(1), History())
    assert identity(free) == identity(CONFIG)
    with (
        Checkpoints(tmp_path, owner=identity(free), read_only=True) as checkpoints,
        pytest.raises(DamagedError, match="a run of another configuration"),
    ):
        checkpoints.read(state_after(0))


# -- the lock ---------------------------------------------------------------------------------

HOLD = """
import pathlib, sys, time
from occ.training.durable.lock import FolderLock
lock = FolderLock(pathlib.Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_one_process_has_a_folder_until_it_ends_however_it_ends(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    words = rf"in use by process {holder.pid} on host {re.escape(socket.gethostname())}"
    with pytest.raises(LockedError, match=words):
        RunFolder(tmp_path, CONFIG)
    assert not (tmp_path / "config.json").exists()
    holder.kill()
    holder.communicate()
    assert (tmp_path / "lock.json").exists()
    with RunFolder(tmp_path, CONFIG), pytest.raises(LockedError, match=f"process {os.getpid()}"):
        RunFolder(tmp_path, CONFIG)
    RunFolder(tmp_path, CONFIG).close()


@pytest.mark.parametrize("beats", [True, False])
def test_a_lock_of_another_host_is_watched(beats, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "SILENCE", 0.2)
    file = tmp_path / "lock.json"
    file.write_text('{"process": 1, "host": "elsewhere"}')
    touch = threading.Timer(0.1, os.utime, (file,))
    if beats:
        touch.start()
        with pytest.raises(LockedError, match="process 1 on host elsewhere"):
            FolderLock(tmp_path)
        touch.join()
    else:
        FolderLock(tmp_path).close()
        assert not file.exists()


def test_without_locks_of_the_system_a_living_process_counts(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    held = FolderLock(tmp_path)
    with pytest.raises(LockedError):
        FolderLock(tmp_path)
    held.close()
    (tmp_path / "lock.json").write_text(
        json.dumps({"process": 2**22 + 1, "host": socket.gethostname()})
    )
    FolderLock(tmp_path).close()


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match=r"file is a file. Choose another folder"):
            RunFolder(path, CONFIG)


# -- JSON -------------------------------------------------------------------------------------

BAD = {
    b"": ", line 1",
    b'{\n"a": 1,\n]': ", line 3",
    b"\xff": ", line 1",
    b"[" * 10**5: "",
    b"12": "",
}


@pytest.mark.parametrize("name", ["config.json", "result.json"])
def test_a_damaged_file_of_a_run_is_named(name, tmp_path):
    def open_it():
        with RunFolder(tmp_path, CONFIG) as files:
            files.result()

    for content, line in BAD.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}{line}: expected "):
            open_it()


def test_lines_of_json_may_begin_with_a_mark_and_errors_name_the_line(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n{"a": "\xe2\x80\xa8"}\n{"a"\n')
    assert json_files.read_lines(file, "a", cut=True) == [{"a": 1}, {"a": "\u2028"}]
    with pytest.raises(ValueError, match=r"rows.jsonl, line 4: expected JSON"):
        json_files.read_lines(file)
    with pytest.raises(ValueError, match=r"rows.jsonl, line 1: expected an object with b"):
        json_files.read_lines(file, "b", cut=True)
