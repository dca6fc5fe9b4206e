"""Beyond one card and one run: tokens that stay on the disk, two processes, the command line, earlier weights.

python -m pytest tests/test_distributed.py

Two processes train with gloo on the CPU: torchrun starts this very file, which then takes the steps of `in_two`.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_faults import SETTINGS, contents, one_sentence, write_data
from test_training import CPU, Watcher, differences, run, saved, stop_at, without_times

import helpers
from data.dataset import load
from helpers import CheckpointError, ResidentBatches, StreamedBatches, Trainer, make_model, score_split, train_model

ROOT = Path(__file__).resolve().parent.parent
SHARED = replace(SETTINGS, batch_size=4, dropout=0.0, max_iters=24, eval_interval=8, eval_iters=3, gradient_accumulation_steps=2)
TUNED = replace(SETTINGS, max_iters=30)
SHARES = {  # how a batch may be shared out to two processes: by passes, by sequences, by sequences of several passes
    "passes": SHARED,
    "sequences": replace(SHARED, gradient_accumulation_steps=1),
    "sequences of passes": replace(SHARED, gradient_accumulation_steps=3),
    "another model": replace(SHARED, rotary=True, pointer=True, muon_factor=5.0),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rng = random.Random(7)
    text = "".join(f"the {rng.choice(['old', 'red'])} {rng.choice(['dog', 'cat', 'bird'])} sees.\n" for _ in range(150))
    return load(write_data(tmp_path_factory.mktemp("data") / "sentences", text))


# --------------------------------------------------------------------------------------- tokens that stay on the disk


def test_tokens_from_the_disk_train_to_the_same_end(data, tmp_path, capsys):
    ends = []
    for resident in (True, False):
        settings = replace(TUNED, gradient_accumulation_steps=2)
        folder = tmp_path / str(resident)
        history = run(make_model(settings, data), data, settings, folder, resident=resident)
        ends.append((without_times(history), saved(folder)["model"]))
        assert ("stay on the disk" in capsys.readouterr().out) is not resident
    assert not differences(*ends), differences(*ends)[:3]


@pytest.mark.parametrize("together", [1, 3, 32])
def test_batches_from_the_disk_are_those_on_the_device(together):
    tokens = np.random.default_rng(0).integers(0, 2**16, 500).astype(np.uint16)
    shape, block = (10, 2, 3), 7
    starts = torch.randint(500 - block, shape, generator=torch.Generator().manual_seed(0))
    resident = ResidentBatches(helpers.tokens_on("cpu", tokens), shape, block, together, CPU.device)
    streamed = StreamedBatches(tokens, shape, block, together, CPU.device)
    for count in (10, 4):  # a whole interval, and the last, which may be shorter
        resident.begin(starts[:count])
        streamed.begin(starts[:count])
        for row in range(count):
            if row and row % together == 0:
                streamed.prefetch(row)
            for index in range(2):
                wanted = resident.get(torch.tensor([row]), index)
                got = streamed.get(torch.tensor([row]), index)
                assert all(torch.equal(a, b) and b.dtype == torch.int64 for a, b in zip(wanted, got)), (row, index)


def test_a_chunk_of_steps_is_fetched_ahead_of_its_steps(data, monkeypatch):
    """As on a card, where the host looks up every so many steps: each step still sees its own batch."""
    settings, losses = replace(SETTINGS, eval_interval=11), []
    for resident, together in ((True, 1), (False, 1), (False, 4)):
        trainer = Trainer(make_model(settings, data), data, settings, CPU, resident)
        if not resident:
            trainer.together = together
            trainer.batches = StreamedBatches(trainer.tokens["train"], (11, 1, 2), settings.block_size, together, CPU.device)
        losses.append([trainer.advance(first, first + 11, helpers.StopRequests(), lambda step: None)[0] for first in (0, 11)])
    assert losses[0] == losses[1] == losses[2]


def test_room_decides_where_tokens_lie(monkeypatch):
    few, many = (np.broadcast_to(np.uint16(1), count) for count in (1000, 2**28 + 1))
    assert isinstance(helpers.tokens_on("cpu", few), torch.Tensor)
    assert helpers.tokens_on("cpu", many) is many
    assert helpers.tokens_on("cpu", few, resident=False) is few
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * 4 * 1000 - 1, 10**9))
    assert helpers.tokens_on("cuda", few) is few, "more than a quarter of the card's free memory"


def test_scores_from_the_disk_are_the_same(data, lively, monkeypatch):
    model = lively(data.vocab_size, block_size=8)
    scores = [[score_split(model, data, split, stride) for split in data.splits for stride in (None, 3)]]
    estimates = [helpers.estimate_loss(model, helpers.tokens_on("cpu", data.splits["val"]), SETTINGS, CPU)]
    monkeypatch.setattr(helpers, "tokens_on", lambda device, split, resident=None: split)
    scores.append([score_split(model, data, split, stride) for split in data.splits for stride in (None, 3)])
    estimates.append(helpers.estimate_loss(model, data.splits["val"], SETTINGS, CPU))
    assert scores[0] == scores[1] and estimates[0] == estimates[1]


# ------------------------------------------------------------------------------------------------- two processes


def in_two(folder):
    """What each of the two processes does; it leaves what it saw in a file of its own."""
    torch.set_num_threads(1)
    assert helpers.join_processes() is None and (helpers.rank(), helpers.world_size()) == (int(os.environ["RANK"]), 2)
    data, seen = load(folder / "sentences"), {}
    if helpers.rank():
        helpers.save_checkpoint = None  # only the first process may write

    def trained(settings, name, **options):
        model = make_model(replace(settings, seed=5), data)
        history = run(model, data, settings, folder / name, **options)
        return {**without_times(history), "weights": [parameter.sum().item() for parameter in model.parameters()]}

    for name, settings in SHARES.items():
        seen[name] = trained(settings, name)
    seen["disk"] = trained(SHARED, "disk", resident=False)
    dropping = replace(SHARED, dropout=0.2)
    seen["dropout"] = trained(dropping, "dropout")
    seen["seed"] = torch.initial_seed()
    for which in (0, 1):  # the process that is asked to stop
        view = stop_at(11, signal.SIGINT) if helpers.rank() == which else None
        seen[f"stopped {which}"] = trained(SHARED, f"stopped {which}", view=view, save_seconds=1000)
        seen[f"gone on {which}"] = trained(SHARED, f"stopped {which}")
    seen["refused"] = {}
    for name, settings in (("passes", replace(SHARED, seed=4)), ("odd", replace(SHARED, batch_size=3, gradient_accumulation_steps=1))):
        try:
            trained(settings, name)
        except (CheckpointError, ValueError) as error:
            seen["refused"][name] = str(error)
    (folder / f"seen{helpers.rank()}.json").write_text(json.dumps(seen))

    def fail(step):
        if helpers.rank() == 1 and step == 3:
            raise MemoryError("only here")

    trained(SHARED, "failing", view=Watcher(fail))  # the other process knows nothing of it
    (folder / "ended").touch()


def torchrun(*command):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *map(str, command)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process, seconds=120):
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"the processes did not end: {process.communicate()[0][-2000:]}")


@pytest.fixture(scope="module")
def seen(data, tmp_path_factory):
    """What the first and the second process saw, the folder of their runs, and what torchrun said at the end."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("needs PyTorch's gloo")
    folder = tmp_path_factory.mktemp("two")
    (folder / "sentences").symlink_to(data.folder)
    process = torchrun(__file__, "in_two", folder)
    output = finish(process)
    assert (folder / "seen0.json").exists() and (folder / "seen1.json").exists(), output[-3000:]
    ending = process.returncode, output
    return *(json.loads((folder / f"seen{rank}.json").read_text()) for rank in (0, 1)), folder, ending


