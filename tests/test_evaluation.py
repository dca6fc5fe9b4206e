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
from helpers import Precision, Score, choose_precision, estimate_loss, make_model, score_baselines, score_split, train_model

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
def test_scores_equal_token_by_token_with_every_switch(lively, switches, random_text, stride):
    model, data = lively(**switches), random_text(3 * BLOCK + 1)
    assert score_split(model, data, "test", stride).nats == pytest.approx(token_by_token(model, data, "test", stride or BLOCK), rel=1e-5)


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
            found = torch.cat([helpers.nats_of(model, *part) for part in zip(idx.split(rows), targets.split(rows), strict=True)], dim=1)[0]
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


# --------------------------------------------------------------- among words, as an ensemble, and while learning


LETTERS = " abc\n"
WORDS = (" a", " ab", " abc", " ba", " cab", " \n", " c")


@pytest.fixture
def spelt(corpus):
    """Texts of a few words spelt letter by letter, in which some words begin others."""
    rng = np.random.default_rng(3)
    splits = {name: np.array([LETTERS.index(c) for word in rng.choice(WORDS, count) for c in word], dtype=np.uint16)
              for name, count in (("train", 60), ("val", 20), ("test", 25))}  # fmt: skip
    tokenizer = replace_namespace(corpus.tokenizer, decode=lambda ids: "".join(LETTERS[i] for i in ids))
    return replace(corpus, vocab_size=len(LETTERS), splits=splits, tokenizer=tokenizer, first_context=LETTERS.index("\n"))


def replace_namespace(namespace, **values):
    return type(namespace)(**{**vars(namespace), **values})


def test_nats_among_words_equal_brute_force(lively, spelt):
    model, words = lively(len(LETTERS), pointer=True), helpers.word_tree(spelt, "cpu")
    among_all, found = helpers.token_nats(model, spelt, "test", 4, words)
    plain, text = [], "".join(LETTERS[i] for i in spelt.splits["test"])
    inputs = [spelt.first_context, *spelt.splits["test"].tolist()]
    begun = ""
    for i, letter in enumerate(text):
        goes_on = {word[len(begun)] for word in WORDS if word.startswith(begun) and len(word) > len(begun)} if begun else set()
        allowed = goes_on | ({" "} if begun in ("", *WORDS) else set())
        start = max(0, i // 4 * 4 - (BLOCK - 4))
        p = model(torch.tensor([inputs[start : i + 1]]))[0][0, -1].double().softmax(-1)
        plain.append(-(p[LETTERS.index(letter)] / sum(p[LETTERS.index(other)] for other in allowed)).log().item())
        begun = letter if letter == " " else begun + letter
    assert np.allclose(found.detach().numpy(), plain, atol=1e-5), np.abs(found.detach().numpy() - plain).max()
    assert torch.allclose(among_all, helpers.token_nats(model, spelt, "test", 4)[0], atol=1e-5), "the words moved what is among all tokens"
    assert found.sum() < among_all.sum(), "fewer to choose from cannot cost more"


def test_no_word_tree_where_a_split_has_a_word_of_its_own(spelt):
    other = np.array([LETTERS.index(c) for c in " bb a"], dtype=np.uint16)
    assert helpers.word_tree(spelt, "cpu") is not None
    assert helpers.word_tree(replace(spelt, splits={**spelt.splits, "val": other}), "cpu") is None
    with pytest.raises(ValueError, match="' bb' of the val split"):
        helpers.word_tree(spelt, "cpu").places(replace(spelt, splits={"val": other}), "val")


def test_an_ensemble_averages_probabilities():
    p = torch.tensor([[0.5, 0.1, 1e-30], [0.1, 0.3, 1e-3]])
    assert torch.allclose(helpers.mixed(-p.log()).exp(), 1 / p.double().mean(0), rtol=1e-5)


def test_shares_of_known_words_leave_the_prompts_out(spelt):
    prompts, good, bad = ("bb c", " a"), ("bb c ab cab", " a ba"), ("bb c ab bb", " a bb aab")
    assert helpers.shares_of_known_words(prompts, (good, bad, prompts), spelt) == [1, 1 / 4, 0]


METHODS = {
    "blocks": lambda model, data, words: helpers.token_nats(model, data, "test")[0],
    "sliding": lambda model, data, words: helpers.token_nats(model, data, "test", 4)[0],
    "words": lambda model, data, words: helpers.token_nats(model, data, "test", 4, words)[1],
    "ensemble": lambda model, data, words: helpers.mixed(torch.cat([helpers.token_nats(m, data, "test", 4) for m in (model, model)])),
    "dynamic": lambda model, data, words: helpers.dynamic_nats(model, data, "test", 0.01, CPU)[0],
    "dynamic among words": lambda model, data, words: helpers.dynamic_nats(model, data, "test", 0.01, CPU, words)[1],
}


@pytest.mark.parametrize("method", METHODS)
def test_no_later_token_moves_an_earlier_score(lively, spelt, switches, method):
    """Whole words are changed, so that both texts have scores among words too."""
    model, words = lively(len(LETTERS), scale=0.2, **switches), helpers.word_tree(spelt, "cpu")
    tokens = spelt.splits["test"]
    before = METHODS[method](model, spelt, words)
    for changed in (3, 20, 33):
        begins = np.flatnonzero(tokens[:changed] == 0)[-1]
        spelt_a = [LETTERS.index(c) for c in " cab a ba"]
        other = replace(spelt, splits={**spelt.splits, "test": np.array([*tokens[:begins], *spelt_a], dtype=np.uint16)})
        after = METHODS[method](model, other, words)
        assert torch.equal(after[:begins], before[:begins]), f"changed at {begins}: {(after[:begins] != before[:begins]).nonzero().flatten()}"


@pytest.mark.parametrize("switched", [{}, {"pointer": True, "rotary": True}])
def test_dynamic_evaluation_scores_first_and_learns_then(lively, spelt, switched):
    model = lively(len(LETTERS), block_size=16, scale=0.2, **switched)  # an eighth: 2 tokens
    weights = copy.deepcopy(model.state_dict())
    words = helpers.word_tree(spelt, "cpu")
    (still, within), (learning, _) = (helpers.dynamic_nats(model, spelt, "test", rate, CPU, words) for rate in (1e-12, 0.02))
    (static,), (_, static_within) = (helpers.token_nats(model, spelt, "test", 2, tree) for tree in (None, words))
    assert torch.allclose(still, static, atol=1e-4), "without learning it is no sliding window"
    assert torch.allclose(within, static_within, atol=1e-4), "among words it is no sliding window"
    assert torch.equal(learning[:2], still[:2]), "the first tokens were learnt from before they were scored"
    assert learning.mean() < static.mean() - 0.05, "nothing is learnt from a text of seven words"
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items()), "the model itself was changed"


