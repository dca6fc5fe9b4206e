"""Evaluation: exact losses against brute force, units, baselines, estimates, dynamic evaluation.

python -m pytest tests/test_evaluation.py
"""

import copy
import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import helpers
from data.batches import get_batch, load_tokens
from data.dataset import CharTokenizer, Splits
from helpers import (
    Precision,
    Score,
    dynamic_evaluation,
    evaluate_baselines,
    squared_gradients,
    token_losses,
)

CPU = Precision(torch.device("cpu"), torch.float32, "for tests")
BLOCK = 12  # of the lively model


def evaluate(model, data, split, stride=None):
    """The Score of a split."""
    return helpers.score_of(token_losses(model, data, split, stride), data, split)


def with_splits(data, **splits):
    arrays = {name: np.asarray(tokens, dtype=np.uint16) for name, tokens in splits.items()}
    counts = {k: data.meta["splits"][k] | {"tokens": len(ids)} for k, ids in arrays.items()}
    splits, meta = Splits(data.splits | arrays), {"splits": data.meta["splits"] | counts}
    return replace(data, splits=splits, prepared=splits, meta=data.meta | meta)


@pytest.fixture
def random_text(corpus):
    """Makes data whose test split is random tokens of the lively model's vocabulary."""
    data = replace(corpus, vocab_size=23, tokenizer=CharTokenizer("abcde\nfghijklmnopqrstuv"))

    def make(length):
        return with_splits(data, test=np.random.default_rng(length).integers(23, size=length))

    return make


def off_by(found, expected):
    """Largest difference."""
    return (found.detach().cpu().double() - expected.detach().cpu().double()).abs().max().item()


# ----- whole splits -----
def token_by_token(model, data, split, stride):
    """Losses (N,) in float64, one forward pass a token."""
    model, block, losses = copy.deepcopy(model).double(), model.config.block_size, []
    tokens = data.splits[split].tolist()
    inputs = [data.bos_id, *tokens]
    for i, token in enumerate(tokens):
        first = i // stride * stride  # the first token that this one's window evaluates
        start = max(0, first - (block - stride))
        logits = model(torch.tensor([inputs[start : i + 1]]))[0, -1]
        losses.append(-logits.log_softmax(-1)[token].detach())
    return torch.stack(losses)


