"""Faults: what users, disks and schedulers do to a run, each injected into a real small training.

python -m pytest tests/test_faults.py                   a few of each fault, in about a minute
FAULTS_LONG=1 python -m pytest tests/test_faults.py     many of each, and a table of what was tried and what held

Random places and moments come from seeds, which stand in the names of the tests.
"""

import contextlib
import errno
import functools
import io
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
import zipfile
from dataclasses import fields, replace
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from test_training import CPU, Bomb, Watcher, differences, own_handler, run, saved

import helpers
from data import fetch as fetching
from data.dataset import ByteTokenizer, CharTokenizer, GPT2Tokenizer, load
from data.fetch import DataError, fetch_gpt2
from data.prepare import ROOT as DATA
from data.prepare import alphabet, count, prepare, write_set
from helpers import CheckpointError, Precision, Settings, TrainingError, make_model
from model import GPT

LONG = os.environ.get("FAULTS_LONG", "0") not in ("", "0")
FILES = ("last.pt", "ckpt.pt")
SETTINGS = Settings(
    batch_size=2, block_size=8, n_layer=1, n_head=2, n_embd=8, dropout=0.1, learning_rate=1e-2, min_lr=1e-3,
    max_iters=90, warmup_iters=3, eval_interval=3, eval_iters=2,
)  # fmt: skip
posix = pytest.mark.skipif(os.name != "posix", reason="needs the signals and processes of POSIX")


def seeds(few, many):
    return pytest.mark.parametrize("seed", range(many if LONG else few))


def write_data(folder, text):
    """A prepared data set of a text by character, as data/prepare.py writes it."""
    facts = dict(title=folder.name, variant="test", source="the test", source_sha256={}, licence="none", split_rule="none")
    write_set(folder, {"train": count(text), "val": count(text[:400])}, alphabet(text), facts)
    return folder


def train(data, folder, **options):
    """Trains a model whose own weights are of another seed, so that a resumed run has them from the file alone."""
    model = make_model(replace(SETTINGS, seed=5), data)
    return run(model, data, options.pop("settings", SETTINGS), folder, **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def one_sentence(error, *named):
    """Asserts that an error is one readable sentence that names these, without a chain of causes."""
    message = str(error.value)
    assert all(str(part) in message for part in named), f"{named} not in: {message}"
    assert "\n" not in message and message.endswith(".") and "Traceback" not in message, message
    assert error.value.__suppress_context__ or error.value.__context__ is None or isinstance(error.value, DataError)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rng = random.Random(7)
    text = "".join(f"the {rng.choice(['old', 'red'])} {rng.choice(['dog', 'cat', 'bird'])} sees.\n" for _ in range(150))
    return load(write_data(tmp_path_factory.mktemp("data") / "sentences", text))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("finished")
    train(data, folder)
    assert sorted(contents(folder)) == sorted(FILES)
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "copied"))


def goes_on_to_the_same_end(data, folder, finished):
    """What is there can be read, and training on ends bit-identical to the run that nothing disturbed."""
    for path in folder.glob("*.pt"):
        helpers.load_checkpoint(path)
    train(data, folder)
    for name in FILES:
        gaps = differences(saved(folder, name), saved(finished, name), name)
        assert not gaps, gaps[:3]


# ---------------------------------------------------------------------------------------------- killed and stopped

PROCESSES = multiprocessing.get_context("forkserver") if os.name == "posix" else None


@pytest.fixture(scope="module")
def nursery():
    """A process that has imported everything and trained nothing, from which children start in milliseconds."""
    if PROCESSES is None:
        pytest.skip("needs the processes of POSIX")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), str(DATA.parent)]))
        PROCESSES.set_forkserver_preload([__name__])
        forkserver.ensure_running()


def train_in_child(pipe, source, folder, options):
    """Trains, and sends each step's number, then how it ended; the process exits with 1 for what is not foreseen."""
    torch.set_num_threads(1)
    if "deadly" in options:
        die_while_saving(*options.pop("deadly"))
    settings = options.pop("settings", SETTINGS)
    try:
        if options.pop("prepare", False):
            os.environ.pop("DATA_MIRROR", None)
            os.environ["NANOGPT_OFFLINE"] = "1"
            source = prepare("shakespeare_char", allow_stand_in=True, root=source)
        data = load(source)
        history = run(make_model(settings, data), data, settings, folder, view=Watcher(pipe.send), **options)
        pipe.send(f"returned after {len(history['step_loss'])}")
    except (CheckpointError, DataError) as error:
        pipe.send(f"refused: {error}")


