"""Faults: what users, disks and schedulers do to a run, each put into a real small training.

    python -m pytest tests/test_faults.py                   a few of each fault
    FAULTS_LONG=1 python -m pytest tests/test_faults.py     many, and a table of what held

Random places and moments come from seeds, which the names of the tests hold.
"""

import contextlib
import errno
import io
import itertools
import math
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from dataclasses import asdict, fields, replace
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import test_training as base
import torch
from test_training import CPU, FILES, HANGUP, assert_same_files, at, contents, differences, saved

import helpers
from data import fetch
from data.dataset import load
from data.fetch import DataError
from data.prepare import ROOT, prepare, prepare_text
from helpers import CheckpointError, Precision, Run, TrainConfig, Trainer, TrainingError, make_model
from model import GPT

LONG = os.environ.get("FAULTS_LONG", "0") not in ("", "0")
STEPS, EVERY = 60, 4
CONFIG = TrainConfig(
    **dict(batch_size=2, block_size=8, n_layer=1, n_head=2, n_embd=8, dropout=0.1),
    **dict(learning_rate=1e-2, min_lr=1e-3, max_iters=STEPS, warmup_iters=3),
    **dict(eval_interval=EVERY, eval_iters=2),
)
posix = pytest.mark.skipif(os.name != "posix", reason="needs the signals and processes of POSIX")
each = pytest.mark.parametrize


def seeds(few, many):
    return each("seed", range(many if LONG else few))


def train(corpus, folder, config=CONFIG, **options):
    return base.train(corpus, config, folder, **options)


def refused(way, *named, kind=CheckpointError, unchanged=None):
    """Asserts that a call ends in one sentence that names these, and leaves a folder as it is."""
    before = unchanged and contents(unchanged)
    with pytest.raises(kind) as caught:
        way()
    message, error = str(caught.value), caught.value
    assert all(str(part) in message for part in named), f"{named} not in: {message}"
    assert "\n" not in message and message.endswith("."), message
    bare = error.__suppress_context__ or error.__context__ is None
    assert bare or isinstance(error, DataError), "a reader sees the inner traceback too"
    assert not unchanged or contents(unchanged) == before, "a file was changed"
    return message


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("finished")
    train(corpus, folder)
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "copied"))


def resumes_to_the_same_end(corpus, folder, finished):
    """What is there can be read, and the resumed run ends bit-identical to the undisturbed one."""
    for path in folder.glob("*.pt"):
        helpers.load_checkpoint(path)
    train(corpus, folder)
    assert_same_files(folder, finished)


# ----- killed and interrupted -----
PROCESSES = multiprocessing.get_context("forkserver") if os.name == "posix" else None


@pytest.fixture(scope="module")
def nursery():
    """A process that has imported everything, from which children start in milliseconds."""
    if PROCESSES is None:
        pytest.skip("needs the processes of POSIX")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOGPT_OFFLINE", "1")
        patch.delenv("DATA_MIRROR", raising=False)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), str(ROOT.parent)]))
        PROCESSES.set_forkserver_preload([__name__, "torch._dynamo"])  # of training, slow to import
        forkserver.ensure_running()


def train_in_child(pipe, source, folder, deadly=None, stand_in=False, kill=None, **options):
    """Trains; sends each step's number, and how it ended. What is not foreseen exits with 1."""
    torch.set_num_threads(1)
    signal.signal(HANGUP, signal.SIG_DFL)  # which nohup would have ignored
    pid, calls = os.getpid(), itertools.count()
    if deadly:
        break_writes(pytest.MonkeyPatch(), *deadly, partial(os.kill, pid, signal.SIGKILL))

    def view(run):
        pipe.send(run.step)
        if kill and next(calls) == kill[1]:
            threading.Timer(kill[2], os.kill, (pid, kill[0])).start()

    try:
        how = partial(prepare, "shakespeare_char", allow_stand_in=True)
        run = train(how(root=source) if stand_in else load(source), folder, view=view, **options)
        pipe.send(f"returned after {run.step}")
    except (CheckpointError, DataError) as error:
        pipe.send(f"refused: {error}")


def break_writes(patch, stage, after, act):
    """Calls `act` after so many bytes, flushes or renames, when one more is asked for or done."""

    def spend(amount):
        nonlocal after
        after -= amount
        if after < 0:
            act()

    class Breaking(io.FileIO):
        def write(self, content):
            spend(memoryview(content).nbytes)
            return super().write(content)

    if stage == "half written":
        return patch.setattr(fetch, "open", Breaking, raising=False)
    name, early = ("fsync" if "flush" in stage else "replace"), int("before" in stage)
    call = getattr(os, name)
    patch.setattr(os, name, lambda *paths: (spend(early), call(*paths), spend(1 - early))[1])


