"""Training: configuration, the step, the history, checkpoints, interrupts, fine-tuning.

python -m pytest tests/test_training.py
"""

import contextlib
import copy
import hashlib
import math
import shutil
import signal
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import helpers
from data.batches import get_batch
from data.dataset import CharTokenizer, GPT2Tokenizer, WordTokenizer
from helpers import CheckpointError, Precision, Run, TrainConfig, Trainer, TrainingError, make_model
from model import GPT

CPU = Precision(torch.device("cpu"), torch.float32, "for tests")
FILES = ("last.pt", "ckpt.pt")
TIMES = ("time", "waited", "seconds", "peak_memory")  # what a clock or the system says, no seed
HANGUP = getattr(signal, "SIGHUP", signal.SIGTERM)
SWITCHED = dict.fromkeys(("rotary", "rms_norm", "attn_gate", "pointer"), True)
SWITCHED |= {"bias": False, "muon_lr_scale": 20.0}


def train(corpus, config, folder, model=None, **options):
    """Trains and saves at each evaluation; what `model` holds before comes from another seed."""
    model = model or make_model(replace(config, seed=5), corpus)
    options = {"precision": CPU, "save_every": 0} | options
    return helpers.train_model(model, corpus, config, folder, **options)


def at(step, act):
    """A view that acts once, after so many steps."""
    return lambda run: act() if run.step == step and not run.status else None


def saved(folder, name="last.pt"):
    return torch.load(folder / name, weights_only=True)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def differences(a, b, path=""):
    """Where two nested values differ, bit for bit, as text; times are left out."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = torch.equal(a, b)
        return [] if same else [f"{path}: {(a.double() - b.double()).abs().max():g} apart"]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        keys = a.keys() - set(TIMES)
        return [line for key in keys for line in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [line for i, (x, y) in pairs for line in differences(x, y, f"{path}[{i}]")]
    same = type(a) is type(b) and (a == b or repr(a) == repr(b) == "nan")
    return [] if same else [f"{path}: {a!r} and {b!r}"]


def assert_same_files(folder, other):
    for name in FILES:
        gaps = differences(saved(folder, name), saved(other, name), name)
        assert not gaps, f"{len(gaps)} differences: {gaps[:3]}"


@contextlib.contextmanager
def own_handler(number, handle):
    """`handle(number)` in place of what the system does at this signal."""
    before = signal.signal(number, lambda received, frame: handle(received))
    try:
        yield signal.getsignal(number)
    finally:
        signal.signal(number, before)


def stop(step, number=signal.SIGINT):
    return at(step, lambda: signal.raise_signal(number))


@pytest.fixture
def unbroken(corpus, config, tmp_path):
    """The folder of a finished run that nothing disturbed."""
    train(corpus, config, tmp_path / "unbroken")
    return tmp_path / "unbroken"


# ----- configuration and presets -----
ALONE = {**SWITCHED, "compile": True, "decay_lr": False, "seed": 0, "max_iters": 1, "n_head": 1}
ALONE |= dict.fromkeys(("dropout", "weight_decay", "grad_clip", "beta1", "beta2"), 0)  # or 0.0
ALONE |= dict.fromkeys(("batch_size", "block_size", "n_layer", "eval_interval", "eval_iters"), 1)
ALONE |= {"warmup_iters": 1000, "gradient_accumulation_steps": 3}


@pytest.mark.parametrize("option", [*ALONE, "all of them"])
def test_every_option_of_the_configuration_runs(corpus, config, tmp_path, option):
    options = {option: ALONE[option]} if option in ALONE else ALONE
    config = replace(config, **({"max_iters": 3} | options))
    run = train(corpus, config, tmp_path)
    assert run.finished and all(map(math.isfinite, run.history["step_loss"])), run.history
    assert run.load("best").config == config.model_config(corpus.vocab_size)


def test_preset_is_chosen_by_name_then_environment_then_device(monkeypatch):
    monkeypatch.delenv("NANOGPT_PRESET", raising=False)
    for available, name in ((False, "quick"), (True, "full")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda answer=available: answer)
        assert helpers.choose_preset().name == name
    monkeypatch.setenv("NANOGPT_PRESET", "smoke")
    assert helpers.choose_preset().name == "smoke"
    assert helpers.choose_preset("quick").name == "quick"
    with pytest.raises(ValueError, match="'huge'.*full, record, quick, smoke"):
        helpers.choose_preset("huge")


# ----- precision -----
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_computes_in_the_precisions_type(dtype):
    assert helpers.choose_precision("cpu").dtype == torch.float32
    with replace(CPU, dtype=dtype).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


@pytest.mark.parametrize("capability", [(7, 0), (7, 5), (8, 0), (9, 0)])
def test_precision_follows_the_compute_capability(monkeypatch, capability):
    """Not is_bf16_supported, which says yes where bfloat16 is only emulated."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **options: True)
    precision = helpers.choose_precision()
    expected = torch.float16 if capability < (8, 0) else torch.bfloat16
    assert (precision.device.type, precision.dtype) == ("cuda", expected)
    assert "{}.{}".format(*capability) in precision.reason


