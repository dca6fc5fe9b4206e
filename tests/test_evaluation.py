"""Evaluation: exact scores against brute force, their units, baselines, estimates, and scores of saved models.

python -m pytest tests/test_evaluation.py
"""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import helpers
from helpers import Precision, Score, estimate_loss, make_model, score_baselines, score_split, train_model

CPU = Precision(torch.device("cpu"), torch.float32, "for tests")
BLOCK = 12  # of the lively model


def tokens_of(length, vocab_size=23, seed=0):
    return np.random.default_rng(seed).integers(vocab_size, size=length).astype(np.uint16)


@pytest.fixture
def random_text(corpus):
    """Makes data whose test split is `length` random tokens of the lively model's vocabulary."""

    def make(length, seed=0, first_context=5):
        return replace(
            corpus,
            vocab_size=23,
            splits={
                "train": tokens_of(300, seed=90),
                "val": tokens_of(80, seed=91),
                "test": tokens_of(length, seed=seed),
            },
            bytes={split: 2 * length for split in ("train", "val", "test")},
            first_context=first_context,
        )

    return make


def token_by_token(model, data, split, stride):
    """Summed nats in float64, one forward pass a token."""
    model = copy.deepcopy(model).double().eval()
    block, total = model.config.block_size, 0.0
    tokens = data.splits[split].tolist()
    inputs = [data.first_context, *tokens]
    for i, token in enumerate(tokens):
        first = i // stride * stride  # the first token that this one's window scores
        start = max(0, first - (block - stride))
        logits, _ = model(torch.tensor([inputs[start : i + 1]]))
        total -= logits[0, -1].log_softmax(-1)[token].item()
    return total


# ------------------------------------------------------------------------------------------------ whole splits