@contextlib.contextmanager
def child(source, folder, **options):
    """A process that trains, and what it sends."""
    receiver, sender = PROCESSES.Pipe(duplex=False)
    arguments = {"target": train_in_child, "args": (sender, source, folder), "kwargs": options}
    process = PROCESSES.Process(**arguments)
    process.start()
    sender.close()

    def sent():
        with contextlib.suppress(EOFError, OSError):  # it ended, perhaps within a message
            while True:
                assert receiver.poll(60), "the process says nothing for a minute"
                yield receiver.recv()
        process.join(60)

    try:
        yield process, sent()
    finally:
        process.kill()
        process.join()


def signalled(corpus, folder, number, rng, steps=35, **options):
    """Trains in a process that gets a signal in its first steps; its exit status and messages."""
    kill = number, rng.randrange(steps), rng.choice([0.0, rng.uniform(0, 0.02)])
    with child(corpus.folder, folder, kill=kill, **options) as (process, sent):
        messages = list(sent)
        return process.exitcode, messages


KILLS = [(1, seed) for seed in range(60 if LONG else 3)]
KILLS += [(3, seed) for seed in range(10 if LONG else 1)]


@each("times, seed", KILLS)
def test_kill_9_at_a_random_moment(nursery, corpus, finished, tmp_path, fault, times, seed):
    rng, again = random.Random(1000 * times + seed), "again in a run that was killed before"
    for number in range(times):
        with fault(f"kill -9 {'at a random moment' if times == 1 else again}"):
            status, _ = signalled(corpus, tmp_path / "run", signal.SIGKILL, rng, 35 // times)
            assert status == -signal.SIGKILL
            copy = shutil.copytree(tmp_path / "run", tmp_path / f"copy {number}")
            resumes_to_the_same_end(corpus, Path(copy), finished)


@each("stage", ["half written", "before the flush", "before the rename", "after the rename"])
@seeds(1, 10)
def test_kill_9_while_saving(nursery, corpus, finished, tmp_path, fault, stage, seed):
    end = 600_000 if stage == "half written" else 16
    after = random.Random(f"{stage} {seed}").randrange(end) if seed else 0
    with fault("kill -9 while a checkpoint is written"):
        with child(corpus.folder, tmp_path, deadly=(stage, after)) as (process, sent):
            steps = list(sent)
        assert process.exitcode == -signal.SIGKILL and len(steps) < STEPS, process.exitcode
        resumes_to_the_same_end(corpus, tmp_path, finished)


@each("number", [signal.SIGTERM, signal.SIGINT, HANGUP])
@seeds(1, 30)
def test_signal_at_a_random_moment(nursery, corpus, finished, tmp_path, fault, number, seed):
    """Nothing but the start and the signal make this run write."""
    with fault(f"{signal.Signals(number).name} at a random moment"):
        status, sent = signalled(corpus, tmp_path, number, random.Random(seed), save_every=1000)
        step = saved(tmp_path)["iter_num"]
        if number == signal.SIGINT:
            assert status == 0 and sent[-1] == f"returned after {step}", (status, sent[-1:])
        else:  # takes its course after saving
            assert status == -number, status
        assert step < STEPS and sorted(contents(tmp_path)) == sorted(FILES)
        resumes_to_the_same_end(corpus, tmp_path, finished)


@contextlib.contextmanager
def python(*arguments, interrupt=signal.SIG_DFL):
    """Python as a process of its own in the project's folder."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, *map(str, arguments)]

    def hear():
        signal.signal(HANGUP, signal.SIG_DFL)
        signal.signal(signal.SIGINT, interrupt)

    options = {"cwd": ROOT.parent, "env": environment, "preexec_fn": hear} | pipes
    with subprocess.Popen(command, **options) as process:
        try:
            yield process
        finally:
            process.kill()


@posix
@each("number, status", [(signal.SIGINT, 130), (HANGUP, -HANGUP)])
def test_signal_to_the_command(corpus, tmp_path, fault, number, status):
    """Ctrl-C ends it with 130, so that what stands after && is not run; all is saved before."""
    with fault("Ctrl-C or hang-up of the command"):
        options = f"{corpus.folder} --preset smoke --max_iters 1000000 --eval_interval 10"
        with python("helpers.py", *options.split(), "--out", tmp_path) as process:
            shown = [process.stdout.readline() for _ in range(3)]
            process.send_signal(number)
            rest, errors = process.communicate(timeout=60)
        assert process.returncode == status and "Traceback" not in errors, (shown, errors)
        assert "interrupted and saved" in rest
        last = saved(tmp_path)
        assert last["iter_num"] == len(last["history"]["step_loss"]) >= 20, shown


@posix
def test_interrupt_that_the_parent_ignores(corpus, tmp_path, fault):
    """As that of a shell's background job, which Ctrl-C in the terminal is not meant for."""
    with fault("Ctrl-C or hang-up of the command"):
        options = f"{corpus.folder} --preset smoke --max_iters 300 --out {tmp_path}".split()
        with python("helpers.py", *options, interrupt=signal.SIG_IGN) as process:
            process.stdout.readline()
            process.send_signal(signal.SIGINT)
            shown, errors = process.communicate(timeout=60)
        assert process.returncode == 0 and "step 300 of 300" in shown, (shown, errors)


@posix
@each("kind", ["pipe", "terminal"])
def test_output_that_nobody_reads_any_more(corpus, tmp_path, fault, kind):
    """A pipe whose reader has ended stops no run; a terminal that closes ends it saved."""
    options = f"{corpus.folder} --preset smoke --max_iters 200 --eval_interval 1 --eval_iters 1"
    command = [sys.executable, "helpers.py", *options.split(), "--out", str(tmp_path)]
    with fault("closed pipe or terminal of the command"):
        if kind == "pipe":
            with python(*command[1:]) as process:
                process.stdout.readline()
                process.stdout.close()
                assert process.wait(60) == 0, process.stderr.read()
            assert saved(tmp_path)["iter_num"] == 200
            return
        import pty  # which only POSIX has

        pid, terminal = pty.fork()
        if not pid:
            signal.signal(HANGUP, signal.SIG_DFL)  # which nohup would have ignored
            os.chdir(ROOT.parent)
            os.execv(sys.executable, command)
        while b"step 20 of" not in os.read(terminal, 4096):
            pass
        os.close(terminal)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status == -HANGUP and saved(tmp_path)["iter_num"] >= 20, status


@posix
@each("module", ["argparse", "numpy"])
def test_interrupt_of_the_command_while_it_imports(fault, module):
    with fault("Ctrl-C or hang-up of the command"):
        with python("-X", "importtime", "helpers.py", "nothing") as process:
            for line in process.stderr:
                if line.split("|")[-1].strip() == module:
                    break
            process.send_signal(signal.SIGINT)
            output = process.communicate(timeout=60)[1]
        assert process.returncode in (-signal.SIGINT, 130) and "Traceback" not in output, output


# ----- damaged checkpoints -----
def all_refused(corpus, folder, name):
    """Every way to read a damaged checkpoint refuses it in one sentence, the folder as it was."""
    path, run = folder / name, Run(CONFIG, corpus, folder)
    refused(partial(helpers.load_model, path), path, unchanged=folder)
    refused(partial(run.load, "last" if name == "last.pt" else "best"), path, unchanged=folder)
    refused(lambda: train(corpus, folder), path, unchanged=folder)


def cut(path):
    """Cuts a file again and again, once to nothing."""
    whole, parts = path.read_bytes(), 100 if LONG else 10
    for length in (*(len(whole) * part // parts for part in range(parts)), len(whole) - 1):
        path.write_bytes(whole[:length])
        yield length


def flip(path, rng, times, start=0):
    """Flips one bit or some in a file, or in its end, again and again."""
    whole = path.read_bytes()
    for attempt in range(times):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 1, 8])):
            place = rng.randrange(start if attempt % 2 else 0, len(whole))
            damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        yield damaged


