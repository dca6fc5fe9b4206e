"""Training: schedule, batches, precision, the optimizer step, histories, checkpoints, interrupts and resumes.

python -m pytest tests/test_training.py
"""

import ast
import contextlib
import copy
import errno
import math
import os
import pickle
import random
import re
import signal
import weakref
import zipfile
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import helpers
from helpers import CheckpointError, Precision, Settings, SilentView, Trainer, TrainingError, make_model, train_model

TIMES = ("time", "seconds", "peak_memory")  # what a clock or the system says, and no seed decides
CPU = Precision(torch.device("cpu"), torch.float32, "for tests")


class Watcher(SilentView):
    """Calls `at_step(step)` after each step and `at_evaluation(history)` after each evaluation."""

    def __init__(self, at_step=lambda step: None, at_evaluation=lambda history: None):
        self.progress, self.evaluated = at_step, at_evaluation


def run(model, corpus, settings, folder, **options):
    return train_model(model, corpus, settings, folder, **{"precision": CPU, "save_seconds": 0, **options})


def without_times(history):
    return {key: values for key, values in history.items() if key not in TIMES}


def differences(a, b, path=""):
    """Where two nested values differ, bit for bit, as text; times are left out."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if torch.equal(a, b) else [f"{path}: {(a.double() - b.double()).abs().max():g} apart"]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [line for key in a if key not in TIMES for line in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [line for i in range(len(a)) for line in differences(a[i], b[i], f"{path}[{i}]")]
    same = type(a) is type(b) and (a == b or repr(a) == repr(b) == "nan")
    return [] if same else [f"{path}: {a!r} and {b!r}"]


def saved(folder, name="last.pt"):
    return torch.load(folder / name, weights_only=True)


@pytest.fixture
def unbroken(model, corpus, settings, tmp_path):
    """The folder of a finished run that nothing disturbed."""
    run(model, corpus, settings, tmp_path / "unbroken")
    return tmp_path / "unbroken"


# ------------------------------------------------------------------------------------------ settings and presets


@pytest.mark.parametrize(
    "field, value",
    [
        *(
            (field, value)
            for field in ("batch_size", "block_size", "max_iters", "eval_interval")
            for value in (0, -1, 1.5)
        ),
        *((field, 0) for field in ("gradient_accumulation_steps", "eval_iters", "n_layer", "n_head", "n_embd")),
        *((field, value) for field in ("learning_rate", "min_lr") for value in (0.0, -1e-3, math.inf, math.nan)),
        *((field, value) for field in ("weight_decay", "grad_clip") for value in (-0.1, math.inf, math.nan)),
        *((field, -1) for field in ("warmup_iters", "seed")),
        *((field, value) for field in ("beta1", "beta2", "dropout") for value in (-0.1, 1.0, math.nan)),
        ("min_lr", 1.0),
        ("n_embd", 383),
    ],
)
def test_senseless_settings_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"{field}.*{value}"):
        Settings(**{field: value})


def test_preset_is_chosen_by_name_then_environment_then_device(monkeypatch):
    monkeypatch.delenv("NANOGPT_PRESET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert helpers.choose_preset().name == "quick"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert helpers.choose_preset().name == "full"
    monkeypatch.setenv("NANOGPT_PRESET", "smoke")
    assert helpers.choose_preset().name == "smoke"
    assert helpers.choose_preset("quick").name == "quick"


def test_unknown_preset_lists_the_right_ones(monkeypatch):
    monkeypatch.setenv("NANOGPT_PRESET", "huge")
    with pytest.raises(ValueError, match="'huge'.*full, record, quick, smoke"):
        helpers.choose_preset()


# ---------------------------------------------------------------------------------------------------- precision


def test_precision_on_a_cpu_is_float32():
    precision = helpers.choose_precision("cpu")
    assert precision.dtype == torch.float32 and precision.reason
    with precision.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.parametrize(
    "capability, dtype",
    [((7, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)],
)
def test_precision_follows_the_cards_capability(monkeypatch, capability, dtype):
    def never(*args, **kwargs):
        raise AssertionError("is_bf16_supported says yes where bf16 is only emulated")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", never)
    precision = helpers.choose_precision()
    assert (precision.device.type, precision.dtype) == ("cuda", dtype)
    assert "{}.{}".format(*capability) in precision.reason


# --------------------------------------------------------------------------------------------- schedule, batches


def test_learning_rate_at_the_ends():
    settings = Settings(learning_rate=1e-3, min_lr=1e-4, warmup_iters=10, max_iters=100)
    rates = [helpers.get_lr(step, settings) for step in range(121)]
    assert 0 < rates[0] < rates[1], rates[:2]
    assert rates[10] == max(rates) == 1e-3, (rates[10], max(rates))
    assert rates[55] == pytest.approx(5.5e-4), "half way down the cosine is the mean of peak and floor"
    assert rates[99] > 1e-4 and set(rates[100:]) == {1e-4}, rates[99:]
    assert helpers.get_lr(70, replace(settings, decay_lr=False)) == 1e-3


@given(st.integers(0, 60), st.integers(1, 60), st.floats(1e-6, 1.0), st.floats(0.01, 1.0), st.booleans())
def test_learning_rate_rises_then_falls_within_its_bounds(warmup, length, peak, ratio, decay):
    settings = Settings(learning_rate=peak, min_lr=peak * ratio, warmup_iters=warmup, max_iters=length, decay_lr=decay)
    rates = [helpers.get_lr(step, settings) for step in range(length + 1)]
    up, down = rates[: warmup + 1], rates[warmup:]
    assert all(0 < rate <= peak * (1 + 1e-12) for rate in rates), rates
    assert up == sorted(up) or warmup >= length, up
    assert down == sorted(down, reverse=True), down
    assert not down or down[-1] == pytest.approx(peak * ratio if decay else peak), down[-1]


def test_windows_depend_on_seed_and_step_alone(settings):
    drawn = helpers.draw_starts(1000, settings, 5, 3)
    torch.manual_seed(99)
    torch.rand(7)
    assert torch.equal(drawn, helpers.draw_starts(1000, settings, 5, 3))
    assert not torch.equal(drawn, helpers.draw_starts(1000, settings, 6, 3))
    assert not torch.equal(drawn, helpers.draw_starts(1000, replace(settings, seed=1), 5, 3))
    assert drawn.shape == (3, settings.batch_size)


@given(st.integers(1, 20), st.integers(1, 20))
def test_windows_reach_both_ends_and_no_further(block, spare):
    settings = Settings(block_size=block, batch_size=50, warmup_iters=0)
    starts = helpers.draw_starts(block + spare, settings, 0, 40).flatten()
    assert (starts.min(), starts.max()) == (0, spare - 1), f"{starts.min()} to {starts.max()}, not 0 to {spare - 1}"
    x, y = helpers.get_batch(torch.arange(block + spare), starts, block)
    assert (x.min(), y.max()) == (0, block + spare - 1), f"tokens {x.min()} to {y.max()} of {block + spare}"


def test_drawing_leaves_the_global_stream_alone(settings):
    before = torch.get_rng_state()
    helpers.draw_starts(1000, settings, 0, 2)
    assert torch.equal(torch.get_rng_state(), before)


@given(st.integers(1, 12), st.lists(st.integers(0, 87), min_size=1, max_size=6))
def test_targets_are_the_inputs_shifted_by_one(block, starts):
    tokens = torch.arange(100, dtype=torch.int32) * 3
    x, y = helpers.get_batch(tokens, torch.tensor(starts), block)
    for row, start in enumerate(starts):
        assert x[row].tolist() == tokens[start : start + block].tolist()
        assert y[row].tolist() == tokens[start + 1 : start + block + 1].tolist()
    assert x.dtype == y.dtype == torch.int64


def test_a_split_shorter_than_a_window_names_both_lengths(corpus, settings, model, tmp_path):
    with pytest.raises(ValueError, match="16 tokens.*block 16"):
        helpers.draw_starts(16, settings, 0, 1)
    assert helpers.draw_starts(17, settings, 0, 1).max() == 0
    short = replace(corpus, splits={**corpus.splits, "val": corpus.splits["val"][:16]})
    with pytest.raises(ValueError, match="16 tokens.*block 16"):
        run(model, short, settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ optimizer step


def advance(trainer, steps):
    return trainer.advance(0, steps, helpers.StopRequests(), lambda step: None)


def test_accumulated_passes_equal_one_large_batch(settings, corpus):
    ends = []
    for batch_size, passes in ((8, 1), (2, 4)):
        shaped = replace(
            settings, batch_size=batch_size, gradient_accumulation_steps=passes, dropout=0.0, grad_clip=0.0
        )
        trainer = Trainer(make_model(shaped, corpus), corpus, shaped, CPU)
        # plain descent shows the gradient itself, which Adam would normalise
        trainer.optimizers["optimizer"] = torch.optim.SGD(trainer.model.parameters(), lr=0.5)
        windows = helpers.draw_starts(1000, shaped, 0, passes).flatten()
        ends.append((windows, *advance(trainer, 4), trainer.model.state_dict()))
    (windows, losses, norms, weights), (other_windows, *others, other_weights) = ends
    assert torch.equal(windows, other_windows), "the two runs do not see the same windows"
    assert others[0] == pytest.approx(losses, rel=1e-5), "the logged loss is not the mean over the passes"
    assert others[1] == pytest.approx(norms, rel=1e-4)
    for name, weight in weights.items():
        gap = (weight - other_weights[name]).abs().max().item()
        assert gap < 1e-5, f"{name} is {gap:g} apart"


def test_logged_loss_is_that_of_the_batch(settings, corpus):
    settings = replace(settings, dropout=0.0)
    trainer = Trainer(make_model(settings, corpus), corpus, settings, CPU)
    starts = helpers.draw_starts(len(trainer.tokens["train"]), settings, 0, 2)
    expected = [trainer.model(*helpers.get_batch(trainer.tokens["train"], part, 16))[1].item() for part in starts]
    losses, _ = advance(trainer, 1)
    assert losses == pytest.approx([sum(expected) / 2], rel=1e-5)


@pytest.mark.parametrize("largest", [0.5, 5.0, 100.0, 0.0])
def test_clipping_bounds_the_norm_and_reports_the_one_before(largest):
    weights = [
        torch.nn.Parameter(torch.zeros(3)),
        torch.nn.Parameter(torch.zeros(2, 2)),
        torch.nn.Parameter(torch.zeros(1)),
    ]
    weights[0].grad, weights[1].grad = torch.tensor([3.0, 0.0, 4.0]), torch.full((2, 2), 6.0)  # norms 5 and 12
    before = [w.grad.clone() for w in weights[:2]]
    assert helpers.clip_gradients(weights, largest).item() == pytest.approx(13.0)
    scale = 1.0 if largest in (0.0, 100.0) else largest / 13.0
    for weight, gradient in zip(weights, before, strict=False):
        assert torch.allclose(weight.grad, gradient * scale, rtol=1e-5), f"{weight.grad} is not {scale} of {gradient}"


@pytest.mark.parametrize("grad_clip", [0.0, 0.01])
def test_a_step_moves_by_the_clipped_gradient(settings, corpus, grad_clip):
    settings = replace(settings, grad_clip=grad_clip, dropout=0.0)
    trainer = Trainer(make_model(settings, corpus), corpus, settings, CPU)
    trainer.optimizers["optimizer"] = torch.optim.SGD(trainer.model.parameters(), lr=1.0)
    before = torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])
    _, (norm,) = advance(trainer, 1)
    moved = (torch.cat([p.detach().flatten() for p in trainer.model.parameters()]) - before).norm().item()
    assert norm > 0.1, f"gradient norm {norm}: too small to be clipped"
    assert moved == pytest.approx(grad_clip or norm, rel=1e-3), f"moved {moved}, norm {norm}, clip {grad_clip}"


def test_each_step_takes_the_rate_of_the_schedule(settings, corpus, monkeypatch):
    settings = replace(settings, warmup_iters=2, max_iters=5)
    trainer = Trainer(make_model(settings, corpus), corpus, settings, CPU)
    used, step = [], trainer.optimizers["optimizer"].step
    monkeypatch.setattr(
        trainer.optimizers["optimizer"], "step", lambda: (used.append(float(trainer.optimizers["optimizer"].param_groups[0]["lr"])), step())
    )
    advance(trainer, 5)
    assert used == pytest.approx([helpers.get_lr(n, settings) for n in range(5)]), used


@pytest.mark.parametrize("stopped", [3, 7])
def test_a_run_with_every_switch_goes_on_to_the_same_end(settings, corpus, tmp_path, stopped):
    settings = replace(settings, rotary=True, qk_norm=True, squared_relu=True, rms_norm=True, pointer=True, muon_factor=20.0)
    whole, broken = make_model(settings, corpus), make_model(settings, corpus)
    run(whole, corpus, settings, tmp_path / "whole")

    class Stops(helpers.SilentView):
        def progress(self, step):
            if step == stopped:
                signal.raise_signal(signal.SIGINT)

    history = run(broken, corpus, settings, tmp_path / "broken", view=Stops())
    assert len(history["step_loss"]) == stopped
    run(broken, corpus, settings, tmp_path / "broken")
    gaps = differences(saved(tmp_path / "whole"), saved(tmp_path / "broken"))
    assert not gaps and "muon" in saved(tmp_path / "whole"), gaps


def test_muon_moves_the_blocks_matrices_and_adamw_the_rest(settings, corpus):
    settings = replace(settings, muon_factor=20.0)
    trainer = Trainer(make_model(settings, corpus), corpus, settings, CPU)
    owned = [{id(p) for group in optimizer.param_groups for p in group["params"]} for optimizer in trainer.optimizers.values()]
    assert not owned[0] & owned[1] and owned[0] | owned[1] == {id(p) for p in trainer.model.parameters()}
    before = copy.deepcopy(trainer.model.state_dict())
    advance(trainer, 2)
    still = [name for name, value in trainer.model.state_dict().items() if torch.equal(value, before[name])]
    assert not still, f"{still} did not move"


def test_a_failing_compiler_leaves_training_uncompiled(model, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", lambda block: broken)
    assert helpers.compiled_blocks(model, CPU) is None
    assert capsys.readouterr().out.count("uncompiled") == 1
    idx = torch.zeros(1, 4, dtype=torch.long)
    model.eval()
    assert model.loss(idx, idx, None).item() == pytest.approx(model(idx, idx)[1].item())


def test_compiled_blocks_stand_in_for_the_model_s_own(model, monkeypatch):
    called = []

    def compile_block(block):
        return lambda x, by, past: (called.append(block), block(x, by, past))[1]

    monkeypatch.setattr(torch, "compile", compile_block)
    blocks = helpers.compiled_blocks(model.eval(), CPU)
    called.clear()
    idx = torch.arange(6).reshape(2, 3)
    assert torch.equal(model.loss(idx, idx, blocks), model.loss(idx, idx))
    assert called == list(model.transformer.h), "a block was left out or taken twice"
    assert all(p.grad is None for p in model.parameters()), "trying the compiler leaves gradients behind"


# ------------------------------------------------------------------------------------------------- a whole run


def test_seed_decides_the_history(corpus, settings, tmp_path):
    first, again, other = (
        without_times(run(make_model(s, corpus), corpus, s, tmp_path / name))
        for name, s in (("a", settings), ("b", settings), ("c", replace(settings, seed=1)))
    )
    assert not differences(first, again), differences(first, again)
    assert first["step_loss"] != other["step_loss"]


def test_history_has_a_row_an_evaluation_and_a_loss_a_step(model, corpus, settings, tmp_path):
    settings = replace(settings, max_iters=12)
    history = run(model, corpus, settings, tmp_path)
    assert history["iter"] == [0, 5, 10, 12]
    assert history["tokens"] == [step * 4 * 16 * 2 for step in history["iter"]]
    assert history["learning_rate"] == [helpers.get_lr(step, settings) for step in history["iter"]]
    assert history["seconds"] == pytest.approx(np.cumsum(history["time"])), "times do not add up"
    assert history["grad_norm"][1] == pytest.approx(np.mean(history["step_grad_norm"][:5]))
    assert {len(history[key]) for key in helpers.HISTORY_KEYS} == {4}
    assert len(history["step_loss"]) == len(history["step_grad_norm"]) == 12
    assert model.training, "the model is handed back in another mode than it trained in"


def test_evaluation_does_not_move_training(corpus, settings, tmp_path):
    often, seldom = (replace(settings, eval_interval=interval, dropout=0.2) for interval in (5, 10))
    histories = [run(make_model(s, corpus), corpus, s, tmp_path / str(s.eval_interval)) for s in (often, seldom)]
    assert histories[0]["step_loss"] == histories[1]["step_loss"]
    gaps = differences(saved(tmp_path / "5")["model"], saved(tmp_path / "10")["model"])
    assert not gaps, gaps


def test_learning_curve_falls(corpus, settings, tmp_path):
    settings = replace(settings, max_iters=120, eval_interval=40, dropout=0.0)
    losses = run(make_model(settings, corpus), corpus, settings, tmp_path)["val_loss"]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.6 * losses[0], losses


def test_model_of_another_shape_than_the_settings_is_refused(model, corpus, settings, tmp_path):
    for other in (replace(settings, n_embd=32), replace(settings, bias=False), replace(settings, block_size=8)):
        with pytest.raises(ValueError, match="shape"):
            run(model, corpus, other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------- checkpoints


def test_checkpoints_hold_the_whole_run_as_plain_values(unbroken, settings, corpus):
    for name in ("last.pt", "ckpt.pt"):
        checkpoint = saved(unbroken, name)
        wanted = {"model", "optimizer", "scaler", "rng", "model_args", "settings", "data", "iter_num", "best_val_loss"}
        assert wanted | {"history", "seconds"} <= checkpoint.keys(), wanted - checkpoint.keys()
        assert Settings(**checkpoint["settings"]) == settings
        assert checkpoint["best_val_loss"] == min(checkpoint["history"]["val_loss"])
        assert checkpoint["data"]["fingerprint"] == corpus.fingerprint
    assert sorted(path.name for path in unbroken.iterdir()) == ["ckpt.pt", "last.pt"]


def test_last_checkpoint_is_the_model_in_memory(unbroken, model):
    loaded = helpers.load_model(unbroken / "last.pt")
    assert not loaded.training and loaded.config == model.config
    assert not differences(loaded.state_dict(), model.state_dict())


@pytest.mark.parametrize("save_seconds", [0, 1000])
def test_best_checkpoint_is_the_step_with_the_lowest_validation_loss(
    model, corpus, settings, tmp_path, monkeypatch, save_seconds
):
    losses = iter([5, 5, 3, 3, 1, 1, 2, 2, 4, 4])  # training and validation at steps 0, 5, 10, 15, 20
    monkeypatch.setattr(helpers, "estimate_loss", lambda *args: float(next(losses)))
    weights = {}

    def remember(history):
        weights[history["iter"][-1]] = {name: value.clone() for name, value in model.state_dict().items()}

    run(model, corpus, settings, tmp_path, view=Watcher(at_evaluation=remember), save_seconds=save_seconds)
    best = saved(tmp_path, "ckpt.pt")
    assert (best["iter_num"], best["best_val_loss"]) == (10, 1.0)
    assert not differences(best["model"], weights[10]), "the best checkpoint holds another step's weights"
    assert best["history"]["iter"] == [0, 5, 10]
    last = saved(tmp_path)
    assert (last["iter_num"], last["best_val_loss"]) == (20, 1.0)
    assert not differences(last["model"], weights[20])


def test_checkpoint_of_another_vocabulary_names_both_sizes(unbroken, corpus):
    with pytest.raises(CheckpointError, match=f"vocabulary of {corpus.vocab_size} .* 65"):
        helpers.load_model(unbroken / "last.pt", vocab_size=65)


def test_missing_checkpoint_says_what_to_do(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint.*run the training cell"):
        helpers.load_model(tmp_path / "ckpt.pt")


# -------------------------------------------------------------------------------------------- stop and go on


def stop_at(step, number):
    """A view that sends this process a signal after a step."""
    return Watcher(lambda now: os.kill(os.getpid(), number) if now == step else None)


@contextlib.contextmanager
def own_handler(number, handle=None):
    """A handler in place of the system's: a signal that is let through is given to `handle`, or fails the test."""

    def handler(received, frame):
        if handle is None:
            raise AssertionError(f"signal {number} came through")
        handle(received)

    before = signal.signal(number, handler)
    try:
        yield handler
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [1, 7, 10, 19, 20])
def test_a_stopped_run_goes_on_to_the_same_end(unbroken, corpus, settings, tmp_path, step, number):
    folder, passed_on = tmp_path / "stopped", []
    with own_handler(number, lambda received: passed_on.append((received, saved(folder)["iter_num"]))) as handler:
        model = make_model(settings, corpus)
        history = run(model, corpus, settings, folder, view=stop_at(step, number), save_seconds=1000)
        assert signal.getsignal(number) is handler, "the handler was not put back"
    # a termination takes its course, once and after saving; an interrupt is answered by the return
    assert passed_on == ([(number, step)] if number == signal.SIGTERM else [])
    assert len(history["step_loss"]) == step == saved(folder)["iter_num"]
    assert not differences(saved(folder)["model"], model.state_dict()), "the saved weights are not those in memory"

    other = make_model(replace(settings, seed=5), corpus)  # its weights come from the file alone
    resumed = run(other, corpus, settings, folder)
    for name in ("last.pt", "ckpt.pt"):
        gaps = differences(saved(folder, name), saved(unbroken, name), name)
        assert not gaps, f"stopped at {step}: {gaps}"
    assert not differences(resumed, saved(unbroken)["history"])
    assert not differences(other.state_dict(), saved(unbroken)["model"])


