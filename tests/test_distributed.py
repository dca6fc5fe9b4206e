"""Batches from the disk, training in several processes, and the command line.

    python -m pytest tests/test_distributed.py

Two processes train with gloo on the CPU: torchrun starts this very file, which then calls the
function that its first argument names.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

import helpers
from data.batches import BatchLoader, gather, load_tokens
from data.dataset import load
from data.prepare import NAMES, prepare_text
from helpers import CheckpointError, TrainConfig, estimate_loss, make_model, train_model

ROOT = Path(__file__).resolve().parent.parent
SMOKE = helpers.PRESETS["smoke"].wikitext2
CPU = helpers.choose_precision("cpu")
SMALL = replace(SMOKE, gradient_accumulation_steps=2, max_iters=24, eval_interval=8)
SHARES = {  # how two processes may share a batch: by micro-steps, by sequences, by both
    "micro-steps": SMALL,
    "sequences": replace(SMALL, gradient_accumulation_steps=1),
    "sequences of micro-steps": replace(SMALL, gradient_accumulation_steps=3),
    "improved": replace(SMALL, rotary=True, rms_norm=True, pointer=True, muon_lr_scale=5.0),
}


def train(data, config, folder, **options):
    """Trains a model whose own weights are of another seed: a run's are from its seed or file."""
    model = make_model(replace(config, seed=5), data)
    return train_model(model, data, config, folder, precision=CPU, save_every=1000, **options)


def interrupt(run):
    """A view that interrupts this process after step 11."""
    if run.step == 11 and not run.status:
        signal.raise_signal(signal.SIGINT)


def curves(run):
    """What a run's history says of its losses, as plain values."""
    rows = [[row[key] for row in run.history["evals"]] for key in ("train_loss", "val_loss")]
    return [run.history["step_loss"], run.history["step_grad_norm"], *rows]


def saved(folder, name="last.pt"):
    return torch.load(Path(folder) / name, weights_only=True)


# ----- batches -----


def test_batches_from_the_disk_are_those_on_the_device():
    tokens = np.random.default_rng(0).integers(0, 2**16, 500).astype(np.uint16)
    shape, block, there = (5, 2, 3), 7, load_tokens(tokens, "cpu")
    loaders = [BatchLoader(t, shape, block, torch.device("cpu")) for t in (there, tokens)]
    starts = torch.randint(500 - block, shape, generator=torch.Generator().manual_seed(0))
    for count in (5, 3):  # all rows of the table, and the last steps of a run
        starts = starts[:count].flip(0)
        windows = tokens[starts.numpy()[..., None] + np.arange(block + 1)].astype(np.int64)
        for loader in loaders:
            loader.load(starts)
            for place in np.ndindex(count, 2):
                x, y = loader.get(torch.tensor(place[:1]), place[1])
                assert torch.equal(x, torch.from_numpy(windows[place][:, :-1])), place
                assert torch.equal(y, torch.from_numpy(windows[place][:, 1:])), place
    assert torch.equal(gather(tokens, starts), gather(there, starts))


def test_room_decides_where_tokens_lie(monkeypatch):
    few, many = (np.broadcast_to(np.uint16(1), count) for count in (1000, 2**28 + 1))
    assert isinstance(load_tokens(few, "cpu"), torch.Tensor)
    assert load_tokens(many, "cpu") is many and load_tokens(few, "cpu", resident=False) is few
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * 4 * 1000 - 1, 10**9))
    assert load_tokens(few, "cuda") is few, "more than a quarter of the GPU's free memory"


def test_the_staging_buffer_is_not_written_before_it_is_copied():
    tokens, seen = np.arange(100, dtype=np.uint16), []
    loader = BatchLoader(tokens, (1, 1, 1), 4, torch.device("cpu"))
    look, record = lambda: seen.append(loader.staging.flatten()[0].item()), lambda: None
    loader.copied = SimpleNamespace(synchronize=look, record=record)  # in place of a CUDA event
    for start in (10, 20):
        loader.load(torch.tensor([[[start]]]))
    assert seen == [0, 10], "written while a copy might still read it"


# ----- two processes -----