# ----- windows and learning rate -----
@given(
    st.integers(0, 60), st.integers(1, 60), st.floats(1e-6, 1), st.floats(0.01, 1), st.booleans()
)
def test_learning_rate_rises_then_falls_within_its_bounds(warmup, length, peak, ratio, decay):
    low = peak * ratio
    lrs = {"learning_rate": peak, "min_lr": low, "decay_lr": decay}
    config = TrainConfig(warmup_iters=warmup, max_iters=length, **lrs)
    rates = [helpers.get_lr(step, config) for step in range(warmup + length + 1)]
    up, down = rates[: warmup + 1], rates[warmup:]
    assert all(0 < rate <= peak * (1 + 1e-12) for rate in rates), rates
    assert warmup >= length or up == sorted(up) and up[-1] == pytest.approx(peak), up
    assert down == sorted(down, reverse=True), down
    for part, of_decay in ((1, 1.0), (2, 0.5)) if warmup < length else ():
        at, wanted = (length - warmup) / part, peak - of_decay * decay * (peak - low)
        assert at % 1 or down[int(at)] == pytest.approx(wanted), f"{down} in {of_decay} of decay"
    rise, fall = peak / (warmup + 1), math.pi / 2 * (peak - low) / max(1, length - warmup)
    jumps = [abs(b - a) for a, b in zip(rates, rates[1:], strict=False)]
    limit = max(rise, fall) if warmup < length else peak
    assert max(jumps) <= limit * (1 + 1e-9), f"jumps by {max(jumps)}, at most {limit} is steep"


@given(st.integers(1, 20), st.integers(1, 300), st.integers(0, 2**32 - 1), st.integers(-1, 10**6))
def test_windows_are_stretches_of_the_text_that_seed_and_step_decide(block, spare, seed, step):
    config = TrainConfig(block_size=block, batch_size=5, seed=seed)
    state = torch.get_rng_state()
    starts = helpers.sample_starts(block + spare, config, step, 3)
    assert torch.equal(torch.get_rng_state(), state), "the global random numbers were used"
    torch.rand(3)
    assert torch.equal(starts, helpers.sample_starts(block + spare, config, step, 3))
    assert starts.shape == (3, 5) and starts.min() >= 0 and starts.max() < spare
    tokens = torch.randint(2**16, (block + spare,), dtype=torch.int32)
    x, y = get_batch(tokens, starts[0], block)
    for row, start in enumerate(starts[0].tolist()):
        assert x[row].tolist() == tokens[start : start + block].tolist()
        assert y[row].tolist() == tokens[start + 1 : start + block + 1].tolist()


def test_windows_differ_by_seed_and_step_and_reach_both_ends(config):
    starts = helpers.sample_starts(1000, config, 5, 3)
    assert not torch.equal(starts, helpers.sample_starts(1000, config, 6, 3))
    assert not torch.equal(starts, helpers.sample_starts(1000, replace(config, seed=1), 5, 3))
    starts = helpers.sample_starts(16 + 9, replace(config, batch_size=50), 0, 40)
    assert (starts.min(), starts.max()) == (0, 8), f"{starts.min()} to {starts.max()}, not 0 to 8"