@each("name", FILES)
def test_checkpoint_cut_short(corpus, copied, fault, name):
    for _ in cut(copied / name):
        with fault("checkpoint cut short, or empty"):
            all_refused(corpus, copied, name)


def unchanged_or_refused(corpus, folder, name, good):
    """Whether a damaged checkpoint is refused; if not, its values have to be those of before."""
    try:
        gaps = differences(helpers.load_checkpoint(folder / name), good)
    except CheckpointError:
        all_refused(corpus, folder, name)
        return True
    assert not gaps, f"values changed unnoticed: {gaps[:3]}"
    return False


@each("name", FILES)
@seeds(1, 20)
def test_bits_flipped_in_a_checkpoint(corpus, copied, fault, name, seed):
    """Without effect, as in the padding between two tensors, or refused."""
    path, good, noticed = copied / name, saved(copied, name), []
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
    for _ in flip(path, random.Random(seed), 60, directory):
        with fault("bits flipped in a checkpoint"):
            noticed.append(unchanged_or_refused(corpus, copied, name, good))
    assert sum(noticed) > 20, f"{sum(noticed)} of 60 were refused"


@each("name", FILES)
@each("offset, bit", [(38, 0x10), (10, 8)], ids=["a folder", "compressed"])
def test_bit_flipped_in_each_entry_of_the_archive(corpus, copied, fault, name, offset, bit):
    """No sum covers these; torch reads other bytes from what is marked as a folder."""
    path, good = copied / name, saved(copied, name)
    damaged = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        place, parts = archive.start_dir, archive.infolist()
    for part in parts:
        damaged[place + offset] ^= bit
        place += 46 + len(part.filename) + len(part.extra)
    path.write_bytes(damaged)
    with fault("bits flipped in a checkpoint"):
        assert unchanged_or_refused(corpus, copied, name, good), "read nevertheless"


OLD_FORMAT = {"_use_new_zipfile_serialization": False}


def torch_file(value, **options):
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def other_weights(folder):
    good = saved(folder)
    return torch_file(good | {"model": {key: value[:1] for key, value in good["model"].items()}})