@pytest.mark.parametrize("stride", [None, 1, BLOCK // 4, BLOCK - 1, BLOCK])
@pytest.mark.parametrize("length", [1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK - 1, 3 * BLOCK, 3 * BLOCK + 1])
def test_scores_equal_token_by_token_in_float64(lively, random_text, length, stride):
    model, data = lively(), random_text(length)
    score = score_split(model, data, "test", stride)
    expected = token_by_token(model, data, "test", stride or BLOCK)
    assert score.nats == pytest.approx(expected, rel=1e-5), f"{score.nats} nats, brute force {expected}"
    assert (score.tokens, score.bytes) == (length, 2 * length)


@pytest.mark.parametrize("stride", [None, 5])
def test_every_token_counts_once(lively, random_text, stride):
    """Under a uniform model each token costs ln V, wherever it stands."""
    model = lively()
    for parameter in model.parameters():
        parameter.data.zero_()
    for length in (1, 11, 12, 13, 100):
        score = score_split(model, random_text(length), "test", stride)
        assert score.nats == pytest.approx(length * math.log(23), rel=1e-6), score.nats / math.log(23)
        assert score.perplexity == pytest.approx(23, rel=1e-6), score.perplexity


def test_a_long_text_scores_as_its_parts(lively, random_text):
    """Whole blocks see nothing of each other, so how they are grouped for the forward pass cannot matter."""
    model = lively(n_layer=1)
    whole = random_text(BLOCK * 3000 + 7)
    tokens, cut = whole.splits["test"], BLOCK * 1001
    head = replace(whole, splits={"test": tokens[:cut]})
    tail = replace(whole, splits={"test": tokens[cut:]}, first_context=int(tokens[cut - 1]))
    nats = [score_split(model, data, "test").nats for data in (whole, head, tail)]
    assert nats[0] == pytest.approx(nats[1] + nats[2], rel=1e-7), f"{nats[0]} is not {nats[1]} + {nats[2]}"


def test_nats_do_not_depend_on_the_windows_together(lively):
    model = lively().eval()
    generator = torch.Generator().manual_seed(1)
    idx, targets = (torch.randint(23, (25, BLOCK), generator=generator) for _ in range(2))
    with torch.no_grad():
        expected = -model(idx, targets)[0].double().log_softmax(-1).gather(-1, targets[..., None]).flatten()
        for rows in (1, 7, 25):
            found = torch.cat([helpers.nats_of(model, *part) for part in zip(idx.split(rows), targets.split(rows), strict=True)])
            assert torch.allclose(found.double(), expected, atol=1e-5), f"{rows} windows together"


@pytest.mark.parametrize("training", [True, False])
def test_scoring_restores_the_mode_and_has_no_dropout(lively, random_text, settings, training):
    model, data = lively(dropout=0.5), random_text(60)
    expected = score_split(model.eval(), data, "test").nats
    model.train(training)
    assert score_split(model, data, "test").nats == expected, "dropout acted while scoring"
    tokens = helpers.tokens_on("cpu", data.splits["test"])
    estimate_loss(model, tokens, replace(settings, block_size=BLOCK), CPU)
    assert all(module.training == training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("stride", [-1, 0, BLOCK + 1])
def test_a_stride_that_would_skip_tokens_is_refused(lively, random_text, stride):
    with pytest.raises(ValueError, match=f"stride.*{stride}"):
        score_split(lively(), random_text(30), "test", stride)


# ------------------------------------------------------------------------------------------------------- units


def test_units_of_a_score():
    score = Score(nats=100 * math.log(8), tokens=100, bytes=300, words=50)
    assert score.loss == pytest.approx(math.log(8))
    assert score.perplexity == pytest.approx(8)
    assert score.bits_per_byte == pytest.approx(1)  # 3 bits a token of 3 bytes
    assert score.word_perplexity == pytest.approx(64)  # 2 tokens a word
    assert Score(1.0, 1, 1, None).word_perplexity is None


# --------------------------------------------------------------------------------------------------- baselines


def bigram_by_hand(data, strength):
    """Table (V, V) of p(next | before) by loops, with the unigrams that it leans on."""
    train, vocab = data.splits["train"].tolist(), data.vocab_size
    unigram = [(train.count(token) + 1) / (len(train) + vocab) for token in range(vocab)]
    pairs = list(zip(train[:-1], train[1:], strict=True))
    table = [
        [(pairs.count((a, b)) + strength * unigram[b]) / (train[:-1].count(a) + strength) for b in range(vocab)]
        for a in range(vocab)
    ]
    return np.array(unigram), np.array(table)


def nats_by_hand(data, split, table):
    tokens = data.splits[split].tolist()
    return -sum(
        math.log(table[before][token]) for before, token in zip([data.first_context, *tokens[:-1]], tokens, strict=True)
    )


STRENGTHS = (10, 30, 100, 300, 1000, 3000)  # those that are tried


@pytest.fixture(scope="module")
def tables(corpus):
    """A corpus with a symbol that training never holds, and its bigram tables by strength."""
    data = replace(corpus, vocab_size=corpus.vocab_size + 1, splits=dict(corpus.splits))
    data.splits["train"] = corpus.splits["train"][:1500]
    data.splits["test"] = np.append(np.random.default_rng(3).permutation(corpus.splits["test"]), corpus.vocab_size)
    data.splits["test"] = np.append(data.splits["test"], [0, 1]).astype(np.uint16)
    return data, {strength: bigram_by_hand(data, strength) for strength in STRENGTHS}


def test_baselines_equal_brute_force(tables):
    data, by_strength = tables
    chosen = {
        split: min(STRENGTHS, key=lambda strength: nats_by_hand(data, split, by_strength[strength][1]))
        for split in ("val", "test")
    }
    assert chosen["val"] != chosen["test"], f"both splits like {chosen}: this could not show which one chooses"
    unigram, bigram = by_strength[chosen["val"]]
    for split in ("train", "val", "test"):
        tokens = data.splits[split]
        expected = {
            "uniform": len(tokens) * math.log(data.vocab_size),
            "unigram": -np.log(unigram[tokens]).sum(),
            "bigram": nats_by_hand(data, split, bigram),
        }
        scores = score_baselines(data, split)
        assert {name: score.nats for name, score in scores.items()} == pytest.approx(expected, rel=1e-9), split
        for score in scores.values():
            assert (score.tokens, score.bytes, score.words) == (len(tokens), data.bytes[split], data.words[split])


def test_bigram_probabilities_add_up_to_one(tables):
    """Scores of one-token texts, over every possible token, are a distribution."""
    data, _ = tables
    for before in (0, 3, data.vocab_size - 1):
        probabilities = []
        for token in range(data.vocab_size):
            one = {**data.splits, "test": np.array([token], dtype=np.uint16)}
            score = score_baselines(replace(data, splits=one, first_context=before), "test")
            probabilities.append([math.exp(-score[name].nats) for name in ("uniform", "unigram", "bigram")])
        assert np.sum(probabilities, axis=0) == pytest.approx([1, 1, 1]), np.sum(probabilities, axis=0)


def test_the_test_split_moves_no_other_score(tables):
    data, _ = tables
    other = replace(data, splits={**data.splits, "test": data.splits["val"][:50]})
    for split in ("train", "val"):
        assert score_baselines(data, split) == score_baselines(other, split)


def test_uniform_baseline_has_the_vocabulary_as_perplexity(corpus):
    assert score_baselines(corpus, "test")["uniform"].perplexity == pytest.approx(corpus.vocab_size, rel=1e-12)


# --------------------------------------------------------------------------------------------------- estimates


def test_estimate_is_the_mean_over_its_windows_one_by_one(lively, random_text, settings):
    model = lively(n_layer=1)
    settings = replace(settings, block_size=BLOCK, batch_size=30, eval_iters=50)
    tokens = helpers.tokens_on("cpu", random_text(400).splits["test"])
    estimate = estimate_loss(model, tokens, settings, CPU)
    starts = helpers.draw_starts(400, settings, -1, 50).flatten()
    losses = {
        start: model(*helpers.get_batch(tokens, torch.tensor([start]), BLOCK))[1].item()
        for start in set(starts.tolist())
    }
    expected = np.mean([losses[start] for start in starts.tolist()])
    assert estimate == pytest.approx(expected, rel=1e-6), f"{estimate}, one by one {expected}"


def test_estimate_is_the_same_twice_and_draws_nothing(lively, random_text, settings):
    model, settings = lively(), replace(settings, block_size=BLOCK)
    tokens = helpers.tokens_on("cpu", random_text(200).splits["test"])
    state = torch.get_rng_state()
    first = estimate_loss(model, tokens, settings, CPU)
    assert torch.equal(torch.get_rng_state(), state), "evaluation moved the random stream"
    torch.manual_seed(1)
    assert estimate_loss(model, tokens, settings, CPU) == first


# ------------------------------------------------------------------------------------------------ trained models


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """A model that has learnt the corpus a little, and the folder of its run."""
    folder = tmp_path_factory.mktemp("trained")
    settings = helpers.Settings(
        batch_size=8, block_size=16, n_layer=2, n_head=2, n_embd=32, dropout=0.0, learning_rate=1e-2, min_lr=1e-3,
        max_iters=250, warmup_iters=5, eval_interval=50, eval_iters=4,
    )  # fmt: skip
    model = make_model(settings, corpus)
    train_model(model, corpus, settings, folder, precision=CPU)
    return model, folder


@pytest.mark.parametrize("split", ["val", "test"])
def test_more_context_and_more_training_score_better(trained, corpus, split):
    model, _ = trained
    blocks = score_split(model, corpus, split)
    sliding = score_split(model, corpus, split, stride=4)
    bigram = score_baselines(corpus, split)["bigram"]
    assert sliding.loss < blocks.loss < bigram.loss, (
        f"sliding {sliding.loss}, blocks {blocks.loss}, bigram {bigram.loss}"
    )
    assert sliding.tokens == blocks.tokens == len(corpus.splits[split])


@pytest.mark.parametrize("stride", [None, 4])
def test_saved_models_score_as_those_in_memory(trained, corpus, stride):
    model, folder = trained
    expected = score_split(model, corpus, "test", stride).loss
    last = score_split(
        helpers.load_model(folder / "last.pt", vocab_size=corpus.vocab_size), corpus, "test", stride
    ).loss
    assert last == pytest.approx(expected, abs=1e-6), f"{last} reloaded, {expected} in memory"


def test_the_saved_best_model_gives_its_best_estimate(trained, corpus):
    _, folder = trained
    checkpoint = helpers.load_checkpoint(folder / "ckpt.pt")
    best = helpers.load_model(folder / "ckpt.pt")
    tokens = helpers.tokens_on("cpu", corpus.splits["val"])
    estimate = estimate_loss(best, tokens, helpers.Settings(**checkpoint["settings"]), CPU)
    assert estimate == pytest.approx(checkpoint["best_val_loss"], abs=1e-6), (estimate, checkpoint["best_val_loss"])


# -------------------------------------------------------------------------------------------------------- CUDA


@pytest.mark.parametrize("stride", [None, 4])
def test_cuda_scores_equal_the_cpus(trained, corpus, cuda, stride):
    model, folder = trained
    expected = score_split(model, corpus, "test", stride).loss
    loss = score_split(helpers.load_model(folder / "last.pt", cuda), corpus, "test", stride).loss
    assert loss == pytest.approx(expected, abs=1e-5), f"{loss} on the card, {expected} on the CPU"