def close(history, other):
    for key in ("train_loss", "val_loss", "step_loss"):
        assert history[key] == pytest.approx(other[key], rel=1e-5), f"{key} of two processes is not that of one"
    assert history["step_grad_norm"] == pytest.approx(other["step_grad_norm"], rel=1e-4)
    assert [history[key] for key in ("iter", "tokens", "learning_rate")] == [other[key] for key in ("iter", "tokens", "learning_rate")]


@pytest.mark.parametrize("name", SHARES)
def test_two_processes_train_as_one(seen, data, tmp_path, name):
    alone = run(make_model(SHARES[name], data), data, SHARES[name], tmp_path)
    first, second, folder, _ = seen
    close(first[name], alone)
    assert {**first[name]} == {**second[name]}, "the two processes do not have the same history and weights"
    for file in ("last.pt", "ckpt.pt"):
        ours, theirs = saved(folder / name, file), saved(tmp_path, file)
        assert ours.keys() == theirs.keys() and ours["iter_num"] == theirs["iter_num"]
        assert ours["model"].keys() == theirs["model"].keys(), "the names of the weights are not the model's own"
        for key, value in ours["model"].items():
            if not key.endswith("c_attn.bias"):  # a key's bias has no gradient but rounding, which Adam makes large
                assert torch.allclose(value, theirs["model"][key], atol=1e-5), key