FOREIGN = {
    "text": lambda folder: b"not a checkpoint\n" * 100,
    "zip of nothing": lambda folder: b"PK\5\6" + bytes(18),
    "torch file of a list": lambda folder: torch_file([1, 2]),
    "torch file of another dict": lambda folder: torch_file({"epoch": 3, "state_dict": {}}),
    "bare state dict": lambda folder: torch_file(saved(folder)["model"]),
    "torch file of before 1.6": lambda folder: torch_file(saved(folder), **OLD_FORMAT),
    "weights of another shape": other_weights,
    "folder": lambda folder: None,
}
PLACES = [(kind, name) for kind in FOREIGN for name in FILES]
PLACES.remove(("weights of another shape", "ckpt.pt"))  # resuming does not read them there


@each("kind, name", PLACES)
def test_foreign_file_in_place_of_a_checkpoint(corpus, copied, fault, kind, name):
    with fault("foreign file in place of a checkpoint"):
        content = FOREIGN[kind](copied)
        (copied / name).unlink()
        (copied / name).write_bytes(content) if content else (copied / name).mkdir()
        all_refused(corpus, copied, name)


PARTS = ["model", "optimizer", "scaler", "rng", "model_args", "identity"]
PARTS += ["best", "history", "seconds", "waited"]


@each("part", PARTS)
@each("value", [None, [1]], ids=["missing", "a list"])
def test_checkpoint_without_one_of_its_parts(corpus, copied, finished, fault, part, value):
    """As another program or version would write it; what is not needed is not read."""
    changed = {key: kept for key, kept in saved(copied).items() if key != part}
    with fault("checkpoint without one of its parts, or with another kind of value there"):
        torch.save(changed | ({part: value} if value else {}), copied / "last.pt")
        if value and part in ("scaler", "model_args"):
            assert not differences(train(corpus, copied).history, saved(finished)["history"])
        else:
            refused(lambda: train(corpus, copied), "last.pt", "fresh=True", unchanged=copied)


@each("there", [None, 0.1, 9.0], ids=["missing", "not reached again", "not yet written"])
def test_best_checkpoint_is_written_again_from_the_last(corpus, copied, finished, fault, there):
    """As after a kill between the two writes, also where a GPU repeats itself only nearly."""
    with fault("best checkpoint missing, or of other steps"):
        best = saved(copied, "ckpt.pt")
        (copied / "ckpt.pt").unlink()
        if there:
            torch.save(best | {"iter_num": 1, "best_val_loss": there}, copied / "ckpt.pt")
        assert train(corpus, copied).status.startswith("loaded")
        assert_same_files(copied, finished)


def test_best_checkpoint_without_the_last_is_not_overwritten(corpus, copied, fault):
    with fault("best checkpoint missing, or of other steps"):
        (copied / "last.pt").unlink()
        refused(lambda: train(corpus, copied), "ckpt.pt", "move it away", unchanged=copied)


@each("renamed, last, best", [(0, STEPS, 0), (1, 1, 0)])
def test_kill_9_after_each_file_of_a_fresh_run(
    nursery, corpus, copied, finished, fault, renamed, last, best
):
    """The old run's best weights must not pass for those of the new one."""
    with fault("best checkpoint missing, or of other steps"):
        deadly = ("after the rename", renamed)
        with child(corpus.folder, copied, deadly=deadly, fresh=True) as (_, sent):
            list(sent)
        assert [saved(copied, name)["iter_num"] for name in FILES] == [last, best]
        resumes_to_the_same_end(corpus, copied, finished)


def test_best_checkpoint_of_a_step_after_the_last_is_kept(corpus, finished, tmp_path, fault):
    """As a failure leaves it; on resuming, what is best until that step is worse."""
    fails = at(50, Mock(side_effect=TrainingError("The loss is nan.")))
    with fault("best checkpoint missing, or of other steps"):
        with pytest.raises(TrainingError):
            train(corpus, tmp_path, view=fails, save_every=1000)
        best = contents(tmp_path)["ckpt.pt"]
        for step in (EVERY + 1, saved(tmp_path, "ckpt.pt")["iter_num"] - 1):
            run = train(corpus, tmp_path, view=base.stop(step))
            assert contents(tmp_path)["ckpt.pt"] == best, f"replaced by step {step}"
            with pytest.raises(CheckpointError, match="no longer, this run's"):
                run.load()
        resumes_to_the_same_end(corpus, tmp_path, finished)


NO_STEPS = {
    "no memory": {"side_effect": torch.OutOfMemoryError("CUDA out of memory.")},
    "not finite": {"return_value": ([math.nan], [1.0], 0.1)},
}


@each("what", NO_STEPS)
@each("lacks", [None, "last.pt"])
def test_failing_first_step_leaves_the_old_run(corpus, copied, monkeypatch, fault, what, lacks):
    """Also an old ckpt.pt without its last.pt."""
    monkeypatch.setattr(Trainer, "run_steps", Mock(**NO_STEPS[what]))
    if lacks:
        (copied / lacks).unlink()
    with fault("first step of a fresh run fails"):
        way = partial(train, corpus, copied, replace(CONFIG, seed=1), fresh=True)
        refused(way, kind=TrainingError, unchanged=copied)