def test_stopping_again_and_again_comes_to_the_same_end(unbroken, corpus, settings, tmp_path):
    folder = tmp_path / "stopped"
    with own_handler(signal.SIGINT):
        for step in range(1, 21):
            run(make_model(settings, corpus), corpus, settings, folder, view=stop_at(step, signal.SIGINT))
            assert saved(folder)["iter_num"] == step
    for name in ("last.pt", "ckpt.pt"):
        assert not differences(saved(folder, name), saved(unbroken, name), name)


@pytest.mark.parametrize("step", [1, 7, 10, 20])
def test_a_crash_loses_only_what_was_not_yet_written(unbroken, corpus, settings, tmp_path, step):
    folder = tmp_path / "crashed"

    def crash(now):
        if now == step:
            raise MemoryError

    with pytest.raises(MemoryError):
        run(make_model(settings, corpus), corpus, settings, folder, view=Watcher(crash))
    assert saved(folder)["iter_num"] == (step - 1) // 5 * 5
    run(make_model(settings, corpus), corpus, settings, folder)
    for name in ("last.pt", "ckpt.pt"):
        assert not differences(saved(folder, name), saved(unbroken, name), name)


def test_a_folder_that_cannot_be_written_is_noticed_before_the_first_step(corpus, settings, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(Trainer, "step", lambda self: pytest.fail("a step was trained for nothing"))
    with pytest.raises(CheckpointError, match="another folder") as error:
        run(make_model(settings, corpus), corpus, settings, tmp_path / "file" / "out")
    assert str(tmp_path / "file" / "out") in str(error.value), error.value


def test_a_run_that_wrote_nothing_starts_over_from_its_seed(unbroken, corpus, settings, tmp_path):
    """Also with the model in memory that was trained a little before the run broke off."""

    def crash(step):
        if step == 3:
            raise MemoryError

    folder = tmp_path / "crashed"
    again = make_model(settings, corpus)
    with pytest.raises(MemoryError):
        run(again, corpus, settings, folder, view=Watcher(crash), save_seconds=1000)
    assert not list(folder.iterdir()), "a checkpoint of a run that never saved"
    run(again, corpus, settings, folder)
    gaps = differences(saved(folder), saved(unbroken))
    assert not gaps, gaps[:3]


def test_handlers_are_put_back_after_a_run_that_was_not_stopped(model, corpus, settings, tmp_path):
    with own_handler(signal.SIGINT) as interrupt, own_handler(signal.SIGTERM) as terminate:
        run(model, corpus, settings, tmp_path)
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == (interrupt, terminate)


def test_a_second_interrupt_acts_at_once(model, corpus, settings, tmp_path):
    def twice(step):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with own_handler(signal.SIGINT), pytest.raises(AssertionError, match="came through"):
        run(model, corpus, settings, tmp_path, view=Watcher(twice))


def test_a_finished_run_is_loaded_and_not_trained_again(unbroken, corpus, settings, monkeypatch):
    before = {path: path.read_bytes() for path in unbroken.iterdir()}

    def never(trainer):
        raise AssertionError("a finished run was trained on")

    monkeypatch.setattr(Trainer, "step", never)
    model = make_model(replace(settings, seed=5), corpus)
    history = run(model, corpus, settings, unbroken)
    assert not differences(history, saved(unbroken)["history"])
    assert not differences(model.state_dict(), saved(unbroken)["model"])
    assert {path: path.read_bytes() for path in unbroken.iterdir()} == before, "a file was written anew"


@pytest.mark.parametrize("trained", [False, True])
def test_fresh_starts_over(unbroken, model, corpus, settings, trained):
    """Also with the model that the finished run has just trained, as when a cell is run again."""
    finished = {name: saved(unbroken, name) for name in ("last.pt", "ckpt.pt")}
    taken = []
    again = model if trained else make_model(settings, corpus)
    run(again, corpus, settings, unbroken, fresh=True, view=Watcher(taken.append))
    assert taken == list(range(1, 21))
    for name, checkpoint in finished.items():
        gaps = differences(saved(unbroken, name), checkpoint, name)
        assert not gaps, gaps[:3]


def test_other_settings_or_data_are_refused_by_name(unbroken, corpus, settings):
    before = {path: path.read_bytes() for path in unbroken.iterdir()}
    others = [
        (
            replace(settings, learning_rate=0.02, seed=5),
            corpus,
            ["learning_rate 0.01 there, 0.02 here", "seed 1337 there, 5 here"],
        ),
        (replace(settings, n_embd=32), corpus, ["n_embd 16 there, 32 here"]),
        (settings, replace(corpus, fingerprint="other"), ["fingerprint '0123456789abcdef' there, 'other' here"]),
        (settings, replace(corpus, vocab_size=99), [f"vocab_size {corpus.vocab_size} there, 99 here"]),
        (
            settings,
            replace(corpus, name="b", title="B"),
            ["'tiny' there, 'b' here", "'Tiny sentences' there, 'B' here"],
        ),
    ]
    for other, data, named in others:
        with pytest.raises(CheckpointError) as error:
            run(make_model(other, data), data, other, unbroken)
        assert all(part in str(error.value) for part in named), f"{named} not in: {error.value}"
        assert str(error.value).count(" there, ") == len(named), f"names more than differs: {error.value}"
    assert {path: path.read_bytes() for path in unbroken.iterdir()} == before


# -------------------------------------------------------------------------------------------- broken and full


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half_written(checkpoint, file):
    file.write(b"half a checkpoint")
    full_disk()


@contextlib.contextmanager
def small_files():
    """Within, the system refuses to write any file past 4096 bytes."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("fault", ["flush", "write", "rename", "system"])
def test_a_failing_write_leaves_the_file_before_it(unbroken, settings, corpus, monkeypatch, fault):
    path = unbroken / "last.pt"
    before, checkpoint = path.read_bytes(), {"weights": torch.zeros(100_000)}
    target = {
        "flush": (os, "fsync", full_disk),
        "write": (torch, "save", half_written),
        "rename": (os, "replace", full_disk),
    }
    with small_files() if fault == "system" else monkeypatch.context() as patch:
        if fault != "system":
            patch.setattr(*target[fault])
        with pytest.raises(CheckpointError, match="last.pt could not be written.*free disk space"):
            helpers.save_checkpoint(path, checkpoint)
    assert path.read_bytes() == before
    assert sorted(p.name for p in unbroken.iterdir()) == ["ckpt.pt", "last.pt"], "a temporary file was left"


def test_a_disk_that_fills_up_while_training_costs_nothing_saved(unbroken, corpus, settings, tmp_path, monkeypatch):
    folder = tmp_path / "full"
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="No space left"):
        view = Watcher(lambda step: patch.setattr(os, "fsync", full_disk) if step == 12 else None)
        run(make_model(settings, corpus), corpus, settings, folder, view=view)
    assert saved(folder)["iter_num"] == 10
    run(make_model(settings, corpus), corpus, settings, folder)
    assert not differences(saved(folder), saved(unbroken))


def refused(path):
    """The message with which a file is refused: one sentence, without a chain of causes."""
    with pytest.raises(CheckpointError) as error:
        helpers.load_model(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message and len(message) < 400, message
    assert error.value.__suppress_context__ or error.value.__context__ is None, "a reader sees the inner traceback too"
    return message


def test_cut_checkpoints_are_refused(unbroken):
    path = unbroken / "last.pt"
    whole = path.read_bytes()
    for length in (0, 1, *(len(whole) * tenth // 10 for tenth in range(1, 10)), len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "not a whole checkpoint" in refused(path), f"cut to {length} of {len(whole)} bytes"


def test_a_flipped_byte_is_refused_or_harmless(unbroken):
    path = unbroken / "ckpt.pt"
    whole, good = path.read_bytes(), saved(unbroken, "ckpt.pt")
    rng, outcomes = random.Random(11), []
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
    places = [rng.randrange(len(whole)) for _ in range(40)] + [rng.randrange(directory, len(whole)) for _ in range(160)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            harmless = helpers.load_checkpoint(path)
        except CheckpointError:
            outcomes.append(place)
        else:
            assert not differences(harmless, good), f"byte {place} of {len(whole)} changed the values unnoticed"
    assert len(outcomes) > 60, f"{len(outcomes)} of 200 were refused"


def test_a_flipped_compression_method_is_refused(unbroken):
    """The archive then asks for a decompressor, which fails in a way of its own."""
    path = unbroken / "ckpt.pt"
    whole = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        whole[archive.start_dir + 10] ^= 8  # stored becomes deflated
    path.write_bytes(whole)
    refused(path)


def test_foreign_files_are_refused(unbroken, tmp_path):
    path = tmp_path / "foreign.pt"
    path.write_text("not a checkpoint")
    refused(path)
    np.savez(path.with_suffix(".npz"), a=np.zeros(3))
    refused(path.with_suffix(".npz"))
    refused(tmp_path)
    good = saved(unbroken)
    without = {key: value for key, value in good.items() if key != "model_args"}
    wrong_shape = {**good, "model_args": {**good["model_args"], "n_embd": 32}}
    unknown_field = {**good, "model_args": {**good["model_args"], "n_expert": 8}}
    senseless = {**good, "model_args": {**good["model_args"], "n_layer": 0}}
    for value in (
        [1, 2],
        {"a": 1},
        without,
        wrong_shape,
        unknown_field,
        senseless,
        {**good, "model": 3},
        {**good, "model_args": 3},
    ):
        torch.save(value, path)
        refused(path)


class Bomb:
    """Unpickling this would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("form", ["checkpoint", "legacy", "pickle"])
def test_code_in_a_checkpoint_is_refused_and_not_run(unbroken, tmp_path, corpus, settings, form):
    path, created = unbroken / "last.pt", tmp_path / "created"
    hostile = {**saved(unbroken), "history": Bomb(created)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(hostile))
    else:
        torch.save(hostile, path, _use_new_zipfile_serialization=form == "checkpoint")
    refused(path)
    with pytest.raises(CheckpointError):
        run(make_model(settings, corpus), corpus, settings, unbroken)
    assert not created.exists(), "the code in the file was run"


# --------------------------------------------------------------------------------------------- no finite loss


def test_a_loss_that_is_no_number_stops_the_run(unbroken, corpus, settings, tmp_path):
    folder = tmp_path / "poisoned"
    model = make_model(settings, corpus)

    def poison(step):
        if step == 12:
            model.lm_head.weight.data[0] = math.nan

    with pytest.raises(TrainingError) as error:
        run(model, corpus, settings, folder, view=Watcher(poison))
    message = str(error.value)
    assert "Step 12 " in message and "nan" in message and f"{helpers.get_lr(12, settings):.2e}" in message, message
    assert saved(folder)["iter_num"] == 10
    run(make_model(settings, corpus), corpus, settings, folder)
    assert not differences(saved(folder), saved(unbroken)), "the kept checkpoint does not lead to the same end"


def test_a_run_that_fails_writes_the_best_state_it_held(unbroken, corpus, settings, tmp_path):
    model = make_model(settings, corpus)

    def poison(step):
        if step == 12:
            model.lm_head.weight.data[0] = math.nan

    with pytest.raises(TrainingError):
        run(model, corpus, settings, tmp_path / "poisoned", view=Watcher(poison), save_seconds=1000)
    best = saved(tmp_path / "poisoned", "ckpt.pt")
    history = saved(unbroken)["history"]
    expected = min(history["iter"][:3], key=lambda step: history["val_loss"][step // 5])
    assert best["iter_num"] == expected and best["best_val_loss"] == min(history["val_loss"][:3])
    helpers.load_model(tmp_path / "poisoned" / "ckpt.pt", vocab_size=corpus.vocab_size)
    assert not (tmp_path / "poisoned" / "last.pt").exists(), "weights that gave nan were saved"


def test_diverged_weights_never_replace_the_last_good_checkpoint(model, corpus, settings, tmp_path):
    """A step can have a finite loss and leave weights behind that give none."""
    settings = replace(settings, eval_interval=1, learning_rate=1e30, warmup_iters=0)
    with pytest.raises(TrainingError):
        run(model, corpus, settings, tmp_path)
    kept = saved(tmp_path)
    assert all(math.isfinite(loss) for loss in kept["history"]["val_loss"]), kept["history"]["val_loss"]


# --------------------------------------------------------------------------------------------- out of memory


@pytest.mark.parametrize("failing", [0, 7])
def test_out_of_memory_is_one_sentence_and_frees_what_it_took(corpus, settings, tmp_path, monkeypatch, failing):
    """Also while the error, and with it the frames that it went through, is kept, as a notebook keeps it."""
    taken, held, step = [], [], Trainer.step

    def hungry(trainer):
        if len(taken) == failing:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB.")
        taken.append(len(taken))
        step(trainer)

    def remembering(kind):
        real = kind.__init__
        monkeypatch.setattr(kind, "__init__", lambda self, *args: (held.append(weakref.ref(self)), real(self, *args))[1])

    remembering(Trainer)
    remembering(helpers.RunStore)
    model = make_model(settings, corpus)
    with monkeypatch.context() as patch, pytest.raises(TrainingError) as error:
        patch.setattr(Trainer, "step", hungry)
        run(model, corpus, settings, tmp_path, save_seconds=1000)
    message = str(error.value)
    assert "batch_size 4" in message and "block_size 16" in message and "lower batch_size" in message, message
    assert "\n" not in message and error.value.__context__ is None, "a reader sees the inner traceback too"
    assert len(held) == 2 and not any(ref() for ref in held), f"still held: {[ref() for ref in held]}"
    assert all(p.grad is None for p in model.parameters()), "gradients are still held"
    if failing:
        assert saved(tmp_path, "ckpt.pt")["iter_num"] <= 5, "the best state held so far is lost"

    smaller = replace(settings, batch_size=2)
    history = run(make_model(smaller, corpus), corpus, smaller, tmp_path)
    assert len(history["step_loss"]) == 20, "the same process cannot train with less"


# ------------------------------------------------------------------------------- the report of an unfinished run


@pytest.mark.parametrize("step", [1, 6])
def test_the_report_can_be_made_of_a_run_stopped_early(corpus, settings, tmp_path, step):
    """At step 1 there is one evaluation, so nothing to divide by; at step 6 two."""
    with own_handler(signal.SIGINT):
        history = run(make_model(settings, corpus), corpus, settings, tmp_path / "run", view=stop_at(step, signal.SIGINT))
    partial = helpers.Run(corpus, settings, history, tmp_path / "run", "#0072B2")
    assert (partial.steps, partial.last["iter"]) == (step, step // 5 * 5)
    for value in (*partial.paces, partial.gap, partial.passes, partial.best["val_loss"]):
        assert math.isfinite(value), value
    assert (partial.title, partial.unit, partial.final_split) == ("Tiny sentences", "character", "test")
    assert len(helpers.history_rows(history)) == len(helpers.loss_rows(history)[1]) == 1 + step // 5
    assert math.isfinite(helpers.tokens_per_second(history)) and helpers.overflows(history) == 0
    assert f"**Partial: {step} of 20 steps.**" in helpers.reading_of_training(partial)

    scores = helpers.score_run(partial, "cpu", ("val", "test"), ("test",))
    models = [partial.load("best", "cpu")]
    text = helpers.headline_text([partial, partial], [scores, scores], models * 2, CPU, helpers.choose_preset("smoke"))
    assert f"**Partial: Tiny sentences stopped at step {step}.**" in text
    final = scores["best", "test", "blocks"]
    helpers.write_summary(tmp_path / "summary.txt", [partial], [final], models, CPU, ["a finding"])
    summary = (tmp_path / "summary.txt").read_text()
    assert f"steps: {step}, best at" in summary and "a finding" in summary and "nan" not in summary, summary

    for figure in (
        helpers.learning_curves([partial, partial]),
        helpers.comparison_figure([partial, partial], [{"test": final.perplexity}] * 2),
    ):
        figure.savefig(tmp_path / "figure.png")
        plt.close(figure)


# ---------------------------------------------------------------------------------------- names in the notebook


def section_cells():
    """(section, syntax tree) of the notebook's code cells; what stands before the first number counts to 1."""
    notebook = nbformat.read(Path(helpers.__file__).with_name("test.ipynb"), as_version=4)
    section = 1
    for cell in notebook.cells:
        if cell.cell_type == "code":
            yield section, ast.parse(cell.source)
        else:
            numbers = re.findall(r"^#+ (\d+)\.", cell.source, flags=re.MULTILINE)
            section = int(numbers[-1]) if numbers else section


def names(tree, context):
    """The names that a cell assigns (ast.Store) or reads (ast.Load), those inside comprehensions and lambdas left out."""
    inner = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda)
    bound = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, inner[:-1])
        for generator in node.generators
        for target in ast.walk(generator.target)
        if isinstance(target, ast.Name)
    } | {arg.arg for node in ast.walk(tree) if isinstance(node, ast.Lambda) for arg in node.args.args}
    found = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, context)}
    return found - bound