def test_one_process_goes_on_from_a_run_of_two(seen, data, monkeypatch):
    monkeypatch.setattr(Trainer, "step", lambda self: pytest.fail("a finished run was trained on"))
    history = run(make_model(SHARED, data), data, SHARED, seen[2] / "passes")
    assert history["step_loss"] == seen[0]["passes"]["step_loss"]


def test_two_processes_read_from_the_disk_alike(seen):
    assert seen[0]["disk"] == seen[0]["passes"]


def test_dropout_differs_from_process_to_process(seen):
    assert seen[0]["seed"] != seen[1]["seed"]
    assert seen[0]["dropout"]["weights"] == seen[1]["dropout"]["weights"] != seen[0]["passes"]["weights"]


@pytest.mark.parametrize("which", [0, 1])
def test_a_stop_asked_of_one_process_stops_both_at_the_same_step(seen, which):
    first, second, *_ = seen
    steps = [len(process[f"stopped {which}"]["step_loss"]) for process in (first, second)]
    assert steps == [11, 11], f"stopped after {steps} steps"
    assert first[f"gone on {which}"] == second[f"gone on {which}"] == first["passes"], "going on came to another end"


def test_two_processes_are_refused_alike(seen):
    first, second, *_ = seen
    assert first["refused"] == second["refused"]
    assert "seed 1337 there, 4 here" in first["refused"]["passes"]
    assert "multiple of 2" in first["refused"]["odd"]


def test_an_error_in_one_process_ends_both(seen):
    _, _, folder, (status, output) = seen  # that there is a status says that nobody waited for ever
    assert status != 0 and "MemoryError: only here" in output, output[-2000:]
    assert not (folder / "ended").exists()


# ---------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def command(data, tmp_path, monkeypatch):
    """Runs the command in an empty folder, where `sentences` is a prepared set."""
    monkeypatch.setattr(helpers, "ROOT", data.folder.parent)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: helpers.main([*arguments, "--preset", "smoke"])


def test_the_command_trains_what_the_notebook_then_loads(command, data, capsys, monkeypatch):
    changes = ("--set", "dropout=0.2", "--set", "max_iters=10", "--set", "decay_lr=False")
    assert command("sentences", *changes) == 0
    assert "validation estimate fell" in capsys.readouterr().out
    settings = replace(helpers.choose_preset("smoke").wikitext2, dropout=0.2, max_iters=10, decay_lr=False)
    monkeypatch.setattr(Trainer, "step", lambda self: pytest.fail("a finished run was trained on"))
    train_model(make_model(settings, data), data, settings, "out-sentences-test")
    assert command("sentences", *changes) == 0, "the command itself trains a finished run again"