def test_fresh_run_that_stops_before_its_first_step_saved_nothing_and_loads_nothing(corpus, copied):
    before = contents(copied)
    run = train(corpus, copied, replace(CONFIG, seed=1), fresh=True, view=base.stop(0))
    assert contents(copied) == before and "before anything was saved" in run.status
    with pytest.raises(CheckpointError, match="no longer, this run's"):
        run.load()


FORMS = {"pickle": pickle.dumps, "torch zip": torch_file}
FORMS["torch before 1.6"] = partial(torch_file, **OLD_FORMAT)


class Bomb:
    """Unpickling this would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@each("name", FILES)
@each("form", FORMS)
@each("place", ["history", "model", "whole"])
def test_code_in_a_checkpoint_is_not_run(corpus, copied, tmp_path, fault, place, form, name):
    created = tmp_path / "created"
    hostile = Bomb(created) if place == "whole" else saved(copied) | {place: Bomb(created)}
    with fault("code in a checkpoint"):
        (copied / name).write_bytes(FORMS[form](hostile))
        all_refused(corpus, copied, name)
        assert not created.exists(), "the code in the file was run"


# ----- damaged data -----
@pytest.fixture
def prepared(corpus, tmp_path):
    """A copy of the prepared corpus, to be damaged."""
    return Path(shutil.copytree(corpus.folder, tmp_path / "sentences"))


@each("name", ["train-*.bin", "val-*.bin", "meta.json"])
def test_prepared_file_cut_short(prepared, fault, name):
    bins, (path,) = ".bin cut short, to an odd size, or empty", prepared.glob(name)
    for _ in cut(path):
        with fault("meta.json cut short" if name == "meta.json" else bins):
            refused(partial(load, prepared), path, kind=DataError, unchanged=prepared)


@each("name", ["train-*.bin", "val-*.bin", "meta.json"])
@seeds(1, 10)
def test_bits_flipped_in_a_prepared_file(prepared, fault, name, seed):
    (path,) = prepared.glob(name)
    for _ in flip(path, random.Random(seed), 40):
        with fault(f"bits flipped in {'meta.json' if name == 'meta.json' else 'a .bin'}"):
            refused(partial(load, prepared), path, kind=DataError, unchanged=prepared)


def test_another_data_set_in_place_of_the_trained_one(corpus, copied, tmp_path, fault):
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 40)
    other = prepare_text(tmp_path / "text.txt", corpus.name, "char", tmp_path)
    with fault("another data set in place of the trained one"):
        named = copied / "last.pt", f"fingerprint {corpus.fingerprint!r} there", "fresh=True"
        refused(lambda: train(other, copied), *named, unchanged=copied)


# ----- full disks, closed folders, wrong clocks -----
DISK_FULL = Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


def disk_fills_while_training(corpus, folder, finished, fill_up, clear):
    """The first save after that fails; what was saved before is kept, and resumed from."""
    way, step = partial(train, corpus, folder, view=at(STEPS // 2, fill_up)), STEPS // 2
    refused(way, folder, "No space left", "make room")
    clear()
    assert sorted(contents(folder)) == sorted(FILES), "a part of a file was left"
    assert step - EVERY < saved(folder)["iter_num"] <= step
    resumes_to_the_same_end(corpus, folder, finished)


@seeds(3, 51)
def test_write_that_fails_for_want_of_room(corpus, finished, tmp_path, monkeypatch, fault, seed):
    stage = ("half written", "before the flush", "before the rename")[seed % 3]
    after = 0 if seed % 3 else random.Random(seed).randrange(40_000)
    breaking = partial(break_writes, monkeypatch, stage, after, DISK_FULL)
    with fault("disk full: a write or a flush fails"):
        disk_fills_while_training(corpus, tmp_path, finished, breaking, monkeypatch.undo)


def test_disk_that_is_full_when_a_run_starts_over(corpus, copied, monkeypatch, fault):
    """The old run's files stay until the new one's are written."""
    break_writes(monkeypatch, "half written", 2_000, DISK_FULL)
    with fault("disk full: a write or a flush fails"):
        refused(lambda: train(corpus, copied, fresh=True), "No space left", unchanged=copied)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 400 kB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("needs the right to mount a tmpfs, which this process lacks")
    yield folder
    subprocess.run(["umount", str(folder)], check=True, timeout=10)


def leave(room, disk):
    """Fills a disk up to so many bytes."""
    state = os.statvfs(disk)
    (disk / "ballast").write_bytes(bytes(max(0, state.f_bavail * state.f_frsize - room)))


@seeds(2, 20)
def test_disk_that_is_full(corpus, finished, small_disk, fault, seed):
    room, clear = random.Random(seed).randrange(40_000), (small_disk / "ballast").unlink
    with fault("disk full: a small disk of its own"):
        fill = partial(leave, room, small_disk)
        disk_fills_while_training(corpus, small_disk / "run", finished, fill, clear)


@seeds(1, 10)
def test_disk_that_is_full_while_data_is_prepared(small_disk, tmp_path, fault, seed):
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 400)
    way = partial(prepare_text, tmp_path / "text.txt", "text", "char", small_disk)
    leave(random.Random(seed).randrange(20_000), small_disk)
    with fault("disk full: a small disk of its own"):
        refused(way, small_disk / "text", kind=DataError)
        refused(lambda: load(small_disk / "text"), "prepare the data", kind=DataError)
        (small_disk / "ballast").unlink()
        assert len(way().splits["train"]) > 15_000


def test_folder_on_a_disk_that_is_read_only(corpus, finished, small_disk, fault):
    """A finished run is loaded there as anywhere; one that has to write says that it cannot."""
    folder = Path(shutil.copytree(finished, small_disk / "run"))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True, timeout=10)
    with fault("read-only folder, or none that can be made"):
        assert train(corpus, folder).finished
    for where, fresh in ((folder, True), (small_disk / "new", False)):
        with fault("read-only folder, or none that can be made"):
            way = partial(train, corpus, where, fresh=fresh)
            refused(way, where, "Read-only file system", unchanged=folder)


@each("name", ["file", "file/below", "x" * 256], ids=["a file", "below a file", "too long"])
def test_folder_that_cannot_be_made(corpus, tmp_path, fault, name):
    (tmp_path / "file").write_text("kept")
    with fault("read-only folder, or none that can be made"):
        refused(lambda: train(corpus, tmp_path / name), tmp_path / name, unchanged=tmp_path)
        refused(lambda: helpers.load_model(tmp_path / name), tmp_path / name)


@posix
@each("closed", ["", *FILES], ids=["folder", *FILES])
def test_folder_or_checkpoint_that_may_not_be_read(corpus, finished, fault, closed):
    """The sentence says so; training again, which it does not advise, would replace good files."""
    row, root = "folder or checkpoint that may not be read", os.geteuid() == 0
    with fault(row), tempfile.TemporaryDirectory() as parent:
        folder = Path(shutil.copytree(finished, Path(parent) / "run"))
        for path in (folder, folder.parent):  # pytest's own folders are closed to others
            path.chmod(0o755)
        (folder / closed).chmod(0)
        if root:  # who may read everything
            os.seteuid(65534)
        try:
            message = refused(lambda: train(corpus, folder), folder / closed, "Permission denied")
        finally:
            if root:
                os.seteuid(0)
            (folder / closed).chmod(0o755)
        assert "fresh" not in message, message
        assert train(corpus, folder).status.startswith("loaded")


@each("now", [0, 2**32 + 2**28], ids=["1970", "2114"])
def test_clock_outside_of_what_a_zip_can_hold(corpus, copied, finished, monkeypatch, fault, now):
    with fault("clock before 1980 or after 2107"):
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda: float(now))
            train(corpus, copied, fresh=True, save_every=1000)
            train(corpus, copied)
        assert_same_files(copied, finished)


def test_failure_of_the_device_while_a_run_resumes(corpus, copied, monkeypatch, fault):
    """It is passed on as it is: the file is good, and training again would replace it."""
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    with fault("failure of the device while a run resumes"):
        monkeypatch.setattr(Trainer, "load_state_dict", Mock(side_effect=error))
        with pytest.raises(RuntimeError) as seen:
            train(corpus, copied)
        assert seen.value is error


def test_passing_error_of_the_disk_does_not_start_a_run_over(corpus, copied, monkeypatch, fault):
    """Path.exists is False there from Python 3.14 on."""
    look = os.stat

    def failing(path, **options):
        if str(path).endswith(FILES):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return look(path, **options)

    monkeypatch.setattr(Path, "exists", lambda path: False)
    monkeypatch.setattr(os, "stat", failing)
    with fault("passing error of the disk"):
        assert train(corpus, copied).status.startswith("loaded")


# ----- two processes at once -----
@each("fails", [False, True], ids=["goes on", "fails"])
@each("seed", [CONFIG.seed, 1], ids=["the same run", "two runs"])
def test_run_of_another_process_is_not_overwritten(corpus, tmp_path, fault, seed, fails):
    """Else both would end well, and one of them be lost."""

    def another():
        train(corpus, tmp_path, replace(CONFIG, seed=seed), fresh=True)
        if fails:
            raise TrainingError("The loss is nan.")

    with fault("two processes in one folder"):
        with pytest.raises(CheckpointError, match="last.pt .* another folder.*[.]$"):
            train(corpus, tmp_path, view=at(EVERY + 1, another), save_every=1000 * fails)
        for name in FILES:
            assert saved(tmp_path, name)["identity"]["seed"] == seed
        assert saved(tmp_path)["iter_num"] == STEPS


@posix
@each("name", FILES)
def test_link_to_a_disk_that_is_not_there(corpus, copied, fault, name):
    """Else a new run would begin, and its file take the link's place."""
    (copied / name).unlink()
    (copied / name).symlink_to(copied / "unmounted" / name)
    with fault("checkpoint that is a link to a disk that is not there"):
        refused(partial(train, corpus, copied), name, "cannot be read")
        assert (copied / name).is_symlink()