@pytest.mark.parametrize("sections", helpers.MADE_IN)
def test_names_are_made_in_the_sections_that_the_error_names(sections):
    numbers = set(map(int, re.findall(r"\d+", sections)))
    assigned = {name for section, tree in section_cells() if section in numbers for name in names(tree, ast.Store)}
    missing = set(helpers.MADE_IN[sections].split()) - assigned
    assert not missing, f"{sections} does not assign {missing}"
    elsewhere = {name for section, tree in section_cells() if section not in numbers for name in names(tree, ast.Store)}
    assert not elsewhere & set(helpers.MADE_IN[sections].split()), "another section assigns them too"


def test_every_name_that_a_later_section_reads_is_in_the_table():
    made, listed, missing = {}, set(" ".join(helpers.MADE_IN.values()).split()), set()
    here = {}
    for section, tree in section_cells():
        stored = names(tree, ast.Store)
        for name in names(tree, ast.Load) - stored - here.get(section, set()):
            if made.get(name, section) != section and name not in listed:
                missing.add(f"{name} of section {made[name]}, read in {section}")
        here.setdefault(section, set()).update(stored)
        made.update(dict.fromkeys(stored, section))
    assert not missing, sorted(missing)


# -------------------------------------------------------------------------------------------------------- CUDA