def in_two(folder):
    """What each of two processes does; it leaves what it saw in a file of its own."""
    corpus, seen, noise, refused = load(folder / "tiny"), {}, {}, []

    def trained(name, config=SMALL, path=None, **options):
        run = train(corpus, config, folder / (path or name), **options)
        weights = [parameter.sum().item() for parameter in run.load("last").parameters()]
        seen[name] = {"curves": curves(run), "weights": weights}
        noise[name] = torch.rand(()).item()  # the next random number, as dropout draws it

    with helpers.distributed():
        if helpers.rank():
            helpers.save_checkpoint = None  # only the main process may write
        for name, config in (SHARES | {"dropout": replace(SMALL, dropout=0.2)}).items():
            trained(name, config)
        trained("from one")  # which has stopped at step 11
        for rank in (0, 1):  # the process that is asked to stop
            trained(f"stopped {rank}", view=interrupt if helpers.rank() == rank else None)
        trained("resumed", path="stopped 0")
        for view in (interrupt, None):
            trained("dropout resumed", replace(SMALL, dropout=0.2), view=view)
        odd = {"batch_size": 3, "gradient_accumulation_steps": 1}
        for changes, start in (({"seed": 4}, None), ({}, folder / "none.pt"), (odd, None)):
            with pytest.raises((CheckpointError, ValueError)) as error:
                trained("micro-steps", replace(SMALL, **changes), start_from=start)
            refused.append(str(error.value))
        helpers.load_tokens = lambda split, *_: split  # as if there were no room
        trained("disk")
        file = folder / f"seen{helpers.rank()}.json"
    threads = (task.read_text() for task in Path("/proc/self/task").glob("*/comm"))
    left = [name for name in threads if "gloo" in name]
    file.write_text(json.dumps([seen, noise, refused, left]))


def one_fails(folder):
    def fail(run):
        if helpers.rank() == 1 and run.step == 3:
            raise LookupError("only here")

    with helpers.distributed():
        train(load(folder / "tiny"), SMALL, folder / "failing", view=fail)
    (folder / "ended").touch()