@each("name", FILES)
@each("change", ["touched", "removed", "another's"])
def test_file_that_changes_during_the_run(corpus, finished, tmp_path, fault, name, change):
    """A new date means nothing, what was deleted is written again, what is another's stays."""
    folder, other = tmp_path / "out", tmp_path / "other"
    train(corpus, other, replace(CONFIG, seed=1))
    acts = {"touched": lambda: os.utime(folder / name, (1, 1)), "removed": (folder / name).unlink}
    act = acts.get(change, lambda: shutil.copy(other / name, folder))
    seconds = 0 if change == "removed" else 1000  # all is saved before, or nothing
    start = partial(train, corpus, folder, view=at(STEPS, act), save_every=seconds)
    with fault("a file of the run touched, removed or replaced while it trains"):
        if change == "another's":
            refused(start, name, "another folder")
            assert (folder / name).read_bytes() == (other / name).read_bytes()
        else:
            start()
            assert_same_files(folder, finished)


def test_run_loads_no_weights_that_another_process_wrote(corpus, tmp_path, fault):
    """As when the command starts afresh beside a notebook whose run is finished."""
    with fault("another process starts a finished run afresh"):
        run = train(corpus, tmp_path)
        train(corpus, tmp_path, fresh=True, view=base.stop(EVERY + 1))
        for which in ("best", "last"):
            refused(partial(run.load, which), "no longer, this run's")