def on_card(dtype):
    return Precision(torch.device("cuda"), dtype, "for tests")


@pytest.fixture
def longer(settings):
    """Enough steps for the graph to be captured and replayed."""
    return replace(settings, max_iters=120, eval_interval=40, dropout=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_learning_curve_falls(cuda, longer, corpus, tmp_path, dtype):
    losses = run(make_model(longer, corpus), corpus, longer, tmp_path, precision=on_card(dtype))["val_loss"]
    assert losses[-1] < 0.6 * losses[0], losses
    scale = saved(tmp_path)["scaler"]
    assert bool(scale) == (dtype == torch.float16), f"scaler state {scale} in {dtype}"


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 2e-2)])
def test_cuda_captured_step_equals_the_eager_one(cuda, longer, corpus, dtype, tolerance):
    ends = []
    for enabled in (True, False):
        trainer = Trainer(make_model(longer, corpus).to(cuda), corpus, longer, on_card(dtype))
        trainer.graphed_step.enabled = enabled
        losses, norms = advance(trainer, 40)
        assert (trainer.graphed_step.graph is not None) == enabled, trainer.graphed_step.reason
        ends.append((losses, norms, trainer.scaler.state_dict(), trainer.model.state_dict()))
    captured, eager = ends
    worst = max(abs(a - b) for a, b in zip(captured[0], eager[0], strict=True))
    print(f"{dtype}: losses at most {worst:g} apart, bit-identical: {not differences(captured, eager)}")
    assert worst < tolerance, f"losses are up to {worst:g} apart"
    assert captured[2] == eager[2], "the scaler went another way"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("step", [32, 72])