@pytest.mark.parametrize("stride", [None, 1, BLOCK // 4, 5, BLOCK - 1, BLOCK])
def test_losses_equal_token_by_token_in_float64(lively, switches, random_text, stride):
    model = lively(**switches)
    for length in (1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 1):
        data = random_text(length)
        found = token_losses(model, data, "test", stride)
        expected = token_by_token(model, data, "test", stride or BLOCK)
        assert len(found) == length and off_by(found, expected) < 1e-4, off_by(found, expected)
        score = evaluate(model, data, "test", stride)
        assert score == helpers.score_of(found, data, "test")
        assert score.nats == pytest.approx(expected.sum().item(), rel=1e-5)
        sizes = (length, data.bytes["test"], data.words["test"])
        assert (score.tokens, score.bytes, score.words) == sizes


@pytest.mark.parametrize("stride", [4, BLOCK])
def test_a_long_text_in_parts_equals_all_windows_at_once(lively, random_text, stride):
    model, data = lively(n_layer=1), random_text(BLOCK * 3000)
    tokens = torch.from_numpy(data.splits["test"].astype(np.int64))
    inputs = torch.cat([torch.tensor([data.bos_id]), tokens[:-1]])
    windows = (part.unfold(0, BLOCK, stride) for part in (inputs, tokens))
    expected = model.token_losses(*windows).view(-1, BLOCK)[:, -stride:].flatten()
    found = token_losses(model, data, "test", stride)[BLOCK - stride :]
    assert len(found) == len(expected) and off_by(found, expected) < 1e-5, off_by(found, expected)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_restores_the_mode_and_has_no_dropout(lively, corpus, config, training):
    model, config = lively(corpus.vocab_size, dropout=0.5), replace(config, block_size=BLOCK)
    tokens = load_tokens(corpus.splits["test"], "cpu")
    found = []
    for mode in (False, training):
        model.train(mode)
        estimate = helpers.estimate_loss(model, tokens, config, CPU)
        score = evaluate(model, corpus, "test")
        found.append((score.nats, estimate, *dynamic_losses(model, corpus, n_tokens=60).tolist()))
        assert all(module.training == mode for module in model.modules())
    assert found[0] == found[1], "dropout acted while evaluating"
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("stride", [-1, 0, BLOCK + 1, 4.0])
def test_a_stride_that_would_skip_tokens_is_refused(lively, random_text, stride):
    with pytest.raises(ValueError, match=f"stride is {stride}"):
        evaluate(lively(), random_text(30), "test", stride)


def test_an_unknown_split_is_refused_by_name(lively, corpus):
    model = lively(corpus.vocab_size)
    for evaluation in (token_losses, evaluate, lambda _, *where: evaluate_baselines(*where)):
        with pytest.raises(ValueError, match="'valid'.*train, val, test"):
            evaluation(model, corpus, "valid")


# ----- units -----
def test_units_of_a_score():
    score = Score(nats=100 * math.log(8), tokens=100, bytes=300, words=50)
    found = (score.loss, score.perplexity, score.bits_per_byte, score.word_perplexity)
    assert found == pytest.approx((math.log(8), 8, 1, 64))  # 3 bits a token of 3 bytes; 2 a word
    score = replace(score, nats=70_000.0)
    assert score.perplexity == pytest.approx(math.exp(700))
    assert score.word_perplexity == math.inf, "beyond what a float holds"
    assert math.isnan(replace(score, nats=math.nan).perplexity), "no number, so not infinite"


def test_losses_of_a_part_are_no_score_of_the_split(lively, corpus):
    """Its bytes and words are the whole split's: bits per byte would be far too few."""
    part = dynamic_losses(lively(corpus.vocab_size), corpus, n_tokens=60)
    for data in (corpus, replace(corpus, splits={"test": corpus.splits["test"][:60]})):
        with pytest.raises(ValueError, match="60 tokens"):
            helpers.score_of(part, data, "test")


# ----- baselines -----
def bigram_table(data, strength):
    """Unigrams (V,), and p(next | before) as a table (V, V), by counting one by one."""
    train, vocab = data.splits["train"].tolist(), range(data.vocab_size)
    counts, pairs, followed = Counter(train), Counter(pairwise(train)), Counter(train[:-1])
    unigram = [(counts[token] + 1) / (len(train) + len(vocab)) for token in vocab]
    table = [
        [(pairs[a, b] + strength * unigram[b]) / (followed[a] + strength) for b in vocab]
        for a in vocab
    ]
    return np.array(unigram), np.array(table)


def nats_by(table, data, split):
    tokens = [data.bos_id, *data.splits[split].tolist()]
    return -sum(math.log(table[pair]) for pair in pairwise(tokens))


STRENGTHS = (10, 30, 100, 300, 1000, 3000)  # those that are tried


@pytest.fixture(scope="module")
def odd_corpus(corpus):
    """A shuffled test split, which ends with an id that training never has and two others."""
    last = corpus.vocab_size
    shuffled = np.random.default_rng(3).permutation(corpus.splits["test"])
    splits = {"train": corpus.splits["train"][:1500], "test": [*shuffled, last, 0, 1]}
    return with_splits(replace(corpus, vocab_size=last + 1), **splits)


def test_baselines_equal_brute_force(odd_corpus):
    data, tables = odd_corpus, {s: bigram_table(odd_corpus, s) for s in STRENGTHS}

    def best(split):
        return min(STRENGTHS, key=lambda strength: nats_by(tables[strength][1], data, split))

    chosen = {split: best(split) for split in ("val", "test")}
    assert chosen["val"] != chosen["test"], f"{chosen}: this could not show which split chooses"
    unigram, bigram = tables[chosen["val"]]
    assert bigram.sum(1) == pytest.approx(np.ones(data.vocab_size)), "no probabilities"
    for split, tokens in data.splits.items():
        expected = {"uniform": len(tokens) * math.log(data.vocab_size)}
        expected["unigram"] = -np.log(unigram[tokens]).sum()
        expected["bigram"] = nats_by(bigram, data, split)
        scores = evaluate_baselines(data, split)
        assert {name: score.nats for name, score in scores.items()} == pytest.approx(expected)
        sizes = (len(tokens), data.bytes[split], data.words[split])
        assert all((s.tokens, s.bytes, s.words) == sizes for s in scores.values())


@pytest.mark.parametrize("chunk", [1, 7, 1499, 1500])
def test_baselines_do_not_depend_on_the_chunk(odd_corpus, monkeypatch, chunk):
    whole = {split: evaluate_baselines(odd_corpus, split) for split in odd_corpus.splits}
    monkeypatch.setattr("data.ngrams.CHUNK", chunk)
    assert {split: evaluate_baselines(odd_corpus, split) for split in odd_corpus.splits} == whole


# ----- estimates -----
def test_estimate_is_the_mean_over_its_windows_one_by_one(lively, random_text, config):
    model, config = lively(), replace(config, block_size=BLOCK, batch_size=30, eval_iters=50)
    tokens = load_tokens(random_text(400).splits["test"], "cpu")
    state = torch.get_rng_state()
    estimate = helpers.estimate_loss(model, tokens, config, CPU)
    assert torch.equal(torch.get_rng_state(), state), "an estimate moved the random numbers"
    starts = helpers.sample_starts(400, config, -1, 50).flatten().split(1)
    expected = np.mean([model(*get_batch(tokens, start, BLOCK)).item() for start in starts])
    assert estimate == pytest.approx(expected, rel=1e-6), f"{estimate}, one by one {expected}"


def test_process_without_a_window_adds_nothing_to_an_estimate(lively, random_text, monkeypatch):
    """As the second of two, where an estimate is of one window."""
    config = helpers.TrainConfig(block_size=BLOCK, batch_size=1, eval_iters=1)
    tokens = load_tokens(random_text(400).splits["test"], "cpu")
    monkeypatch.setattr(helpers, "rank", lambda: 1)
    monkeypatch.setattr(helpers, "world_size", lambda: 2)
    monkeypatch.setattr(helpers, "all_reduce", lambda total: total)
    assert helpers.estimate_loss(lively(), tokens, config, CPU) == 0


# ----- trained models -----
@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """A run that has learnt the corpus a little, and the model at its end."""
    shape = dict(batch_size=8, block_size=16, n_layer=2, n_head=2, n_embd=32, dropout=0.0)
    rest = dict(learning_rate=1e-2, max_iters=250, warmup_iters=5, eval_interval=50, eval_iters=4)
    config = helpers.TrainConfig(**shape, **rest)
    model, folder = helpers.make_model(config, corpus), tmp_path_factory.mktemp("trained")
    return helpers.train_model(model, corpus, config, folder, precision=CPU), model


@pytest.mark.parametrize("split", ["val", "test"])
def test_more_context_and_more_training_evaluate_better(trained, corpus, split):
    _, model = trained
    windows, sliding = (evaluate(model, corpus, split, stride).loss for stride in (None, 4))
    bigram = evaluate_baselines(corpus, split)["bigram"].loss
    assert sliding < windows < bigram, f"sliding {sliding}, windows {windows}, bigram {bigram}"


def test_saved_models_evaluate_as_those_in_memory(trained, corpus):
    run, model = trained
    last = helpers.load_model(run.folder / "last.pt", data=corpus)
    for stride in (None, 4):
        expected = evaluate(model, corpus, "test", stride)
        assert evaluate(last, corpus, "test", stride) == expected
    tokens = load_tokens(corpus.splits["val"], "cpu")
    estimate = helpers.estimate_loss(run.load("best"), tokens, run.config, CPU)
    assert estimate == pytest.approx(run.best["val_loss"], abs=1e-6)


# ----- an ensemble, and learning while evaluating -----
def test_an_ensemble_averages_probabilities():
    p = torch.tensor([[0.5, 0.1, 1e-30], [0.1, 0.3, 1e-3]])
    found, expected = helpers.ensemble_losses(-p.log()), -p.double().mean(0).log()
    assert off_by(found, expected) < 1e-6, f"{found}, not {expected}"


def dynamic_losses(model, data, lr=0.01, precision=CPU, n_tokens=None):
    squares = squared_gradients(model, data, precision, n_tokens=60)
    return dynamic_evaluation(model, data, "test", lr, squares, precision, n_tokens)


METHODS = {
    "windows": lambda model, data: token_losses(model, data, "test"),
    "sliding": lambda model, data: token_losses(model, data, "test", 5),
    "dynamic": lambda model, data: dynamic_losses(model, data, n_tokens=60),
}


@pytest.mark.parametrize("method", METHODS)
def test_no_later_token_moves_an_earlier_loss(lively, corpus, switches, method):
    model, tokens = lively(corpus.vocab_size, scale=0.2, **switches), corpus.splits["test"]
    before = METHODS[method](model, corpus)
    for changed in (0, 3, 20, 33, 59):
        other = tokens.copy()
        other[changed] = (other[changed] + 1) % corpus.vocab_size
        moved = METHODS[method](model, with_splits(corpus, test=other)) != before
        assert not moved[:changed].any(), f"{changed} moved {moved.nonzero().flatten()[0]}"
        assert moved[changed : changed + 2].all(), f"{changed} counts for nothing"


def test_dynamic_evaluation_scores_first_and_learns_then(lively, corpus, switches):
    model = lively(corpus.vocab_size, block_size=16, scale=0.2, **switches)  # an eighth: 2 tokens
    weights = copy.deepcopy(model.state_dict())
    still, learning = (dynamic_losses(model, corpus, lr) for lr in (1e-12, 0.003))
    static = token_losses(model, corpus, "test", stride=2)
    assert off_by(still, static) < 1e-4, "without learning it is no sliding window"
    assert torch.equal(learning[:2], still[:2]), "learnt from the first tokens before their losses"
    assert learning.mean() < static.mean() - 0.05, "nothing is learnt from a text of few words"
    part = dynamic_losses(model, corpus, 0.003, n_tokens=33)
    assert torch.equal(part, learning[:33]), "a part is not evaluated as in the whole"
    for name, value in model.state_dict().items():
        assert torch.equal(weights[name], value), f"{name} of the model itself was changed"


def test_dynamic_evaluation_steps_as_written_out(lively, corpus):
    """Each stretch's gradient over the root of what the training text's squares have become."""
    model = lively(corpus.vocab_size, block_size=16, scale=0.2)
    squares = squared_gradients(model, corpus, CPU, n_tokens=60)
    found = dynamic_evaluation(model, corpus, "test", 0.01, squares, CPU, n_tokens=6)
    text = torch.tensor([corpus.bos_id, *corpus.splits["test"][:6].tolist()])
    parameters, expected = list(model.parameters()), []
    for first in (0, 2, 4):
        losses = F.cross_entropy(model(text[None, :6])[0], text[1:], reduction="none")
        losses = losses[first : first + 2]
        expected += losses.tolist()
        gradients = torch.autograd.grad(losses.mean(), parameters)
        for p, square, g in zip(parameters, squares, gradients, strict=True):
            square.mul_(0.9999).add_(1e-4 * g * g)
            p.data -= 0.01 * g / (square.sqrt() + 1e-8)
    assert off_by(found, torch.tensor(expected)) < 1e-3, f"{found}, not {expected}"


def test_squared_gradients_are_a_mean_over_the_training_text(lively, corpus):
    """In stretches of two tokens here, the last of which is not whole."""
    model = lively(corpus.vocab_size, block_size=16, scale=0.2)
    text = torch.tensor([corpus.bos_id, *corpus.splits["train"][:5].tolist()])
    parameters = list(model.parameters())
    expected = [torch.zeros_like(p) for p in parameters]
    for first in (0, 2, 4):
        losses = F.cross_entropy(model(text[None, :5])[0], text[1:], reduction="none")
        gradients = torch.autograd.grad(losses[first : first + 2].sum() / 2, parameters)
        expected = [e + g * g / 3 for e, g in zip(expected, gradients, strict=True)]
    for square, e in zip(squared_gradients(model, corpus, CPU, 5), expected, strict=True):
        torch.testing.assert_close(square, e, rtol=1e-4, atol=1e-9)


# ----- CUDA -----
@pytest.mark.parametrize("stride", [None, 4])
def test_cuda_losses_equal_the_cpu_s(trained, corpus, cuda, stride):
    run, model = trained
    expected = token_losses(model, corpus, "test", stride)
    found = token_losses(run.load("last", cuda), corpus, "test", stride)
    assert off_by(found, expected) < 1e-3, off_by(found, expected)


def test_cuda_dynamic_evaluation_equals_the_cpu_s(lively, corpus, cuda):
    """There most of it is one graph; Adam without first moments steps by signs at first."""
    model = lively(corpus.vocab_size, block_size=16, scale=0.2, pointer=True, rotary=True)
    half = helpers.choose_precision(cuda)
    full = replace(half, dtype=torch.float32)

    def losses(lr, precision):
        return dynamic_losses(model, corpus, lr, precision, n_tokens=60)

    expected, found = losses(1e-3, CPU), losses(1e-3, full)
    assert off_by(found, expected) < 1e-3, off_by(found, expected)
    assert off_by(losses(1e-12, full), found) > 1e-2, "nothing was learnt, so nothing was compared"
    assert off_by(losses(1e-3, half).mean(), expected.mean()) < 1e-2, f"in {half.dtype}"