def test_the_rate_of_dynamic_evaluation_is_the_best_on_validation(lively, spelt):
    """No other split is there to read. One rate learns nothing, one forgets all."""
    data = replace(spelt, splits={"val": np.tile(spelt.splits["train"], 2)})
    assert helpers.choose_rate(lively(len(LETTERS), block_size=16, scale=0.2), data, CPU, rates=(1e-12, 0.02, 5.0)) == 0.02


def test_cuda_dynamic_evaluation_equals_the_cpu_s(lively, spelt, cuda):
    """On the card from the fourth eighth on as one graph; Adam without first moments steps by signs where it has seen little."""
    model, words = lively(len(LETTERS), block_size=16, scale=0.2, pointer=True, rotary=True), helpers.word_tree(spelt, "cpu")
    expected = helpers.dynamic_nats(model, spelt, "test", 1e-3, CPU, words)
    model, words, half = model.to(cuda), helpers.word_tree(spelt, cuda), choose_precision(cuda)
    full = replace(half, dtype=torch.float32)
    found = helpers.dynamic_nats(model, spelt, "test", 1e-3, full, words).cpu()
    assert torch.allclose(found, expected, atol=1e-3), (found - expected).abs().max()
    still = helpers.dynamic_nats(model, spelt, "test", 1e-12, full).cpu()
    assert (found[0] - still[0]).abs().max() > 1e-2, "nothing was learnt, so nothing was compared"
    found = helpers.dynamic_nats(model, spelt, "test", 1e-3, half, words).cpu()
    assert torch.allclose(found.mean(1), expected.mean(1), atol=5e-3), f"{found.mean(1)} in {half.dtype}, {expected.mean(1)} in float32"


# ------------------------------------------------------------------------------------------- the sensitivity study


def test_a_study_changes_one_value_at_equal_tokens(settings, corpus):
    studied = {"learning_rate": (1e-3, 3e-3), "batch_size": (2, 4), "n_embd": (8, 16), "dropout": (0.0, 0.5)}
    for parameter, value, changed in helpers.one_away(settings, 0.5, studied):
        differing = {f for f in vars(settings) if getattr(settings, f) != getattr(changed, f)}
        assert getattr(changed, parameter) == value
        assert differing <= {parameter, "max_iters", "eval_interval", "warmup_iters", "min_lr", "n_head"}, differing
        assert changed.max_iters * changed.tokens_per_step == 0.5 * settings.max_iters * settings.tokens_per_step
    study = helpers.sensitivity_study([corpus], [settings], CPU, share=0.5, seeds=(1, 2), studied=studied)
    assert len(study["rows"]) == 2 * sum(map(len, studied.values()))
    means = helpers.study_means(study)["Tiny sentences"]
    value, loss, half, _ = means["batch_size"][0]
    pair = [row["loss"] for row in study["rows"] if (row["parameter"], row["value"]) == ("batch_size", 2)]
    assert (value, loss, half) == (2, pytest.approx(sum(pair) / 2), pytest.approx(abs(pair[0] - pair[1]) / 2))
    text = helpers.sensitivity_text(study)
    assert "Tiny sentences" in text and all(f"`{parameter}`" in text for parameter in studied), text


def test_a_study_is_read_again_and_a_missing_one_is_one_sentence(settings, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(helpers, "RESULTS", tmp_path)
    monkeypatch.setattr(helpers, "STUDIED", {"dropout": (0.0, 0.5)})
    with pytest.raises(ValueError, match="sensitivity.json is missing.*NANOGPT_SENSITIVITY=1"):
        helpers.sensitivity([corpus], [settings], CPU)
    monkeypatch.setenv("NANOGPT_SENSITIVITY", "1")
    made = helpers.sensitivity([corpus], [replace(settings, max_iters=10)], CPU)
    monkeypatch.delenv("NANOGPT_SENSITIVITY")
    assert helpers.sensitivity([corpus], [settings], CPU) == made and made["made by"]["code"] == helpers.code_sum()