def die_while_saving(stage, number):
    """Lets this process kill itself in the `number`th save, where `stage` says."""
    calls = {"count": 0}

    def replacement(real, before, write=None):
        def call(*arguments, **options):
            calls["count"] += 1
            if calls["count"] == number and before:
                write and write(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*arguments, **options)
            if calls["count"] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    def half(checkpoint, file):
        whole = io.BytesIO()
        real(checkpoint, whole)
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()

    real = torch.save
    owner, name, before, write = {
        "half written": (torch, "save", True, half),
        "before the flush": (os, "fsync", True, None),
        "before the rename": (os, "replace", True, None),
        "after the rename": (os, "replace", False, None),
    }[stage]
    setattr(owner, name, replacement(getattr(owner, name), before, write))


@contextlib.contextmanager
def child(source, folder, **options):
    """A process that trains, and what it sends."""
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=train_in_child, args=(sender, source, folder, options))
    process.start()
    sender.close()

    def sent():
        with contextlib.suppress(EOFError, OSError):  # the process ended, perhaps within a message
            while True:
                assert receiver.poll(60), "the process says nothing for a minute"
                yield receiver.recv()

    try:
        yield process, sent()
    finally:
        process.kill()
        process.join()


def signalled(source, folder, number, rng, steps=60, **options):
    """Trains in a process that gets a signal within so many steps; returns its exit status and last messages."""
    moment, delay = rng.randrange(steps), rng.choice([0.0, rng.uniform(0, 0.02)])
    with child(source, folder, **options) as (process, sent):
        for _ in range(moment + 1):
            next(sent)
        time.sleep(delay)
        os.kill(process.pid, number)
        rest = list(sent)
        process.join(60)
        return process.exitcode, rest


@posix
@seeds(5, 60)
def test_kill_9_at_a_random_moment(nursery, data, finished, tmp_path, fault, seed):
    with fault("kill -9 at a random moment"):
        status, _ = signalled(data.folder, tmp_path, signal.SIGKILL, random.Random(seed))
        assert status == -signal.SIGKILL
        goes_on_to_the_same_end(data, tmp_path, finished)


@posix
@seeds(1, 10)
def test_kill_9_again_and_again_in_one_run(nursery, data, finished, tmp_path, fault, seed):
    rng = random.Random(1000 + seed)
    for _ in range(3):
        with fault("kill -9 again in a run that was killed before"):
            status, _ = signalled(data.folder, tmp_path, signal.SIGKILL, rng, steps=15)
            assert status == -signal.SIGKILL
            for path in tmp_path.glob("*.pt"):
                helpers.load_checkpoint(path)
    goes_on_to_the_same_end(data, tmp_path, finished)


@posix
@pytest.mark.parametrize("stage", ["half written", "before the flush", "before the rename", "after the rename"])
@seeds(1, 10)
def test_kill_9_while_a_checkpoint_is_written(nursery, data, finished, tmp_path, fault, stage, seed):
    number = 1 + random.Random(f"{stage} {seed}").randrange(25) if seed else 1
    with fault("kill -9 while a checkpoint is written"):
        with child(data.folder, tmp_path, deadly=(stage, number)) as (process, sent):
            steps = list(sent)
            process.join(60)
        assert process.exitcode == -signal.SIGKILL and len(steps) < 90, (process.exitcode, steps[-1:])
        goes_on_to_the_same_end(data, tmp_path, finished)


@posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@seeds(2, 30)
def test_signal_at_a_random_moment(nursery, data, finished, tmp_path, fault, number, seed):
    """Nothing but the signal makes this run write, so what stands there afterwards was saved by it."""
    with fault(f"{number.name} at a random moment"):
        status, sent = signalled(data.folder, tmp_path, number, random.Random(2000 + seed), save_seconds=1000)
        step = saved(tmp_path)["iter_num"]
        if number == signal.SIGTERM:  # takes its course after saving
            assert status == -signal.SIGTERM, status
        else:
            assert status == 0 and sent[-1] == f"returned after {step}", (status, sent[-1:])
        assert 0 < step < 90 and sorted(contents(tmp_path)) == sorted(FILES)
        goes_on_to_the_same_end(data, tmp_path, finished)


# --------------------------------------------------------------------------------------------- damaged checkpoints


def refused(data, folder, name):
    """Every way to read a damaged checkpoint refuses it in one sentence and leaves the folder as it is."""
    path, before = folder / name, contents(folder)
    ways = [lambda: helpers.load_model(path), lambda: train(data, folder)]
    which = {"last.pt": "last", "ckpt.pt": "best"}[name]
    ways.append(lambda: helpers.Run(data, SETTINGS, {}, folder, "black").load(which, "cpu"))
    for way in ways:
        with pytest.raises(CheckpointError) as error:
            way()
        one_sentence(error, path)
    assert contents(folder) == before, "a file was changed"