def test_cuda_stopped_run_goes_on_to_the_same_end(cuda, longer, corpus, tmp_path, step, dtype):
    settings = replace(longer, dropout=0.1)
    run(make_model(settings, corpus), corpus, settings, tmp_path / "a", precision=on_card(dtype))
    with own_handler(signal.SIGINT):
        view = stop_at(step, signal.SIGINT)
        stopped = run(
            make_model(settings, corpus), corpus, settings, tmp_path / "b", precision=on_card(dtype), view=view
        )
    assert len(stopped["step_loss"]) == step
    other = make_model(replace(settings, seed=5), corpus)
    run(other, corpus, settings, tmp_path / "b", precision=on_card(dtype))
    a, b = saved(tmp_path / "a"), saved(tmp_path / "b")
    gaps = differences(a["model"], b["model"]) + differences(a["history"], b["history"])
    print(f"{dtype} stopped at {step}: {'bit-identical' if not gaps else gaps[:3]}")
    worst = max(abs(x - y) for x, y in zip(a["history"]["step_loss"], b["history"]["step_loss"], strict=True))
    assert worst < 0.05, f"losses are up to {worst:g} apart"
    assert not differences(a["scaler"], b["scaler"])


def test_cuda_failing_compiler_leaves_training_uncompiled(cuda, longer, corpus, tmp_path, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", lambda model: broken)
    settings = replace(longer, compile=True)
    losses = run(make_model(settings, corpus), corpus, settings, tmp_path, precision=on_card(torch.bfloat16))[
        "val_loss"
    ]
    assert "uncompiled" in capsys.readouterr().out
    assert losses[-1] < 0.6 * losses[0], losses


def test_cuda_checkpoint_opens_on_a_cpu(cuda, longer, corpus, tmp_path):
    model = make_model(longer, corpus)
    run(model, corpus, longer, tmp_path, precision=on_card(torch.bfloat16))
    loaded = helpers.load_model(tmp_path / "last.pt", "cpu")
    assert not differences(loaded.state_dict(), {name: value.cpu() for name, value in model.state_dict().items()})