@each("kind", ["the same run", "two runs"])
@seeds(1, 15)
def test_two_processes_in_one_folder(nursery, tmp_path, fault, kind, seed):
    """Both prepare the data and train. One finishes or both, and the files are whole."""
    both = [CONFIG, CONFIG if kind == "the same run" else replace(CONFIG, seed=1)]
    folder = tmp_path / "out"
    with fault(f"two processes in one folder, {kind}"):
        with contextlib.ExitStack() as stack:
            starts = [child(tmp_path, folder, config=config, stand_in=True) for config in both]
            ends = [list(sent)[-1] for _, sent in map(stack.enter_context, starts)]
        assert any(end == f"returned after {STEPS}" for end in ends), ends
        assert all(end.startswith(f"refused: {folder}") for end in ends if end[:3] != "ret"), ends
        assert sorted(contents(folder)) == sorted(FILES)
        corpus = load(tmp_path / "stand_in_char")
        if kind == "the same run":
            train(corpus, tmp_path / "alone")
            assert_same_files(folder, tmp_path / "alone")
        for name, which in (("last.pt", "last"), ("ckpt.pt", "best")):
            for config in both:  # no report takes the other's weights for its own
                own = config.seed == saved(folder, name)["identity"]["seed"]
                with contextlib.nullcontext() if own else pytest.raises(CheckpointError):
                    Run(config, corpus, folder).load(which)