@pytest.mark.parametrize("name", FILES)
def test_checkpoint_cut_short(data, copied, fault, name):
    path = copied / name
    whole, parts = path.read_bytes(), 100 if LONG else 10
    for length in (*(len(whole) * part // parts for part in range(parts)), len(whole) - 1):
        with fault("checkpoint cut short, or empty"):
            path.write_bytes(whole[:length])
            refused(data, copied, name)


@pytest.mark.parametrize("name", FILES)
@seeds(1, 20)
def test_bits_flipped_in_a_checkpoint(data, copied, fault, name, seed):
    """Refused, or without effect, as in the padding between two tensors."""
    path, rng, noticed = copied / name, random.Random(seed), 0
    whole, good = path.read_bytes(), saved(copied, name)
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
    for attempt in range(60):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 1, 8])):
            place = rng.randrange(directory if attempt % 2 else 0, len(whole))
            damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with fault("bits flipped in a checkpoint"):
            try:
                read = helpers.load_checkpoint(path)
            except CheckpointError:
                noticed += 1
                refused(data, copied, name)
            else:
                assert not differences(read, good), f"byte {place} of {len(whole)} changed the values unnoticed"
    assert noticed > 20, f"{noticed} of 60 were refused"


@pytest.mark.parametrize("name", FILES)
def test_a_part_marked_as_a_folder_is_read_all_the_same(data, copied, name):
    """One bit in the archive's directory, which no sum covers, and for which torch itself gives back other bytes."""
    path, good = copied / name, saved(copied, name)
    damaged = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        place, parts = archive.start_dir, archive.infolist()
    for part in parts:
        damaged[place + 38] |= 0x10
        place += 46 + len(part.filename) + len(part.extra)
    path.write_bytes(damaged)
    with zipfile.ZipFile(path) as archive:
        assert all(part.external_attr & 0x10 for part in archive.infolist()), "not the byte that was meant"
    assert not differences(helpers.load_checkpoint(path), good)


def zipped(folder):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("readme.txt", "not a checkpoint")
    return archive.getvalue()


def torch_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def nanogpt_checkpoint(folder):
    """The dict that nanoGPT's train.py writes, of a model of another shape."""
    settings = replace(SETTINGS, n_embd=16, bias=False)
    model = GPT(settings.model_config(vocab_size=65))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    arguments = {field.name: getattr(model.config, field.name) for field in fields(model.config)}
    return torch_file({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "model_args": arguments,
                       "iter_num": 7, "best_val_loss": torch.tensor(1.5), "config": {"batch_size": 12}})  # fmt: skip