@pytest.fixture(scope="module")
def torchrun():
    """Starts two processes of a script, with one pipe for what both print."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("needs PyTorch's gloo")
    options = {"env": os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, "text": True}
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    started = []

    def run(*script):
        started.append(subprocess.Popen([*start, *map(str, script)], **options))
        return started[-1]

    yield run
    for process in started:
        process.terminate()  # passed on to both
        process.wait(60)


@pytest.fixture(scope="module")
def seen(corpus, torchrun):
    """Of both: runs by name, random numbers after each, refusals, threads that outlive them."""
    folder = corpus.folder.parent
    train(corpus, SMALL, folder / "from one", view=interrupt)
    process = torchrun(__file__, "in_two", folder)
    output = process.communicate(timeout=180)[0]
    assert process.returncode == 0, output[-3000:]
    both = (json.loads((folder / f"seen{rank}.json").read_text()) for rank in (0, 1))
    return list(zip(*both, strict=True))


def assert_close(found, wanted):
    for name, a, b in zip(("loss", "norm", "train", "val"), found, wanted, strict=True):
        assert a == pytest.approx(b, rel=1e-4 if name == "norm" else 1e-5), f"{name} differs"


@pytest.mark.parametrize("name", SHARES)
def test_two_processes_train_as_one(seen, corpus, tmp_path, name):
    assert_close(seen[0][0][name]["curves"], curves(train(corpus, SHARES[name], tmp_path)))
    for file in ("last.pt", "ckpt.pt"):
        two, one = saved(corpus.folder.parent / name, file), saved(tmp_path, file)
        assert two.keys() == one.keys() and two["model"].keys() == one["model"].keys()
        assert (two["iter_num"], two["identity"]) == (one["iter_num"], one["identity"])


def test_both_processes_see_the_same_and_differ_in_dropout(seen):
    (first, second), (noise, other), (refused, alike), _ = seen
    assert first == second, [name for name in first if first[name] != second[name]]
    assert first["disk"] == first["micro-steps"], "from the disk to another end"
    assert not [name for name in noise if noise[name] == other[name]], "the same dropout in both"
    seed, start, batch = refused
    assert "4 here" in seed and "none.pt cannot be read" in start and "multiple of 2" in batch
    assert refused == alike


def test_runs_resume_between_one_and_two_processes(seen, corpus, tmp_path):
    found, alone = seen[0][0], curves(train(corpus, SMALL, tmp_path))
    assert len(found["stopped 0"]["curves"][0]) == len(found["stopped 1"]["curves"][0]) == 11
    assert found["resumed"] == found["micro-steps"], "two resumed to another end"
    assert found["dropout resumed"] == found["dropout"], "two resumed with another dropout"
    assert_close(found["from one"]["curves"], alone)
    assert_close(curves(train(corpus, SMALL, corpus.folder.parent / "stopped 1")), alone)


def test_no_thread_outlives_the_group(seen):
    assert not any(seen[3]), f"{seen[3]} abort the exit"


def test_an_error_in_one_process_ends_both(corpus, torchrun):
    process = torchrun(__file__, "one_fails", corpus.folder.parent)
    output = process.communicate(timeout=180)[0]  # it comes: nobody waited for ever
    assert process.returncode and "LookupError: only here" in output, output[-2000:]
    assert not (corpus.folder.parent / "ended").exists()


@pytest.mark.skipif(os.name != "posix", reason="needs the signals of POSIX")
def test_a_termination_of_torchrun_saves_the_run(corpus, torchrun, tmp_path):
    flags = ["--preset=smoke", "--max_iters=100000", "--eval_interval=20", "--out"]
    process = torchrun(ROOT / "helpers.py", corpus.folder, *flags, tmp_path)
    assert any("step 20 of" in line for line in process.stdout)
    process.terminate()
    output = process.communicate(timeout=60)[0]
    assert process.returncode, output[-2000:]
    assert saved(tmp_path)["iter_num"] == len(saved(tmp_path)["history"]["step_loss"]) >= 20


# ----- the command -----


@pytest.fixture
def run_command(corpus, tmp_path, monkeypatch):
    """Runs the command for a project in `tmp_path`, from another folder, which stays empty."""
    (tmp_path / "data").symlink_to(corpus.folder.parent)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(helpers, "ROOT", tmp_path / "data")
    monkeypatch.setattr(helpers, "CODE", [tmp_path / "helpers.py"])
    monkeypatch.chdir(tmp_path / "elsewhere")
    yield lambda line: helpers.main(["--preset", "smoke", *line.split()])
    assert not list(Path.cwd().iterdir()), "written where it was started"


def test_the_command_trains_what_the_notebook_then_loads(run_command, corpus, capsys, monkeypatch):
    line = "tiny --dropout 0.2 --max_iters 10 --no-decay_lr"
    assert run_command(line) == 0
    shown = capsys.readouterr().out
    config = replace(SMOKE, dropout=0.2, max_iters=10, decay_lr=False)
    monkeypatch.setattr(helpers.Trainer, "step", lambda trainer: pytest.fail("trained again"))
    run = train(corpus, config, helpers.out_folder(corpus.name))
    assert f"step 10 of 10: loss {run.last['train_loss']:.4f}" in shown and "loaded" in run.status
    assert run_command(line) == 0, "the command itself trains a finished run again"


def test_every_field_of_the_configuration_is_a_flag(run_command, capsys):
    with pytest.raises(SystemExit):
        run_command("--help")
    flags = re.findall(r"--\w+", capsys.readouterr().out)
    assert not {f"--{field.name}" for field in fields(TrainConfig)} - set(flags)


def test_the_command_starts_from_earlier_weights_and_afresh(run_command, corpus, tmp_path, capsys):
    start, out = tmp_path / "out-tiny-test" / "ckpt.pt", tmp_path / "tuned"
    assert run_command("tiny --max_iters 5") == 0
    tuned = f"tiny --out {out} --max_iters 4 --learning_rate 0.002"
    assert run_command(f"{tuned} --start_from {start}") == 0
    model, row = helpers.load_model(start), saved(out)["history"]["evals"][0]
    assert row["val_loss"] == estimate_loss(model, corpus.splits["val"], SMOKE, CPU)
    assert row["learning_rate"] == 0.002 / (SMOKE.warmup_iters + 1), "not a schedule of its own"
    assert run_command(tuned) == 1 and "start_from" in capsys.readouterr().err
    assert run_command(f"{tuned} --fresh") == 0 and saved(out)["identity"]["start_from"] is None


def test_the_command_that_may_be_restarted_is_not_fresh(run_command, capsys, monkeypatch):
    """Nor does it load the old run, where the first attempt ended before it saved anything."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert run_command("tiny --max_iters 2 --fresh") == 1
    assert "--max-restarts" in capsys.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    assert run_command("tiny --max_iters 2 --fresh") == 0