def test_the_command_starts_from_earlier_weights_and_afresh(command, capsys):
    assert command("sentences", "--set", "max_iters=5") == 0
    start = ("--out", "tuned", "--start-from", "out-sentences-test/last.pt", "--set", "max_iters=4")
    assert command("sentences", *start) == 0
    assert saved(Path("tuned"))["start_from"] and saved(Path("tuned"))["iter_num"] == 4
    assert command("sentences", "--out", "tuned") == 1 and "another run" in capsys.readouterr().err
    assert command("sentences", "--out", "tuned", "--fresh", "--set", "max_iters=3") == 0
    assert saved(Path("tuned"))["iter_num"] == 3 and saved(Path("tuned"))["start_from"] is None


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["sentences", "--set", "depth=3"], "no setting 'depth'"),
        (["sentences", "--set", "dropout=much"], "dropout is 'much'"),
        (["sentences", "--set", "max_iters"], "max_iters is ''"),
        (["sentences", "--set", "n_embd=3"], "n_embd 3"),
        (["nothing"], "data/own.py"),
        (["sentences", "--start-from", "nowhere.pt"], "nowhere.pt"),
    ],
)
def test_the_command_refuses_in_one_sentence(command, capsys, arguments, named):
    assert command(*arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and named in error and error.endswith("."), error


def test_the_command_keeps_runs_where_the_notebook_does():
    cells = "".join(cell.source for cell in nbformat.read(ROOT / "test.ipynb", as_version=4).cells if cell.cell_type == "code")
    folders = set(re.findall(r'"(out-[^"]+-test)"', cells))
    assert folders <= {helpers.out_folder(name) for name in helpers.NAMES}, folders
    assert helpers.out_folder("notes") == "out-notes-test"
    for name, same in (("wikitext2_raw", "wikitext2"), ("stand_in_gpt2", "wikitext2"), ("stand_in_char", "shakespeare_char")):
        assert helpers.out_folder(name) == helpers.out_folder(same)  # where the notebook trains on these


def test_torchrun_passes_a_termination_on_and_the_run_is_saved(data, tmp_path):
    settings = ("--preset", "smoke", "--set", "max_iters=100000", "--set", "eval_interval=20", "--out", tmp_path / "out")
    process = torchrun(__file__, "command", data.folder.parent, "sentences", *settings)
    try:
        for line in process.stdout:
            if re.search(r"[1-9]\d*/100000", line):
                break
        process.send_signal(signal.SIGTERM)
    finally:
        output = finish(process, 60)
    assert saved(tmp_path / "out")["iter_num"] == len(saved(tmp_path / "out")["history"]["step_loss"]) > 0, output[-2000:]


# -------------------------------------------------------------------------------------------------- earlier weights


@pytest.fixture(scope="module")
def start(data, tmp_path_factory):
    """A checkpoint of a short run of other settings, but of the same shape."""
    folder = tmp_path_factory.mktemp("start")
    settings = replace(SETTINGS, max_iters=12, learning_rate=2e-2, dropout=0.0)
    run(make_model(settings, data), data, settings, folder)
    return folder / "last.pt"


def tune(data, folder, start, **options):
    settings = options.pop("settings", TUNED)
    return run(make_model(replace(settings, seed=5), data), data, settings, folder, start_from=start, **options)


def test_a_run_starts_from_earlier_weights_and_its_own_schedule(data, start, tmp_path):
    history = tune(data, tmp_path, start)
    weights = helpers.load_model(start)
    tokens = helpers.tokens_on("cpu", data.splits["val"])
    assert history["val_loss"][0] == helpers.estimate_loss(weights, tokens, SETTINGS, CPU)
    assert history["learning_rate"][0] == helpers.get_lr(0, TUNED) and history["iter"][0] == 0
    assert len(history["step_loss"]) == TUNED.max_iters
    loaded = helpers.Run(data, TUNED, history, tmp_path, None).load("last", "cpu")
    assert not differences(loaded.state_dict(), saved(tmp_path)["model"])


def test_a_run_from_earlier_weights_goes_on_to_the_same_end(data, start, tmp_path):
    tune(data, tmp_path / "whole", start)
    tune(data, tmp_path / "stopped", start, view=stop_at(17, signal.SIGINT))
    assert saved(tmp_path / "stopped")["iter_num"] == 17
    tune(data, tmp_path / "stopped", start)
    for name in ("last.pt", "ckpt.pt"):
        gaps = differences(saved(tmp_path / "stopped", name), saved(tmp_path / "whole", name))
        assert not gaps, gaps[:3]


def test_the_start_belongs_to_the_run(data, start, tmp_path):
    other = tmp_path / "other.pt"
    checkpoint = saved(start.parent)
    checkpoint["model"]["transformer.ln_f.weight"] += 1e-3
    torch.save(checkpoint, other)
    tune(data, tmp_path / "tuned", start)
    tune(data, tmp_path / "scratch", None)
    for folder, wrong in (("tuned", None), ("tuned", other), ("scratch", start)):
        before = contents(tmp_path / folder)
        with pytest.raises(CheckpointError) as error:
            tune(data, tmp_path / folder, wrong)
        one_sentence(error, "start_from", "another run")
        assert contents(tmp_path / folder) == before
    tune(data, tmp_path / "tuned", start.rename(tmp_path / "moved.pt"))
    (tmp_path / "moved.pt").rename(start)


def test_a_checkpoint_from_before_there_were_starts_still_goes_on(data, tmp_path):
    tune(data, tmp_path, None, view=stop_at(17, signal.SIGINT))
    for name in ("last.pt", "ckpt.pt"):
        checkpoint = saved(tmp_path, name)
        del checkpoint["start_from"]
        torch.save(checkpoint, tmp_path / name)
    assert len(tune(data, tmp_path, None)["step_loss"]) == TUNED.max_iters


@pytest.mark.parametrize("changes, named", [({"n_layer": 2}, ["n_layer 1 there, 2 here"]), ({"n_embd": 16, "block_size": 4},
                         ["n_embd 8 there, 16 here", "block_size 8 there, 4 here"]), ({"bias": False}, ["bias True there, False here"])])  # fmt: skip
def test_a_start_of_another_shape_is_refused_by_field(data, start, tmp_path, changes, named):
    with pytest.raises(CheckpointError) as error:
        tune(data, tmp_path / "out", start, settings=replace(TUNED, **changes))
    one_sentence(error, start, *named)
    assert not (tmp_path / "out").exists()


def test_a_start_of_another_vocabulary_is_refused(data, start, tmp_path):
    more = load(write_data(tmp_path / "more", "the quick brown fox jumps over it. " * 100))
    with pytest.raises(CheckpointError) as error:
        tune(more, tmp_path / "out", start)
    one_sentence(error, f"vocab_size {data.vocab_size} there, {more.vocab_size} here")


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_checkpoint_of_nanogpt_is_a_start(data, tmp_path, prefix):
    """Such a file holds weights and their shape, and names with a prefix where the model was compiled."""
    model = make_model(replace(SETTINGS, seed=9), data)
    shape = {key: value for key, value in asdict(model.config).items() if key in
             ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")}  # fmt: skip
    weights = {prefix + name: value for name, value in model.state_dict().items()}
    torch.save({"model": weights, "optimizer": {}, "model_args": shape, "iter_num": 2000, "best_val_loss": torch.tensor(3.0),
                "config": {"dataset": "x"}}, tmp_path / "nanogpt.pt")  # fmt: skip
    history = tune(data, tmp_path / "out", tmp_path / "nanogpt.pt", settings=replace(TUNED, max_iters=3))
    tokens = helpers.tokens_on("cpu", data.splits["val"])
    assert history["val_loss"][0] == helpers.estimate_loss(model, tokens, SETTINGS, CPU)


if __name__ == "__main__":
    what, path, *arguments = sys.argv[1:]
    if what == "command":
        helpers.ROOT = Path(path)
        sys.exit(helpers.main(arguments))
    in_two(Path(path))