FOREIGN = {
    "text": lambda folder: b"not a checkpoint\n" * 100,
    "zip of something else": zipped,
    "page of HTML": lambda folder: b"<!doctype html><title>404</title>",
    "torch file of a list": lambda folder: torch_file([1, 2]),
    "torch file of another dict": lambda folder: torch_file({"epoch": 3, "state_dict": {}}),
    "bare state dict": lambda folder: torch_file(saved(folder)["model"]),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_file_in_place_of_a_checkpoint(data, copied, fault, kind, name):
    with fault("foreign file in place of a checkpoint"):
        (copied / name).write_bytes(FOREIGN[kind](copied))
        path, before = copied / name, contents(copied)
        with pytest.raises(CheckpointError) as error:
            helpers.load_model(path)
        one_sentence(error, path)
        with pytest.raises(CheckpointError) as error:
            train(data, copied)
        one_sentence(error, path)
        assert contents(copied) == before


@pytest.mark.parametrize("name", FILES)
def test_nanogpt_checkpoint_of_another_shape(data, copied, fault, name):
    """Its model may be looked at, but no run goes on from it."""
    with fault("foreign file in place of a checkpoint"):
        (copied / name).write_bytes(nanogpt_checkpoint(copied))
        assert helpers.load_model(copied / name).config.n_embd == 16
        with pytest.raises(CheckpointError) as error:
            helpers.load_model(copied / name, vocab_size=data.vocab_size)
        one_sentence(error, copied / name, 65)
        with pytest.raises(CheckpointError) as error:
            train(data, copied)
        one_sentence(error, copied / name, "another run", "fresh=True")


@pytest.mark.parametrize("name, which", [("last.pt", "last"), ("ckpt.pt", "best")])
def test_checkpoint_with_weights_of_another_shape(data, copied, fault, name, which):
    """Only what reads the weights can see it: going on from the last, the report from the best."""
    with fault("foreign file in place of a checkpoint"):
        good = saved(copied, name)
        torch.save({**good, "model": {key: value[:1] for key, value in good["model"].items()}}, copied / name)
        ways = [lambda: helpers.Run(data, SETTINGS, {}, copied, "black").load(which, "cpu")]
        ways += [lambda: train(data, copied)] * (name == "last.pt")
        for way in ways:
            with pytest.raises(CheckpointError) as error:
                way()
            one_sentence(error, copied / name)


@pytest.mark.parametrize("name", FILES)
def test_folder_in_place_of_a_checkpoint(data, copied, fault, name):
    with fault("foreign file in place of a checkpoint"):
        (copied / name).unlink()
        (copied / name).mkdir()
        refused(data, copied, name)


@pytest.mark.parametrize("part", ["model", "optimizer", "scaler", "rng", "model_args", "settings", "data", "iter_num",
                                  "best_val_loss", "history", "seconds"])  # fmt: skip
def test_checkpoint_without_one_of_its_parts(data, copied, fault, part):
    """As another program, or another version of this one, would write it."""
    good = saved(copied)
    for changed in ({key: value for key, value in good.items() if key != part}, {**good, part: [1]}):
        with fault("checkpoint without one of its parts, or with another kind of value there"):
            torch.save(changed, copied / "last.pt")
            before = contents(copied)
            with pytest.raises(CheckpointError) as error:
                train(data, copied)
            one_sentence(error, copied / "last.pt")
            assert contents(copied) == before


def test_best_checkpoint_missing(data, copied, fault):
    """It cannot be made again without training, so the sentence says how."""
    with fault("best checkpoint missing, or of another run"):
        (copied / "ckpt.pt").unlink()
        with pytest.raises(CheckpointError) as error:
            train(data, copied)
        one_sentence(error, copied / "ckpt.pt", "fresh=True")


@posix
def test_kill_9_between_the_two_files_of_a_fresh_run(nursery, data, copied, finished, fault):
    """The new run's untrained state must not pass for the best of the old one."""
    with fault("best checkpoint missing, or of another run"):
        with child(data.folder, copied, deadly=("after the rename", 1), fresh=True) as (process, sent):
            list(sent)
            process.join(60)
        assert process.exitcode == -signal.SIGKILL and saved(copied, "ckpt.pt")["iter_num"] == 0
        with pytest.raises(CheckpointError) as error:
            train(data, copied)
        one_sentence(error, copied / "ckpt.pt", "fresh=True")
        train(data, copied, fresh=True)
        assert not differences(saved(copied, "ckpt.pt"), saved(finished, "ckpt.pt"))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("form", ["pickle", "torch zip", "torch before 1.6"])
@pytest.mark.parametrize("place", ["history", "model", "whole"])
def test_code_in_a_checkpoint_is_not_run(data, copied, tmp_path, fault, place, form, name):
    created = tmp_path / "created"
    hostile = Bomb(created) if place == "whole" else {**saved(copied), place: Bomb(created)}
    with fault("code in a checkpoint"):
        if form == "pickle":
            (copied / name).write_bytes(pickle.dumps(hostile))
        else:
            torch.save(hostile, copied / name, _use_new_zipfile_serialization=form == "torch zip")
        refused(data, copied, name)
        assert not created.exists(), "the code in the file was run"


# --------------------------------------------------------------------------------------------------- damaged data


@pytest.fixture
def prepared(data, tmp_path):
    """A copy of the prepared data, to be damaged."""
    return Path(shutil.copytree(data.folder, tmp_path / "sentences"))


def data_refused(path):
    before = contents(path.parent)
    with pytest.raises(DataError) as error:
        load(path.parent)
    one_sentence(error, path, "prepare")
    assert contents(path.parent) == before, "a file was changed"


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "meta.json"])
def test_prepared_file_cut_short(prepared, fault, name):
    path = prepared / name
    whole, parts = path.read_bytes(), 100 if LONG else 10
    for length in (*(len(whole) * part // parts for part in range(parts)), len(whole) - 1):
        with fault(f"{path.suffix} cut short, to an odd size, or empty" if name != "meta.json" else "meta.json cut short"):
            path.write_bytes(whole[:length])
            data_refused(path)


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
@seeds(1, 10)
def test_bit_flipped_in_a_bin(prepared, fault, name, seed):
    path, rng = prepared / name, random.Random(seed)
    whole = path.read_bytes()
    for _ in range(20):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        with fault("bit flipped in a .bin"):
            path.write_bytes(damaged)
            data_refused(path)


@seeds(1, 10)
def test_bit_flipped_in_meta_json(data, prepared, fault, seed):
    """Refused, or in a value that tokens and vocabulary do not depend on, such as the title."""
    path, rng = prepared / "meta.json", random.Random(seed)
    whole, noticed = path.read_bytes(), 0
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with fault("bit flipped in meta.json"):
            try:
                read = load(prepared)
            except DataError:
                noticed += 1
                with pytest.raises(DataError) as error:
                    load(prepared)
                one_sentence(error, prepared, "prepare")
            else:
                assert all(np.array_equal(read.splits[split], data.splits[split]) for split in data.splits)
                assert read.vocab_size == data.vocab_size
    assert noticed > 15, f"{noticed} of 60 were refused"


def test_another_data_set_in_place_of_the_trained_one(data, copied, tmp_path, fault):
    other = write_data(tmp_path / "sentences", data.tokenizer.decode(data.splits["train"])[::-1])
    with fault("another data set in place of the trained one"):
        before = contents(copied)
        with pytest.raises(CheckpointError) as error:
            train(load(other), copied)
        one_sentence(error, copied / "last.pt", f"fingerprint {data.fingerprint!r} there", "fresh=True")
        assert contents(copied) == before


# -------------------------------------------------------------------------------------- full disks, closed folders


class Filling:
    """A file that takes so many bytes, and then has the disk full."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, content):
        self.room -= len(memoryview(content).cast("B"))
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(content)

    def __getattr__(self, name):
        return getattr(self.file, name)


def disk_fills_while_training(data, folder, finished, fill, clear):
    """The write that fails is of the first save after step 30; what was saved before it is kept, and goes on."""
    kept = {}

    def at(step):
        if step == 31:
            kept.update(contents(folder))
            fill()

    with pytest.raises(CheckpointError) as error:
        train(data, folder, view=Watcher(at))
    one_sentence(error, folder, "No space left", "free disk space")
    clear()
    assert contents(folder) == kept, "the files of before were changed, or a part of a file was left"
    assert saved(folder)["iter_num"] == 30
    goes_on_to_the_same_end(data, folder, finished)


@seeds(5, 50)
def test_write_that_fails_for_want_of_room(data, finished, tmp_path, monkeypatch, fault, seed):
    room = random.Random(seed).randrange(35_000)

    @contextlib.contextmanager
    def filling(path, mode):
        with open(path, mode) as file:
            yield Filling(file, room)

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill():
        if seed % 5:
            monkeypatch.setattr(fetching, "open", filling, raising=False)
        else:
            monkeypatch.setattr(os, "fsync", full)

    with fault("disk full: a write or a flush fails"):
        disk_fills_while_training(data, tmp_path, finished, fill, monkeypatch.undo)


def test_disk_that_is_full_when_a_run_starts_over(data, copied, finished, monkeypatch, fault):
    """The old run's files stay until the new one's are written."""

    @contextlib.contextmanager
    def filling(path, mode):
        with open(path, mode) as file:
            yield Filling(file, 2_000)

    with fault("disk full: a write or a flush fails"):
        with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="No space left"):
            patch.setattr(fetching, "open", filling, raising=False)
            train(data, copied, fresh=True)
        assert contents(copied) == contents(finished)


def test_failure_of_a_run_that_starts_over(data, copied, finished, fault):
    """What the failed run leaves is not mixed with the old run: it is refused or trained to the right end."""

    def poison(step):
        if step == 4:
            model.lm_head.weight.data[0] = math.nan

    with fault("best checkpoint missing, or of another run"):
        model = make_model(SETTINGS, data)
        with pytest.raises(TrainingError):
            run(model, data, SETTINGS, copied, fresh=True, view=Watcher(poison), save_seconds=1000)
        try:
            train(data, copied)
        except CheckpointError as error:
            assert "ckpt.pt" in str(error) and "fresh=True" in str(error), error
            train(data, copied, fresh=True)
        for name in FILES:
            assert not differences(saved(copied, name), saved(finished, name))


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


@seeds(3, 20)
def test_disk_that_is_full(data, finished, small_disk, fault, seed):
    folder = small_disk / "run"
    folder.mkdir()
    room = random.Random(seed).randrange(35_000)
    with fault("disk full: a small disk of its own"):
        disk_fills_while_training(data, folder, finished, lambda: leave(room, small_disk), (small_disk / "ballast").unlink)


@seeds(2, 10)
def test_disk_that_is_full_while_data_is_prepared(small_disk, fault, seed):
    text = "To be, or not to be, that is the question.\n" * 400
    leave(random.Random(seed).randrange(20_000), small_disk)
    with fault("disk full: a small disk of its own"):
        with pytest.raises(DataError) as error:
            write_data(small_disk / "sentences", text)
        one_sentence(error, small_disk, "make room")
        with pytest.raises(DataError, match="no data is prepared"):
            load(small_disk / "sentences")
        (small_disk / "ballast").unlink()
        load(write_data(small_disk / "sentences", text))


def test_folder_on_a_disk_that_is_read_only(data, finished, small_disk, fault):
    """A finished run is loaded there as anywhere; one that has to write says that it cannot."""
    shutil.copytree(finished, small_disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True, timeout=10)
    with fault("read-only folder, or none that can be made"):
        assert len(train(data, small_disk / "run")["step_loss"]) == 90
    for folder, fresh in ((small_disk / "run", True), (small_disk / "new", False)):
        with fault("read-only folder, or none that can be made"):
            with pytest.raises(CheckpointError) as error:
                train(data, folder, fresh=fresh)
            one_sentence(error, folder, "Read-only file system")
    assert contents(small_disk / "run") == contents(finished)


def test_folder_without_the_right_to_write(data, copied, finished, monkeypatch, fault):
    def denied(path, mode):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with fault("read-only folder, or none that can be made"):
        with monkeypatch.context() as patch, pytest.raises(CheckpointError) as error:
            patch.setattr(fetching, "open", denied, raising=False)
            train(data, copied, fresh=True)
        one_sentence(error, copied, "Permission denied", "choose another folder")
        assert contents(copied) == contents(finished)


def test_file_in_place_of_the_folder(data, tmp_path, fault):
    (tmp_path / "file").write_text("kept")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with fault("read-only folder, or none that can be made"):
            with pytest.raises(CheckpointError) as error:
                train(data, folder)
            one_sentence(error, folder, "choose another folder")
            assert (tmp_path / "file").read_text() == "kept"


# ------------------------------------------------------------------------------------------- two processes at once


@posix
@pytest.mark.parametrize("kind", ["the same run", "two runs"])
@seeds(1, 15)
def test_two_processes_in_one_folder(nursery, tmp_path, fault, kind, seed):
    """Both prepare the data and train. Each ends by itself or is refused, and the files are whole, whosever they are."""
    both = [SETTINGS, replace(SETTINGS, seed=1 if kind == "two runs" else SETTINGS.seed)]
    folder, ends = tmp_path / "out", []
    with fault(f"two processes in one folder, {kind}"):
        with contextlib.ExitStack() as stack:
            children = [
                stack.enter_context(child(tmp_path, folder, settings=settings, prepare=True)) for settings in both
            ]
            for process, sent in children:
                ends.append(list(sent)[-1])
                process.join(60)
                assert process.exitcode == 0, ends
        assert all(end == "returned after 90" or end.startswith(f"refused: {folder}") for end in ends), ends
        assert "returned after 90" in ends and (kind == "two runs" or len(set(ends)) == 1), ends
        assert sorted(contents(folder)) == sorted(FILES)
        data = load(tmp_path / "stand_in_char")
        whose = []
        for name in FILES:
            settings = Settings(**helpers.load_checkpoint(folder / name)["settings"])
            assert settings in both
            whose.append(settings)
        if kind == "the same run":
            run(make_model(SETTINGS, data), data, SETTINGS, tmp_path / "alone")
            assert not differences(saved(folder), saved(tmp_path / "alone"))
        for settings in both:  # no report takes the other's weights for its own
            own = helpers.Run(data, settings, {}, folder, "black")
            for which, owner in zip(("last", "best"), whose):
                if owner == settings:
                    own.load(which, "cpu")
                else:
                    with pytest.raises(CheckpointError, match="seed 1337 there, 1 here|seed 1 there, 1337 here"):
                        own.load(which, "cpu")


# ------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("where", ["loss", "gradient", "weights"])
@seeds(2, 30)
def test_number_that_is_not_finite(data, finished, tmp_path, monkeypatch, fault, where, seed):
    rng = random.Random(f"{where} {seed}")
    step, bad, calls = rng.randrange(4, 90), rng.choice([math.nan, math.inf, -math.inf]), []
    loss, clip = GPT.loss, helpers.clip_gradients

    def poisoned_loss(model, *arguments):
        calls.append(None)
        return loss(model, *arguments) * (bad if len(calls) == step + 1 else 1.0)

    def poisoned_gradients(parameters, largest):
        calls.append(None)
        parameters = list(parameters)
        if len(calls) == step + 1:
            rng.choice(parameters).grad.view(-1)[0] = bad
        return clip(parameters, largest)

    def poisoned_weights(now):
        if now == step:
            model.lm_head.weight.data.view(-1)[rng.randrange(8)] = bad

    model = make_model(SETTINGS, data)
    with fault(f"{where} that is not finite, at a random step"):
        with monkeypatch.context() as patch, pytest.raises(TrainingError) as error:
            if where == "loss":
                patch.setattr(GPT, "loss", poisoned_loss)
            if where == "gradient":
                patch.setattr(helpers, "clip_gradients", poisoned_gradients)
            view = Watcher(poisoned_weights if where == "weights" else lambda now: None)
            run(model, data, SETTINGS, tmp_path, view=view)
        one_sentence(error, "lower learning_rate", "kept")
        message = str(error.value)
        assert re.match(rf"(Step {step} gave|After step {step} the estimates)", message), f"step {step}: {message}"
        rates = [f"{helpers.get_lr(now, SETTINGS):.2e}" for now in (step - 1, step)]
        assert any(f"rate {rate}" in message for rate in rates), f"none of {rates} in: {message}"
        at = saved(tmp_path)["iter_num"]
        assert step - 3 <= at <= step, f"saved at {at}"
        for name in FILES:
            weights = helpers.load_model(tmp_path / name).state_dict()
            assert all(value.isfinite().all() for value in weights.values()), f"{name} holds weights that are not finite"
        goes_on_to_the_same_end(data, tmp_path, finished)


FP16 = Precision(torch.device("cpu"), torch.float16, "for tests")


@pytest.mark.parametrize("power", range(24, 60, 4) if LONG else [40])
def test_overflow_in_fp16(data, tmp_path, monkeypatch, fault, power):
    """A scale that is far too large: the scaler leaves steps out until it fits, and a stopped run keeps it."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda device, enabled: scaler(device, init_scale=2.0**power, enabled=enabled)
    )
    with fault("overflow in fp16 (simulated on a CPU)"):
        history = train(data, tmp_path / "a", precision=FP16)
        assert helpers.overflows(history) >= power - 22, f"{helpers.overflows(history)} overflows were counted"
        assert len(history["step_loss"]) == 90 and all(map(math.isfinite, history["step_loss"]))
        assert saved(tmp_path / "a")["scaler"]["scale"] < 2.0**power

        def stop(step):
            if step == 7:
                os.kill(os.getpid(), signal.SIGINT)

        with own_handler(signal.SIGINT):
            train(data, tmp_path / "b", precision=FP16, view=Watcher(stop))
        monkeypatch.undo()
        train(data, tmp_path / "b", precision=FP16)
        for name in FILES:
            gaps = differences(saved(tmp_path / "a", name), saved(tmp_path / "b", name), name)
            assert not gaps, gaps[:3]


@pytest.mark.parametrize("first, then", [(CPU, FP16), (FP16, CPU)], ids=["float32 to fp16", "fp16 to float32"])
def test_run_that_goes_on_in_another_precision(data, tmp_path, fault, first, then):
    """As when the folder is copied to a machine with another card; the end is then another one, but it comes."""
    def stop(step):
        if step == 31:
            os.kill(os.getpid(), signal.SIGINT)

    with fault("run that goes on in another precision"):
        with own_handler(signal.SIGINT):
            train(data, tmp_path, precision=first, view=Watcher(stop))
        history = train(data, tmp_path, precision=then)
        assert len(history["step_loss"]) == 90 and history["val_loss"][-1] < history["val_loss"][0]


# ------------------------------------------------------------------------------------------------ wrong settings

WRONG = {
    int: (-1, 1.5, math.nan, "7", None, [7], True),
    float: (-0.1, math.nan, math.inf, "0.1", None, [0.1], 1j),
    bool: ("yes", 1, None),
}


@pytest.mark.parametrize("field, value", [(f.name, value) for f in fields(Settings) for value in WRONG[f.type]])
def test_wrong_setting(fault, field, value):
    with fault("wrong setting"):
        with pytest.raises(ValueError) as error:
            Settings(**{field: value})
        one_sentence(error, field, value, "give")


@pytest.mark.parametrize("field", [f.name for f in fields(Settings) if f.type is not bool])
def test_number_of_numpy_in_the_settings(data, tmp_path, fault, field):
    """Refused, or a run with it can be read again: a checkpoint holds no values of NumPy."""
    plain = getattr(SETTINGS, field)
    with fault("number of NumPy in the settings"):
        try:
            settings = replace(SETTINGS, **{field: (np.int64 if isinstance(plain, int) else np.float64)(plain)})
        except ValueError as error:
            assert field in str(error)
            return
        train(data, tmp_path, settings=settings)
        helpers.load_model(tmp_path / "last.pt")


# ----------------------------------------------------------------------------------------------------- properties

several = examples(deadline=None, max_examples=300 if LONG else 50)


@several
@given(st.text())
def test_bytes_of_any_text_come_back(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@several
@given(st.data(), st.sets(st.characters(), min_size=1, max_size=60))
def test_characters_of_any_alphabet_come_back(draw, chars):
    tokenizer = CharTokenizer("".join(sorted(chars)))
    text = draw.draw(st.text(st.sampled_from(sorted(chars))))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text) and all(0 <= i < tokenizer.vocab_size for i in ids)
    strange = draw.draw(st.characters().filter(lambda char: char not in chars))
    with pytest.raises(ValueError, match="lacks"):
        tokenizer.encode(text + strange)


@functools.cache
def gpt2_tokenizer():
    """GPT-2's tokenizer where its files are at hand, without the network."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setenv("NANOGPT_OFFLINE", "1")
        patch.setenv("TIKTOKEN_CACHE_DIR", "")  # restores what fetch_gpt2 sets
        ready = (DATA / "gpt2_cache").exists()
        try:
            fetch_gpt2(DATA if ready else Path(folder))
            tokenizer = GPT2Tokenizer(DATA if ready else Path(folder))
            tokenizer.encode("read while the folder is there")
            return tokenizer
        except DataError:
            return None


@several
@given(st.text())
def test_gpt2_tokens_of_any_text_come_back(text):
    tokenizer = gpt2_tokenizer()
    if tokenizer is None:
        pytest.skip("needs GPT-2's two files: DATA_MIRROR is not set, and data/gpt2_cache is not there")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and all(0 <= i < tokenizer.vocab_size for i in ids)


@several
@given(st.integers(1, 40), st.integers(1, 500), st.integers(1, 9), st.integers(0, 2**32 - 1), st.integers(-1, 10**6))
def test_any_window_is_a_stretch_of_the_text(block, spare, batch, seed, step):
    """Inputs and targets are what stands there, the same at every call, whatever else draws in between."""
    settings = replace(SETTINGS, block_size=block, batch_size=batch, seed=seed)
    tokens = torch.randint(2**16, (block + spare,), dtype=torch.int32)
    starts = helpers.draw_starts(len(tokens), settings, step, 2)
    assert starts.shape == (2, batch) and starts.min() >= 0 and starts.max() < spare
    torch.rand(3)
    assert torch.equal(starts, helpers.draw_starts(len(tokens), settings, step, 2))
    for x, y, start in zip(*helpers.get_batch(tokens, starts[0], block), starts[0].tolist()):
        assert x.tolist() == tokens[start : start + block].tolist()
        assert y.tolist() == tokens[start + 1 : start + block + 1].tolist()


@several
@given(st.integers(1, 500), st.floats(0, 1), st.floats(1e-6, 1.0), st.floats(0.01, 1.0), st.integers(0, 499))
def test_the_rate_never_jumps(length, share, peak, ratio, step):
    """Between two steps it moves by no more than the steepest part of warm-up or cosine does."""
    settings = replace(
        SETTINGS, learning_rate=peak, min_lr=peak * ratio, max_iters=length, warmup_iters=int(share * length)
    )
    now, then = helpers.get_lr(step, settings), helpers.get_lr(step + 1, settings)
    cosine = math.pi / 2 * (peak - peak * ratio) / max(1, length - settings.warmup_iters)
    assert abs(then - now) <= max(peak / (settings.warmup_iters + 1), cosine) * (1 + 1e-9), (now, then)


# ------------------------------------------------------------------------------------------------------------ CUDA


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cuda_out_of_memory_leaves_room_for_a_smaller_batch(cuda, data, tmp_path, fault, dtype):
    """A real one, of a card of which this process may take 1 GiB."""
    precision = Precision(cuda, dtype, "for tests")
    huge = replace(SETTINGS, batch_size=2**19, eval_iters=1, eval_interval=90)
    model = make_model(huge, data)
    with fault("out of memory on the card"):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(cuda)
        card = torch.cuda.current_device()  # this call takes no device without an index
        torch.cuda.set_per_process_memory_fraction(2**30 / torch.cuda.get_device_properties(card).total_memory, card)
        try:
            with pytest.raises(TrainingError) as error:
                run(model, data, huge, tmp_path / "huge", precision=precision)
            one_sentence(error, f"batch_size {2**19}", "block_size 8", "lower batch_size")
            held = torch.cuda.memory_allocated(cuda) - before
            assert held < 2**28, f"{held / 2**20:.0f} MiB are still held after running out of memory"
            history = run(make_model(SETTINGS, data), data, SETTINGS, tmp_path / "small", precision=precision)
            assert len(history["step_loss"]) == 90
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, card)