@pytest.mark.parametrize("rank, lines", [(0, 1), (1, 0)])
def test_the_command_names_the_stand_in(run_command, corpus, capsys, monkeypatch, rank, lines):
    monkeypatch.setattr(helpers, "prepare", lambda name, allow_stand_in: corpus)
    monkeypatch.setattr(helpers, "rank", lambda: rank)
    monkeypatch.setattr(helpers, "on_main_process", lambda make: make())
    monkeypatch.setattr(helpers, "train_model", lambda *_, **__: SimpleNamespace(interrupted=None))
    assert run_command("shakespeare_char --max_iters 2") == 0
    assert capsys.readouterr().out.count("Tiny sentences") == lines


def test_hosts_with_different_data_are_refused(run_command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(helpers, "on_main_process", lambda make: "what another host's set is")
    assert run_command("tiny") == 1 and "sets tiny" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "elsewhere"]


def test_a_slash_behind_the_folder_is_nothing(run_command, corpus, tmp_path, monkeypatch):
    trained = Mock(return_value=SimpleNamespace(interrupted=None))
    monkeypatch.setattr(helpers, "train_model", trained)
    monkeypatch.setattr(helpers, "ROOT", tmp_path / "own")
    shutil.copytree(corpus.folder, tmp_path / "own/kept")
    for name in ("kept", "kept/"):
        assert run_command(name) == 0 and trained.call_args.args[3].name == "out-kept-test"


def test_a_path_to_a_set_means_the_same_as_its_name(run_command, corpus, monkeypatch):
    trained = Mock(return_value=SimpleNamespace(interrupted=None))
    monkeypatch.setattr(helpers, "train_model", trained)
    monkeypatch.setattr(helpers, "load", lambda folder: replace(corpus, name=folder.name))
    for path in (helpers.ROOT / "shakespeare_char", "stand_in_char", "tiny"):
        assert run_command(f"{path} --preset quick") == 0
    quick = helpers.PRESETS["quick"]
    configs = [call.args[2] for call in trained.call_args_list]
    assert configs == [quick.shakespeare, quick.shakespeare, quick.wikitext2]


REFUSED = {
    "tiny --n_embd 3": "n_embd 3",
    "nothing": "nothing",
    "tiny --start_from nowhere.pt": "nowhere.pt",
    "tiny --start_from {start} --n_layer 3 --no-bias": "n_layer 2 there, 3 here; bias",
    "tiny --seed 2 --out {start.parent}": "seed 1337 there, 2 here",
}


@pytest.mark.parametrize("line, named", REFUSED.items())
def test_the_command_refuses_in_one_sentence(run_command, tmp_path, capsys, line, named):
    start = tmp_path / "earlier" / "last.pt"
    assert run_command(f"tiny --max_iters 2 --out {start.parent}") == 0
    assert run_command(line.format(start=start)) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and named in error and error.endswith("."), error
    assert ("--fresh" in error) == ("belongs to another run" in error), "advice that does not help"


def test_the_command_of_another_starter_names_torchrun(run_command, capsys, monkeypatch):
    for key, value in {"WORLD_SIZE": "2", "RANK": "1"}.items():  # each says what is wrong
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert run_command("tiny") == 1 and "torchrun" in capsys.readouterr().err


def test_more_processes_than_gpus_are_refused_by_all(run_command, capsys, monkeypatch):
    for key in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(key, "2")
    monkeypatch.setenv("LOCAL_RANK", "0")  # which alone would have its GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert run_command("tiny") == 1 and "more processes than GPUs" in capsys.readouterr().err


def test_want_of_memory_in_one_process_is_said(run_command, capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    failing = Mock(side_effect=helpers.TrainingError("No memory"))
    monkeypatch.setattr(helpers, "train_model", failing)
    assert run_command("tiny") == 1 and "No memory" in capsys.readouterr().err


def test_a_run_folder_belongs_to_one_data_set(tmp_path):
    names = [*NAMES, "stand_in_gpt2", "stand_in_char", "notes"]
    folders = {helpers.out_folder(name, run) for name in names for run in ("test", "improved-1")}
    assert len(folders) == 2 * len(names)
    with pytest.raises(ValueError, match="cannot be called 'shakespeare'"):
        prepare_text("plays.txt", "shakespeare", "char", tmp_path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](Path(sys.argv[2]))