# ----- numbers -----
@each("where", ["loss", "gradient", "weights"])
@seeds(2, 30)
def test_number_that_is_not_finite(corpus, finished, tmp_path, monkeypatch, fault, where, seed):
    rng, model, calls = random.Random(f"{where} {seed}"), make_model(CONFIG, corpus), []
    step = rng.randrange(4, STEPS) if seed % 2 else EVERY * rng.randrange(1, STEPS // EVERY)
    forward, move = GPT.forward, helpers.Optimizers.step
    bad = rng.choice([math.nan, math.inf, -math.inf])

    def poisoned(value):
        calls.append(None)
        return value * bad if len(calls) == step + 1 else value

    def move_and_poison(*arguments):  # an evaluation or else the next loss meets it first
        move(*arguments)
        calls.append(len(calls) == step - 1 and model.lm_head.weight.data.fill_(bad))

    if where == "loss":
        monkeypatch.setattr(GPT, "forward", lambda *arguments: poisoned(forward(*arguments)))
    elif where == "gradient":
        rng.choice(list(model.parameters())).register_hook(poisoned)
    else:
        monkeypatch.setattr(helpers.Optimizers, "step", move_and_poison)
    verb = "are" if where == "weights" else "is"
    with fault(f"{where} that {verb} not finite, at a random step"):
        named = f"At step {step} ", f"rate {helpers.get_lr(step - 1, CONFIG):.2e}", "kept"
        refused(partial(train, corpus, tmp_path, model=model), *named, kind=TrainingError)
        monkeypatch.undo()
        assert step - EVERY <= saved(tmp_path)["iter_num"] <= step
        for name in FILES:
            weights = helpers.load_model(tmp_path / name).state_dict()
            assert all(value.isfinite().all() for value in weights.values()), name
        resumes_to_the_same_end(corpus, tmp_path, finished)


FP16 = Precision(torch.device("cpu"), torch.float16, "for tests")


@each("power", range(24, 60, 4) if LONG else [40])
def test_overflow_in_fp16(corpus, tmp_path, monkeypatch, fault, power):
    """A scale that is too large: steps are left out until it fits, and a stopped run keeps it."""
    options, scaler = {"precision": FP16}, partial(torch.amp.GradScaler, init_scale=2.0**power)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    with fault("overflow in fp16 (simulated on a CPU)"):
        run = train(corpus, tmp_path / "a", **options)
        skipped = sum(not math.isfinite(norm) for norm in run.history["step_grad_norm"])
        assert skipped >= power - 22 and f"{skipped} steps left out" in run.status, run.status
        assert run.finished and all(map(math.isfinite, run.history["step_loss"]))
        assert saved(tmp_path / "a")["scaler"]["scale"] < 2.0**power
        train(corpus, tmp_path / "b", view=base.stop(7), **options)
        monkeypatch.undo()
        train(corpus, tmp_path / "b", **options)
        assert_same_files(tmp_path / "b", tmp_path / "a")


@each("name", ["transformer.h.0.mlp.c_fc.weight", "lm_head.weight"])
def test_overflow_of_one_gradient_leaves_out_the_whole_step(corpus, fault, name):
    """AdamW's parameters and Muon's alike, whichever of them the gradient belongs to."""
    model = make_model(config := replace(CONFIG, muon_lr_scale=20.0, weight_decay=0.5), corpus)
    trainer, moved = Trainer(model, corpus, config, FP16), []
    with fault("overflow in fp16 (simulated on a CPU)"):
        for step, scale in enumerate((1.0, math.inf, 1.0)):
            hook = model.get_parameter(name).register_hook(lambda grad, scale=scale: grad * scale)
            before = [parameter.clone() for parameter in model.parameters()]
            trainer.run_steps(step)
            pairs = zip(before, model.parameters(), strict=True)
            moved.append({not torch.equal(old, new) for old, new in pairs})
            hook.remove()
        assert moved == [{True}, {False}, {True}], f"whether parameters moved, by step: {moved}"


@each("first, then", [(CPU, FP16), (FP16, CPU)], ids=["float32 to fp16", "fp16 to float32"])
def test_run_that_resumes_in_another_precision(corpus, tmp_path, fault, first, then):
    """As when the folder is copied to another machine: the end is another, but it comes."""
    with fault("run that resumes in another precision"):
        train(corpus, tmp_path, precision=first, view=base.stop(31))
        run = train(corpus, tmp_path, precision=then)
        assert run.finished and run.last["val_loss"] < run.history["evals"][0]["val_loss"]


# ----- wrong configurations -----
WRONG = {
    int: (-1, 1.5, math.nan, "7", None, [7], True),
    float: (-0.1, math.nan, math.inf, "0.1", None, [0.1], 1j, True),
    bool: ("yes", 1, None),
}
VALUES = [(field.name, value) for field in fields(TrainConfig) for value in WRONG[field.type]]
VALUES += [(name, 0) for name in ("batch_size", "max_iters", "eval_iters", "n_layer", "n_head")]
VALUES += [(name, 1.0) for name in ("beta1", "beta2", "dropout", "min_lr")]
VALUES += [("learning_rate", 0.0), ("min_lr", 0.0), ("n_embd", 383), ("seed", 2**32)]
PLAIN = {name: value for name, value in asdict(CONFIG).items() if type(value) is not bool}
VALUES += [(name, np.array(value)[()]) for name, value in PLAIN.items()]


@each("name, value", VALUES)
def test_wrong_value_in_the_configuration(fault, name, value):
    """NumPy's numbers too: a checkpoint that holds one could not be read again."""
    numpy = isinstance(value, np.generic)
    with fault("number of NumPy in the configuration" if numpy else "wrong configuration"):
        message = refused(partial(TrainConfig, **{name: value}), name, value, kind=ValueError)
        assert "give" in message or "choose" in message, message


# ----- CUDA -----
@each("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_out_of_memory_leaves_room_for_a_smaller_batch(cuda, corpus, tmp_path, fault, dtype):
    """A real one, of a GPU of which this process may take 1 GiB."""
    options = {"precision": Precision(cuda, dtype, "for tests")}
    huge = replace(CONFIG, batch_size=2**19, eval_iters=1, eval_interval=STEPS)
    with fault("out of memory on the GPU"):
        torch.cuda.empty_cache()
        before, gpu = torch.cuda.memory_allocated(cuda), torch.cuda.current_device()
        share = 2**30 / torch.cuda.get_device_properties(gpu).total_memory
        torch.cuda.set_per_process_memory_fraction(share, gpu)
        try:
            way = partial(train, corpus, tmp_path / "huge", huge, **options)
            refused(way, f"batch_size {2**19}", "block_size 8", kind=TrainingError)
            held = torch.cuda.memory_allocated(cuda) - before
            assert held < 2**28, f"{held / 2**20:.0f} MiB are still held"
            assert train(corpus, tmp_path / "small", **options).finished
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, gpu)