@pytest.mark.parametrize("split", ["train", "val"])
def test_split_shorter_than_a_window_is_named_with_both_lengths(corpus, config, tmp_path, split):
    short = replace(corpus, splits={**corpus.splits, split: corpus.splits[split][:16]})
    with pytest.raises(ValueError, match=f"{split} .*16 tokens.*block_size 16"):
        train(short, config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    short = replace(corpus, splits={**corpus.splits, split: corpus.splits[split][:17]})
    assert train(short, config, tmp_path / "out").finished


# ----- the step -----
def take(trainer, steps):
    """Losses and gradient norms of the first steps."""
    losses, norms = [], []
    while len(losses) < steps:
        more = trainer.run_steps(len(losses))
        losses, norms = losses + more[0], norms + more[1]
    return losses, norms


def descending(config, corpus):
    """A trainer by plain descent, which shows the gradient itself; Adam would normalise it."""
    trainer = Trainer(make_model(config, corpus), corpus, config, CPU)
    descent = torch.optim.SGD(trainer.model.parameters(), lr=trainer.lr, fused=True)
    trainer.optimizers.by_name = {"optimizer": descent}
    return trainer


def test_accumulated_micro_steps_equal_one_large_batch(config, corpus):
    config = replace(config, dropout=0.0, grad_clip=0.0, learning_rate=0.5)
    ends = []
    for batch_size, micro_steps in ((8, 1), (2, 4)):
        shape = {"batch_size": batch_size, "gradient_accumulation_steps": micro_steps}
        trainer = descending(replace(config, **shape), corpus)
        starts = helpers.sample_starts(len(corpus.splits["train"]), trainer.config, 0, micro_steps)
        x, y = get_batch(trainer.tokens["train"], starts.flatten(), 16)
        first = trainer.model(x, y).item()
        losses, norms = take(trainer, 4)
        assert losses[0] == pytest.approx(first, rel=1e-5), "not the mean over the micro-steps"
        weights = torch.nn.utils.parameters_to_vector(trainer.model.parameters())
        ends.append((losses, norms, weights))
    (losses, norms, weights), (other_losses, other_norms, other_weights) = ends
    assert other_losses == pytest.approx(losses, rel=1e-5)
    assert other_norms == pytest.approx(norms, rel=1e-4)
    torch.testing.assert_close(other_weights, weights, rtol=0, atol=1e-5)


@pytest.mark.parametrize("grad_clip", [0.0, 0.01, 100.0])
def test_step_moves_by_its_rate_times_the_clipped_gradient(config, corpus, grad_clip):
    trainer = descending(replace(config, grad_clip=grad_clip, max_iters=5), corpus)
    for step in range(5):
        before = torch.nn.utils.parameters_to_vector(trainer.model.parameters())
        norm = trainer.run_steps(step)[1][0]
        after = torch.nn.utils.parameters_to_vector(trainer.model.parameters())
        assert norm > 0.1, f"gradient norm {norm}: too small to be clipped, or reported clipped"
        expected = helpers.get_lr(step, trainer.config) * min(norm, grad_clip or math.inf)
        moved = (after - before).norm().item()
        assert moved == pytest.approx(expected, rel=1e-3), f"step {step}, norm {norm}"


def test_weights_cast_together_train_as_autocast_s_own(config, corpus):
    half, ends = Precision(torch.device("cpu"), torch.bfloat16, "for tests"), []
    for ours in (True, False):
        trainer = Trainer(make_model(config, corpus), corpus, config, half)
        assert len(trainer.cast) == 8 * config.n_layer, trainer.cast
        trainer.cast = trainer.cast if ours else []
        ends.append((take(trainer, 3), trainer.model.state_dict()))
    assert ends[0][0] == ends[1][0], ends
    assert not differences(ends[0][1], ends[1][1])


def test_muon_moves_the_layers_matrices_and_adamw_the_rest(config, corpus):
    config = replace(config, muon_lr_scale=20.0)
    trainer = Trainer(make_model(config, corpus), corpus, config, CPU)
    groups = [optimizer.param_groups for optimizer in trainer.optimizers.by_name.values()]
    adamw, muon = ({id(p) for group in g for p in group["params"]} for g in groups)
    matrices = {id(p) for p in trainer.model.transformer.h.parameters() if p.dim() == 2}
    assert muon == matrices and adamw == {id(p) for p in trainer.model.parameters()} - matrices
    before = copy.deepcopy(trainer.model.state_dict())
    take(trainer, 2)
    still = [n for n, value in trainer.model.state_dict().items() if torch.equal(value, before[n])]
    assert not still, f"{still} did not move"


def test_optimizers_have_the_values_of_the_configuration(config, corpus):
    chosen = {"muon_lr_scale": 20.0, "beta1": 0.7, "beta2": 0.8, "weight_decay": 0.3}
    trainer = Trainer(make_model(config := replace(config, **chosen), corpus), corpus, config, CPU)
    adamw, (muon,) = (o.param_groups for o in trainer.optimizers.by_name.values())
    assert [group["betas"] for group in adamw] == [(0.7, 0.8)] * 2
    decays = {p.dim() > 1: group["weight_decay"] for group in adamw for p in group["params"]}
    assert decays == {True: 0.3, False: 0.0}
    assert (muon["weight_decay"], muon["lr_scale"]) == (0.3, 20.0)


def test_steps_take_no_memory_for_evaluations_that_are_far_away(config, corpus, tmp_path):
    config = replace(config, eval_interval=10**12, max_iters=10**12)
    assert train(corpus, config, tmp_path, view=stop(3)).step == 3


@pytest.mark.parametrize("broken", [False, True])
def test_compiled_layers_stand_in_for_the_models_own_unless_that_fails(model, monkeypatch, broken):
    called, idx = [], torch.arange(6).reshape(2, 3)
    expected = model.eval()(idx, idx)

    def compiled(call):
        return lambda *args: 1 / 0 if broken else (called.append(call.__self__), call(*args))[1]

    monkeypatch.setattr(torch, "compile", compiled)
    obstacles = helpers.compile_layers(model, model, 2)
    assert [("ZeroDivisionError" in text) for text in obstacles] == [True] * broken, obstacles
    called.clear()
    assert torch.equal(model(idx, idx), expected)
    assert called == ([] if broken else list(model.transformer.h)), "a layer left out, or twice"


# ----- a whole run -----
def test_history_has_a_row_an_evaluation_and_a_loss_a_step(model, corpus, config, tmp_path):
    run = train(corpus, replace(config, max_iters=12), tmp_path, model)
    rows = run.history["evals"]
    assert [row["iter"] for row in rows] == [0, 5, 10, 12]
    rates = [helpers.get_lr(row["iter"], run.config) for row in rows]
    assert [row["learning_rate"] for row in rows] == rates
    assert sum(row["time"] for row in rows) == pytest.approx(run.seconds) and rows[1]["time"] > 0
    waited = [row["waited"] for row in rows]
    assert waited == sorted(waited) and run.seconds < waited[-1] <= run.waited
    norms = run.history["step_grad_norm"]
    means = [0.0, np.mean(norms[:5]), np.mean(norms[5:10]), np.mean(norms[10:])]
    assert [row["grad_norm"] for row in rows] == pytest.approx(means)
    for split in ("train", "val"):
        tokens = helpers.load_tokens(corpus.splits[split], "cpu")
        expected = helpers.estimate_loss(run.load("last"), tokens, run.config, CPU)
        assert rows[-1][f"{split}_loss"] == pytest.approx(expected)
    assert len(run.history["step_loss"]) == len(run.history["step_grad_norm"]) == run.step == 12
    assert run.last is rows[-1] and run.best["val_loss"] == min(row["val_loss"] for row in rows)
    assert run.finished and run.interrupted is None and "finished" in run.status
    assert model.training, "the model is handed back in another mode than it trained in"


def test_view_is_called_after_evaluations_and_between_steps(corpus, config, tmp_path):
    calls = []

    def view(run):
        calls.append((run.step, len(run.history["evals"]), run.status is not None))

    train(corpus, config, tmp_path, view=view)
    assert calls == [(step, 1 + step // 5, False) for step in range(21)] + [(20, 5, True)]


def test_evaluation_does_not_move_training(corpus, config, tmp_path):
    often, seldom = (replace(config, eval_interval=n, dropout=0.2) for n in (5, 10))
    runs = [train(corpus, c, tmp_path / str(c.eval_interval)) for c in (often, seldom)]
    assert runs[0].history["step_loss"] == runs[1].history["step_loss"]
    assert not differences(runs[0].load("last").state_dict(), runs[1].load("last").state_dict())


@pytest.mark.parametrize("options", [{}, SWITCHED], ids=["plain", "switched"])
def test_learning_curve_falls(corpus, config, tmp_path, options):
    config = replace(config, max_iters=120, eval_interval=40, dropout=0.0, **options)
    losses = [row["val_loss"] for row in train(corpus, config, tmp_path).history["evals"]]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.6 * losses[0], losses


def test_model_of_another_shape_than_the_configuration_is_refused(model, corpus, config, tmp_path):
    for changed in ({"n_embd": 32}, {"bias": False}, {"block_size": 8}):
        with pytest.raises(ValueError, match="make_model"):
            train(corpus, replace(config, **changed), tmp_path / "out", model)
    mlp = model.transformer.h[0].mlp
    mlp.__class__ = type("MLP", (type(mlp),), {})
    with pytest.raises(ValueError, match="change model.py"):
        train(corpus, config, tmp_path / "out", model)
    assert not (tmp_path / "out").exists()


def test_training_runs_outside_the_main_thread(unbroken, corpus, config, tmp_path):
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train, corpus, config, tmp_path / "thread").result().finished
    assert_same_files(tmp_path / "thread", unbroken)


# ----- checkpoints -----
def test_checkpoints_hold_the_run_as_plain_values(unbroken, config, corpus, model):
    assert sorted(contents(unbroken)) == sorted(FILES)
    last, best = saved(unbroken), saved(unbroken, "ckpt.pt")
    shared = {"model", "model_args", "identity", "sources", "chars", "words"}
    shared |= {"iter_num", "best_val_loss"}
    assert best.keys() == shared, "the best weights stand there with more than names them"
    state = {"optimizer", "scaler", "rng", "cuda_rng", "history", "seconds", "waited", "best"}
    assert last.keys() == shared | state and not differences(last["best"], best)
    for checkpoint in (last, best):
        assert checkpoint["model_args"] == asdict(model.config)
        assert asdict(config).items() <= checkpoint["identity"].items()
        assert checkpoint["identity"]["fingerprint"] == corpus.fingerprint
        assert checkpoint["best_val_loss"] == min(r["val_loss"] for r in last["history"]["evals"])


@pytest.mark.parametrize("seconds", [0, 1000])
def test_best_is_the_lowest_and_last_the_end(model, corpus, config, tmp_path, monkeypatch, seconds):
    losses = iter([5, 5, 3, 3, 1, 1, 2, 2, 4, 4])  # training, validation at steps 0, 5, ..., 20
    monkeypatch.setattr(helpers, "estimate_loss", lambda *args: float(next(losses)))
    weights = {}

    def keep(run):
        weights[run.step] = copy.deepcopy(model.state_dict())

    run = train(corpus, config, tmp_path, model, view=keep, save_every=seconds)
    for which, step in (("best", 10), ("last", 20)):
        loaded = run.load(which)
        assert not loaded.training and loaded.config == model.config
        gaps = differences(loaded.state_dict(), weights[step])
        assert not gaps, f"{which} holds another step's weights than {step}: {gaps}"
    for name, step in (("ckpt.pt", 10), ("last.pt", 20)):
        assert (saved(tmp_path, name)["iter_num"], run.best["val_loss"]) == (step, 1.0)
    shutil.copy(tmp_path / "last.pt", tmp_path / "ckpt.pt")  # which names the same best loss
    train(corpus, config, tmp_path, model)
    assert saved(tmp_path, "ckpt.pt")["iter_num"] == 10, "the last weights pass for the best"


def nanogpt_checkpoint(config, path):
    """A checkpoint of nanoGPT's, with its vocabulary of a multiple of 64, and the model in it."""
    model = GPT(config.model_config(64)).eval()
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    arguments = {name: getattr(model.config, name) for name in names}
    weights = {f"_orig_mod.{name}": value for name, value in model.state_dict().items()}
    mask = torch.ones(16, 16).tril().view(1, 1, 16, 16)  # a buffer of its versions before PyTorch 2
    weights |= {f"_orig_mod.transformer.h.{layer}.attn.bias": mask for layer in range(2)}
    checkpoint = {"model": weights, "model_args": arguments, "iter_num": 7, "config": {"seed": 1}}
    torch.save(checkpoint | {"best_val_loss": torch.tensor(1.5)}, path)
    return path, model


def test_nanogpt_checkpoint_loads_with_its_padded_vocabulary_cropped(config, corpus, tmp_path):
    path, padded = nanogpt_checkpoint(config, tmp_path / "nanogpt.pt")
    idx = torch.arange(12).reshape(1, 12)
    assert torch.equal(helpers.load_model(path)(idx), padded(idx))
    with pytest.raises(CheckpointError, match=f"64 ids.*{corpus.vocab_size}"):
        helpers.load_model(path, data=corpus)  # it pads no characters: these are 64
    corpus = replace(corpus, tokenizer=GPT2Tokenizer(tmp_path))
    cropped = helpers.load_model(path, data=corpus)(idx)
    torch.testing.assert_close(cropped, padded(idx)[..., : corpus.vocab_size])
    make_model(config, corpus).load_state_dict(helpers.start_weights(path, config, corpus)[0])
    with pytest.raises(CheckpointError, match="64 ids.*65"):
        helpers.load_model(path, data=replace(corpus, vocab_size=65))
    torch.save(torch.load(path) | {"chars": "0"}, path)  # this project pads none: all 64 count
    with pytest.raises(CheckpointError, match=f"64 ids.*{corpus.vocab_size}"):
        helpers.load_model(path, data=corpus)


def test_checkpoint_of_other_words_is_refused(config, corpus, tmp_path):
    words = ["<unk>", "<eos>", *map(str, range(corpus.vocab_size - 2))]
    data, other = (replace(corpus, tokenizer=WordTokenizer(w)) for w in (words, words[::-1]))
    train(data, config, tmp_path)
    assert helpers.load_model(tmp_path / "ckpt.pt", data=data).config.vocab_size == len(words)
    for unlike in (other, corpus, replace(corpus, tokenizer=GPT2Tokenizer(tmp_path))):
        with pytest.raises(CheckpointError, match="another vocabulary"):
            helpers.start_weights(tmp_path / "ckpt.pt", config, unlike)


OTHERS = [("lm_head.weight", "output layer"), ("transformer.h.0.attn.bias_table", "Unexpected key")]


@pytest.mark.parametrize("name, says", OTHERS)
def test_checkpoint_with_weights_that_the_model_has_no_place_for_is_refused(unbroken, name, says):
    """Of two unlike output layers it would take the one read last; masks alone are left out."""
    checkpoint = saved(unbroken, "ckpt.pt")
    checkpoint["model"][name] = checkpoint["model"]["lm_head.weight"] + 1
    torch.save(checkpoint, unbroken / "ckpt.pt")
    with pytest.raises(CheckpointError, match=says):
        helpers.load_model(unbroken / "ckpt.pt")


# ----- interrupts -----
STOPS = [(signal.SIGINT, 7, {}), (signal.SIGTERM, 10, {}), (HANGUP, 19, SWITCHED)]


@pytest.mark.parametrize("number, step, options", STOPS)
def test_interrupted_run_resumes_to_the_same_end(corpus, config, tmp_path, number, step, options):
    config, folder, passed_on = replace(config, **options), tmp_path / "stopped", []
    whole = train(corpus, config, tmp_path / "whole")
    with own_handler(number, lambda got: passed_on.append((got, saved(folder)["iter_num"]))) as own:
        model = make_model(config, corpus)
        run = train(corpus, config, folder, model, view=stop(step, number), save_every=1000)
        assert signal.getsignal(number) is own, "the handler was not put back"
    # an interrupt is answered by the return; the others take their course, once and after saving
    assert passed_on == ([] if number == signal.SIGINT else [(number, step)])
    stopped, evaluated = saved(folder), sum(row["time"] for row in run.history["evals"])
    assert (run.interrupted, run.step, stopped["iter_num"]) == (number, step, step)
    assert "interrupted" in run.status and stopped["seconds"] == run.seconds
    assert step == run.last["iter"] or run.seconds > evaluated, "steps since then took no time"
    assert not differences(run.load("last").state_dict(), model.state_dict())

    model = make_model(replace(config, seed=5), corpus)
    resumed = train(corpus, config, folder, model)
    assert_same_files(folder, tmp_path / "whole")
    assert not differences(resumed.history, whole.history)
    assert resumed.seconds >= run.seconds and resumed.waited > stopped["waited"] > run.seconds
    assert not differences(model.state_dict(), whole.load("last").state_dict())


def test_run_interrupted_after_each_step_comes_to_the_same_end(unbroken, corpus, config, tmp_path):
    with own_handler(signal.SIGINT, lambda number: pytest.fail("an interrupt came through")):
        for step in range(1, 21):
            train(corpus, config, tmp_path / "stopped", view=stop(step))
            assert saved(tmp_path / "stopped")["iter_num"] == step
    assert_same_files(tmp_path / "stopped", unbroken)


def test_second_interrupt_acts_at_once(corpus, config, tmp_path):
    twice = 2 * [signal.SIGINT]
    with pytest.raises(KeyboardInterrupt):
        train(corpus, config, tmp_path, view=lambda run: [*map(signal.raise_signal, twice)])


@pytest.mark.parametrize("number", [HANGUP, signal.SIGTERM, signal.SIGINT])
def test_the_same_signal_twice_is_one(monkeypatch, number):
    """As a shell and a closing terminal both send it, and torchrun; here while processes ask."""
    if number == signal.SIGINT:
        monkeypatch.setenv("LOCAL_RANK", "0")
    passed_on = []

    def answer(*_):
        coming = iter([number])
        return Mock(item=lambda: sum(signal.raise_signal(n) or 0 for n in coming))

    monkeypatch.setattr(helpers, "all_reduce", answer)
    with own_handler(number, passed_on.append), helpers.Interrupts() as interrupted:
        for _ in range(2):
            interrupted()
        assert interrupted.received == number and not passed_on
    assert passed_on == [number] * (number != signal.SIGINT)


@pytest.mark.parametrize("number", [HANGUP, signal.SIGINT])
def test_signal_that_is_ignored_stays_ignored(corpus, config, tmp_path, number):
    """As a hang-up is under nohup, and an interrupt in a shell's background."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        assert train(corpus, config, tmp_path, view=stop(3, number)).finished
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("moment", ["the last look", "a save that fails"])
def test_termination_is_not_swallowed(corpus, config, tmp_path, monkeypatch, moment):
    """Whatever else comes meanwhile, it takes its course."""
    passed_on, full = [], Mock(side_effect=CheckpointError("No space left."))

    def view(run):
        if run.step == 7 and fails:
            monkeypatch.setattr(helpers, "save_checkpoint", full)
        if run.status or run.step == 7 and fails:
            signal.raise_signal(signal.SIGTERM)

    fails = moment == "a save that fails"
    ends = pytest.raises(CheckpointError) if fails else contextlib.nullcontext()
    with own_handler(signal.SIGTERM, passed_on.append), ends:
        train(corpus, config, tmp_path, view=view, save_every=1000)
    assert passed_on == [signal.SIGTERM]


@pytest.mark.parametrize("moment", ["the last step", "the last look"])
def test_late_interrupt_leaves_a_whole_run(corpus, config, tmp_path, moment):
    """And is told, so that the command's exit status is that of Ctrl-C."""

    def look(run):
        return signal.raise_signal(signal.SIGINT) if run.status else None

    run = train(corpus, config, tmp_path, view=look if moment == "the last look" else stop(20))
    assert run.finished and run.interrupted == signal.SIGINT
    assert "finished" in run.status and "partial" not in run.status, run.status


CRASHES = [(1, 0, 1), (7, 0, 7), (20, 0, 20), (13, 1000, 0)]


@pytest.mark.parametrize("step, seconds, kept", CRASHES)
def test_crash_loses_only_the_unsaved(unbroken, corpus, config, tmp_path, step, seconds, kept):
    """Also with the model in memory that was trained a little before."""
    folder, model = tmp_path / "crashed", make_model(config, corpus)
    with pytest.raises(ZeroDivisionError):
        train(corpus, config, folder, model, view=at(step, lambda: 1 / 0), save_every=seconds)
    assert saved(folder)["iter_num"] == kept
    train(corpus, config, folder, model)
    assert_same_files(folder, unbroken)


def test_finished_run_is_loaded_and_not_trained_again(unbroken, corpus, config, monkeypatch):
    before, model = contents(unbroken), make_model(replace(config, seed=5), corpus)
    monkeypatch.setattr(Trainer, "step", lambda trainer: pytest.fail("a finished run was trained"))
    run = train(corpus, config, unbroken, model)
    assert not differences(run.history, saved(unbroken)["history"]) and "loaded" in run.status
    assert run.waited == saved(unbroken)["waited"], "loading passes for training"
    assert not differences(model.state_dict(), saved(unbroken)["model"])
    assert contents(unbroken) == before, "a file was written anew"


@pytest.mark.parametrize("imported", [0, 1])
def test_changed_code_is_named(corpus, config, tmp_path, monkeypatch, imported):
    """On the disk alone, where the kernel has the old one, or in both; also once taken back."""
    assert [path.name for path in helpers.CODE] == ["model.py", "helpers.py"]
    code, said = tmp_path / "model.py", "model.py or helpers.py changed"
    monkeypatch.setattr(helpers, "CODE", [code])
    sums = [[hashlib.sha256(text).hexdigest()] for text in (b"old", b"new")]
    ends = [(0, 0, "interrupted"), (1, imported, "finished"), (1, 1, "loaded"), (0, 0, "loaded")]
    for on_disk, in_kernel, end in ends:
        code.write_bytes([b"old", b"new"][on_disk])
        monkeypatch.setattr(helpers, "SOURCES", sums[in_kernel])
        view = stop(5) if end == "interrupted" else None
        status = train(corpus, config, tmp_path / "run", view=view).status
        assert end in status and (said in status) == (end != "interrupted")


def test_fresh_starts_over(unbroken, corpus, config, tmp_path):
    """Also with the model that the finished run has just trained, as when a cell is run again."""
    model, taken, folder = make_model(config, corpus), [], tmp_path / "again"
    train(corpus, config, folder, model)
    fresh = {"fresh": True, "view": lambda run: taken.append(run.step)}
    run = train(corpus, config, folder, model, **fresh)
    assert taken[:21] == list(range(21)) and "finished" in run.status
    assert_same_files(folder, unbroken)


@pytest.mark.parametrize("changed", [{"learning_rate": 0.02, "seed": 5}, {"n_embd": 32}])
@pytest.mark.parametrize("facts", [{}, {"vocab_size": 99}, {"name": "b", "title": "B"}])
def test_other_configuration_or_data_is_refused_by_name(unbroken, corpus, config, changed, facts):
    before, other = contents(unbroken), replace(corpus, **facts)
    with pytest.raises(CheckpointError, match="fresh=True.*--fresh") as error:
        train(other, replace(config, **changed), unbroken)
    pairs = [(getattr(config, name), value) for name, value in changed.items()]
    pairs += [(getattr(corpus, n), getattr(other, n)) for n in ("name", "title", "fingerprint")]
    named, message = [f"{a!r} there, {b!r} here" for a, b in pairs if a != b], str(error.value)
    assert all(text in message for text in named), f"{named} not in: {message}"
    assert message.count(" there, ") == len(named), f"names more than differs: {message}"
    assert contents(unbroken) == before


@pytest.mark.parametrize("change", [lambda t: t[:-1], lambda t: t[::-1], lambda t: np.roll(t, 1)])
def test_run_on_other_tokens_is_refused(unbroken, corpus, config, change):
    """As they are put into a set in memory, to see what less or another text gives."""
    other = replace(corpus, splits={**corpus.splits, "train": change(corpus.splits["train"])})
    with pytest.raises(CheckpointError, match=f"fingerprint {corpus.fingerprint!r} there"):
        train(other, config, unbroken)
    assert math.isnan(other.bytes["train"]) and other.words["val"] == corpus.words["val"]


# ----- out of memory -----
def no_memory_on_a_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB.")


def no_memory_on_a_cpu():
    torch.empty(2**60)


@pytest.mark.parametrize("failure", [no_memory_on_a_gpu, no_memory_on_a_cpu])
@pytest.mark.parametrize("failing", [0, 7])
def test_out_of_memory_frees_what_it_took(corpus, config, tmp_path, monkeypatch, failing, failure):
    """Also while the error, and with it its frames, is kept, as a notebook keeps it."""
    held, taken, model, step = [], [], make_model(config, corpus), Trainer.step

    def remembering(made):
        return lambda self, *args: (held.append(weakref.ref(self)), made(self, *args))[1]

    def hungry(trainer):
        taken.append(failure() if len(taken) == failing else step(trainer))

    with monkeypatch.context() as patch, pytest.raises(TrainingError) as error:
        for kind in (Trainer, Run):
            patch.setattr(kind, "__init__", remembering(kind.__init__))
        patch.setattr(Trainer, "step", hungry)
        train(corpus, config, tmp_path, model, save_every=1000)
    message = str(error.value)
    assert "batch_size 4" in message and "block_size 16" in message and "\n" not in message, message
    assert error.value.__context__ is None, "a reader sees the inner traceback too"
    assert len(held) == 2 and not any(ref() for ref in held), f"held: {[ref() for ref in held]}"
    assert all(p.grad is None for p in model.parameters()), "gradients are still held"
    rows = train(corpus, config, tmp_path / "unbroken").history["evals"][: 1 + failing // 5]
    best = saved(tmp_path, "ckpt.pt")["best_val_loss"]
    assert best == min(row["val_loss"] for row in rows), "the best state held so far is lost"
    assert train(corpus, replace(config, batch_size=2), tmp_path / "smaller").finished


# ----- fine-tuning -----
def test_fine_tuning_starts_from_the_weights_of_a_checkpoint(unbroken, corpus, config, tmp_path):
    tuned = replace(config, learning_rate=2e-3, dropout=0.3, seed=3)
    model, first, options = make_model(tuned, corpus), {}, {"start_from": unbroken / "ckpt.pt"}
    view = at(0, lambda: first.update(copy.deepcopy(model.state_dict())))
    train(corpus, tuned, tmp_path / "whole", model, view=view, **options)
    assert not differences(first, saved(unbroken, "ckpt.pt")["model"])

    train(corpus, tuned, tmp_path / "tuned", view=stop(7), **options)
    for other in (None, unbroken / "last.pt"):  # last.pt is another file, so another run
        with pytest.raises(CheckpointError, match="another run .start_from .* there, "):
            train(corpus, tuned, tmp_path / "tuned", start_from=other)
    train(corpus, tuned, tmp_path / "tuned", **options)
    assert_same_files(tmp_path / "tuned", tmp_path / "whole")


def test_run_of_a_version_with_more_options_is_refused(unbroken, corpus, config):
    last = saved(unbroken)
    torch.save(last | {"identity": last["identity"] | {"swiglu": True}}, unbroken / "last.pt")
    with pytest.raises(CheckpointError, match="swiglu True there, None here"):
        train(corpus, config, unbroken)


@pytest.mark.parametrize("kind", ["missing", "no checkpoint", "another shape", "other characters"])
def test_unusable_start_writes_nothing(unbroken, corpus, config, tmp_path, kind):
    """And the error goes without the advice to start over, which would not help."""
    path = tmp_path / "missing.pt" if kind == "missing" else unbroken / "ckpt.pt"
    if kind == "other characters":
        chars = "".join(chr(ord(char) + 1) for char in corpus.tokenizer.chars)
        corpus = replace(corpus, tokenizer=CharTokenizer(chars))
    if kind == "no checkpoint":
        path.write_bytes(b"not a checkpoint")
    config = replace(config, n_embd=32) if kind == "another shape" else config
    with pytest.raises(CheckpointError) as error:
        train(corpus, config, tmp_path / "tuned", start_from=path)
    message = str(error.value)
    assert str(path) in message and "fresh" not in message and "\n" not in message, message
    assert kind != "another shape" or "n_embd 16 there, 32 here" in message, message
    assert not (tmp_path / "tuned").exists()


def test_start_replaced_while_read_is_refused(unbroken, corpus, config, tmp_path, monkeypatch):
    """Else the run would be named after another file than the one it started from."""
    start, load = shutil.copy(unbroken / "ckpt.pt", tmp_path / "start.pt"), helpers.load_checkpoint

    def replaced(*arguments):
        checkpoint = load(*arguments)
        shutil.copy(unbroken / "last.pt", start)
        return checkpoint

    monkeypatch.setattr(helpers, "load_checkpoint", replaced)
    with pytest.raises(CheckpointError, match="start.pt changed"):
        train(corpus, config, tmp_path / "tuned", start_from=start)


@pytest.mark.parametrize("name", FILES)
def test_start_is_not_overwritten(unbroken, corpus, config, tmp_path, name):
    before, link = contents(unbroken), tmp_path / "link"
    link.symlink_to(unbroken, target_is_directory=True)
    for start in (unbroken / name, link / name):
        with pytest.raises(ValueError, match="choose another"):
            train(corpus, config, unbroken, start_from=start, fresh=True)
    assert contents(unbroken) == before


def test_start_that_is_named_by_nothing_is_refused(corpus, config, tmp_path):
    """As from a shell's variable that is not set: not a run from scratch."""
    with pytest.raises(CheckpointError):
        train(corpus, config, tmp_path / "tuned", start_from="")


# ----- CUDA -----
def on_gpu(dtype):
    return Precision(torch.device("cuda"), dtype, "for tests")


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@pytest.fixture
def longer(config):
    """Enough steps for the graph to be captured and replayed."""
    return replace(config, max_iters=120, eval_interval=40, dropout=0.0)


@DTYPES
@pytest.mark.parametrize("options", [{}, SWITCHED], ids=["plain", "switched"])
def test_cuda_learning_curve_falls(cuda, longer, corpus, tmp_path, dtype, options):
    config = replace(longer, **options)
    rows = train(corpus, config, tmp_path, precision=on_gpu(dtype)).history["evals"]
    losses = [row["val_loss"] for row in rows]
    assert losses[-1] < 0.6 * losses[0], losses
    assert all(row["peak_memory"] > 0 for row in rows), rows
    scale = saved(tmp_path)["scaler"]
    assert bool(scale) == (dtype == torch.float16), f"scaler state {scale} in {dtype}"


@DTYPES
def test_cuda_captured_step_equals_the_eager_one(cuda, longer, corpus, dtype):
    ends = []
    for enabled in (True, False):
        model = make_model(longer, corpus).to(cuda)
        trainer = Trainer(model, corpus, longer, on_gpu(dtype))
        trainer.graphed_step.enabled = enabled
        losses, _ = take(trainer, 40)
        assert (trainer.graphed_step.graph is not None) == enabled, trainer.graphed_step.reason
        ends.append((losses, trainer.scaler.state_dict(), model.state_dict()))
    captured, eager = ends
    worst = max(abs(a - b) for a, b in zip(captured[0], eager[0], strict=True))
    print(f"{dtype}: losses {worst:g} apart, bit-identical: {not differences(captured, eager)}")
    assert worst < (1e-4 if dtype == torch.float32 else 2e-2), f"losses are {worst:g} apart"
    assert captured[1] == eager[1], "the scaler went another way"


@DTYPES
@pytest.mark.parametrize("step", [32, 72])
def test_cuda_interrupted_run_resumes_to_the_same_end(cuda, longer, corpus, tmp_path, step, dtype):
    """As near as the GPU repeats itself: some sums there are added in an order that varies."""
    config, options = replace(longer, dropout=0.1), {"precision": on_gpu(dtype)}
    train(corpus, config, tmp_path / "a", **options)
    assert train(corpus, config, tmp_path / "b", view=stop(step), **options).step == step
    train(corpus, config, tmp_path / "b", **options)
    a, b = saved(tmp_path / "a"), saved(tmp_path / "b")
    gaps = differences(a["model"], b["model"]) + differences(a["history"], b["history"])
    print(f"{dtype} interrupted at {step}: {gaps[:3] or 'bit-identical'}")
    pairs = zip(a["history"]["step_loss"], b["history"]["step_loss"], strict=True)
    worst = max(abs(x - y) for x, y in pairs)
    assert worst < 0.05, f"losses are up to {worst:g} apart"
    assert not differences(a["scaler"], b["scaler"])


def test_cuda_failing_compiler_is_done_without(cuda, longer, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda layer: lambda *args: 1 / 0)
    config = replace(longer, compile=True)
    run = train(corpus, config, tmp_path, precision=on_gpu(torch.bfloat16))
    assert "no compiled layers" in run.status, run.status
    assert run.last["val_loss"] < 0.6 * run.history["evals"][0]["val_loss"], run.history["evals"]


def test_cuda_checkpoint_opens_on_a_cpu(cuda, longer, corpus, tmp_path):
    model = make_model(longer, corpus)
    run = train(corpus, longer, tmp_path, model, precision=on_gpu(torch.bfloat16))
    assert not differences(run.load("last", "cpu").state_dict(), model.cpu().state_dict())
