"""The model: causality, agreement with attention written out, initialisation, names, optimizer groups, generation.

python -m pytest tests/test_model.py
"""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from model import (
    GPT, ChunkedCrossEntropy, FusedCrossEntropy, GPTConfig, Muon, Sampler, fused_loss_obstacle, orthogonal, turn, turns,
)  # fmt: skip


def far_apart(a, b):
    """Largest absolute difference, for failure messages."""
    return (a.double() - b.double()).abs().max().item()


# ------------------------------------------------------------------------------------------------ forward pass


def test_a_later_token_changes_no_earlier_logit(lively, switches):
    model = lively(**switches)
    idx = torch.randint(23, (3, 12), generator=torch.Generator().manual_seed(1))
    before, _ = model(idx, idx)
    for position in range(12):
        changed = idx.clone()
        changed[:, position] = (changed[:, position] + 1) % 23
        after, _ = model(changed, changed)
        assert torch.equal(after[:, :position], before[:, :position]), (
            f"token {position} moved earlier logits by {far_apart(after[:, :position], before[:, :position]):g}"
        )
        assert not torch.equal(after[:, position], before[:, position]), (
            f"token {position} does not reach its own logits"
        )


def layer_norm(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + (0 if bias is None else bias)


def written_out(model, idx):
    """Logits of the whole model in float64, from its parameters alone, one head and one position at a time."""
    config = model.config
    weights = {name: value.detach().double() for name, value in model.named_parameters(remove_duplicate=False)}

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    def norm(x, name):
        return layer_norm(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def attend(x, name):
        q, k, v = linear(x, f"{name}.c_attn").split(config.n_embd, dim=-1)
        width = config.n_embd // config.n_head
        out = torch.zeros_like(x)
        for head in range(config.n_head):
            part = slice(head * width, (head + 1) * width)
            for t in range(x.size(0)):
                scores = k[: t + 1, part] @ q[t, part] / math.sqrt(width)
                out[t, part] = (scores.exp() / scores.exp().sum()) @ v[: t + 1, part]
        return linear(out, f"{name}.c_proj")

    def widen(x, name):
        inner = linear(x, f"{name}.c_fc")
        return linear(inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2))), f"{name}.c_proj")

    x = weights["transformer.wte.weight"][idx] + weights["transformer.wpe.weight"][: len(idx)]  # (T, C)
    for layer in range(config.n_layer):
        name = f"transformer.h.{layer}"
        x = x + attend(norm(x, f"{name}.ln_1"), f"{name}.attn")
        x = x + widen(norm(x, f"{name}.ln_2"), f"{name}.mlp")
    return norm(x, "transformer.ln_f") @ weights["lm_head.weight"].T


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n_head", [1, 4])
def test_agrees_with_attention_written_out_in_float64(lively, bias, n_head):
    model = lively(n_head=n_head, bias=bias)
    idx = torch.randint(23, (12,), generator=torch.Generator().manual_seed(2))
    expected = written_out(model, idx)
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.float64, 1e-10)):
        logits = model.to(dtype)(idx[None], idx[None])[0][0]
        assert far_apart(logits, expected) < tolerance, f"{dtype}: {far_apart(logits, expected):g} apart"


def test_loss_is_the_mean_over_the_targets_that_are_given(lively):
    model = lively()
    idx = torch.arange(12)[None]
    targets = (idx + 1).clone()
    targets[0, 5:] = -1
    logits, loss = model(idx, targets)
    expected = F.cross_entropy(logits[0, :5], targets[0, :5])
    assert torch.allclose(loss, expected), f"{loss.item()} is not {expected.item()}"


def test_without_targets_gives_the_last_position(lively, switches):
    model = lively(**switches)
    idx = torch.arange(8)[None]
    last, loss = model(idx)
    every, _ = model(idx, idx)
    assert last.shape == (1, 1, 23) and loss is None
    assert far_apart(last[:, 0], every[:, -1]) < 1e-5, far_apart(last[:, 0], every[:, -1])


@pytest.mark.parametrize("vocab_size", [65, 5000])
def test_untrained_loss_is_near_uniform(vocab_size):
    torch.manual_seed(3)
    model = GPT(GPTConfig(vocab_size, block_size=32, n_layer=3, n_head=4, n_embd=64, dropout=0.0))
    idx = torch.randint(vocab_size, (8, 33))
    loss = model(idx[:, :-1], idx[:, 1:])[1].item()
    assert abs(loss - math.log(vocab_size)) < 0.1, f"{loss:.4f}, ln V is {math.log(vocab_size):.4f}"


def test_overfits_one_batch():
    torch.manual_seed(4)
    model = GPT(GPTConfig(23, block_size=16, n_layer=2, n_head=2, n_embd=32, dropout=0.0))
    idx = torch.randint(23, (4, 17))
    optimizer = model.configure_optimizers(0.0, torch.tensor(1e-2), (0.9, 0.99), "cpu")
    for _ in range(150):
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05, f"loss {loss.item():.4f} after 150 steps on one batch"


def test_too_long_an_input_names_both_lengths(lively):
    with pytest.raises(ValueError, match="13.*12"):
        lively()(torch.zeros(1, 13, dtype=torch.long))


# ------------------------------------------------------------------------------------- parameters and optimizer


def nanogpt_shapes(config):
    """Names and shapes of nanoGPT's parameters."""
    C, V = config.n_embd, config.vocab_size
    shapes = {"transformer.wte.weight": (V, C), "transformer.wpe.weight": (config.block_size, C)}
    for layer in range(config.n_layer):
        block = f"transformer.h.{layer}"
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{block}.{norm}.weight": (C,), f"{block}.{norm}.bias": (C,)}
        for linear, rows, columns in (
            ("attn.c_attn", 3 * C, C),
            ("attn.c_proj", C, C),
            ("mlp.c_fc", 4 * C, C),
            ("mlp.c_proj", C, 4 * C),
        ):
            shapes |= {f"{block}.{linear}.weight": (rows, columns), f"{block}.{linear}.bias": (rows,)}
    shapes |= {"transformer.ln_f.weight": (C,), "transformer.ln_f.bias": (C,), "lm_head.weight": (V, C)}
    return shapes if config.bias else {name: shape for name, shape in shapes.items() if not name.endswith(".bias")}


@pytest.mark.parametrize("bias", [True, False])
def test_names_and_shapes_are_nanogpts(lively, bias):
    model = lively(bias=bias)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    expected = nanogpt_shapes(model.config)
    assert shapes == expected, f"differ in {sorted(set(shapes.items()) ^ set(expected.items()))}"


def test_state_goes_both_ways(lively):
    model, other = lively(seed=0), lively(seed=1)
    idx = torch.arange(12)[None]
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(model(idx)[0], other(idx)[0])


def test_output_layer_is_tied_to_the_embedding(lively):
    model = lively()
    assert model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()
    model.load_state_dict(lively(seed=1).state_dict())
    assert model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr(), "loading parted them"


def test_parameter_count_of_the_full_model():
    with torch.device("meta"):
        model = GPT(GPTConfig())
    counts = model.get_num_params(), model.get_num_params(non_embedding=False)
    assert counts == (29_946_240, 30_044_544), counts


def test_initial_spread_of_the_weights():
    torch.manual_seed(5)
    model = GPT(GPTConfig(500, block_size=64, n_layer=8, n_head=2, n_embd=64))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert parameter.abs().max() == 0, f"{name} does not start at 0"
        elif "ln_" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), f"{name} does not start at 1"
        else:
            expected = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
            assert abs(parameter.std() / expected - 1) < 0.05, f"{name}: std {parameter.std():.5f}, not {expected:.5f}"


@pytest.mark.parametrize("bias", [True, False])
def test_only_matrices_decay_and_each_parameter_is_stepped_once(lively, bias):
    model = lively(bias=bias)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    listed = sum(len(group["params"]) for group in optimizer.param_groups)
    assert listed == len(decays) == len(list(model.parameters())), f"{listed} listed, {len(decays)} different"
    for name, parameter in model.named_parameters():
        assert decays[id(parameter)] == (0.1 if parameter.dim() == 2 else 0.0), (
            f"{name} decays by {decays[id(parameter)]}"
        )


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"n_embd": 10, "n_head": 4}, "10.*4"),
        *(({field: 0}, f"{field} is 0") for field in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")),
        ({"n_layer": -2}, "n_layer is -2"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": math.nan}, "dropout is nan"),
    ],
)
def test_a_shape_that_cannot_be_built_is_refused_by_name(wrong, named):
    with pytest.raises(ValueError, match=named):
        GPTConfig(**wrong)


# -------------------------------------------------------------------------------------------------- generation


def naive_greedy(model, idx, new_tokens):
    """Greedy continuation, a whole forward pass over the cropped context for each token."""
    for _ in range(new_tokens):
        logits, _ = model(idx[:, -model.config.block_size :])
        idx = torch.cat([idx, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return idx


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("prompt", range(1, 16))
def test_generation_equals_a_naive_loop(lively, prompt, use_cache):
    model = lively()  # block 12
    continues_like_a_naive_loop(model, prompt, use_cache)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("prompt", [1, 5, 11, 12, 13, 20])
def test_generation_equals_a_naive_loop_with_every_switch(lively, switches, prompt, use_cache):
    continues_like_a_naive_loop(lively(**switches), prompt, use_cache)


def continues_like_a_naive_loop(model, prompt, use_cache):
    idx = torch.randint(23, (3, prompt), generator=torch.Generator().manual_seed(prompt))
    for new_tokens in (0, 1, 5, 20):
        made = model.generate(idx, new_tokens, temperature=0, use_cache=use_cache)
        expected = naive_greedy(model, idx, new_tokens)
        assert torch.equal(made, expected), f"{new_tokens} new tokens: {made.tolist()} is not {expected.tolist()}"
        assert new_tokens < 20 or len(set(made.flatten().tolist())) > 3, "too dull a text to tell anything"


def test_cached_sampling_equals_uncached(lively):
    model = lively(scale=0.2)
    idx = torch.tensor([[1, 2, 3]])
    texts = [
        model.generate(idx, 30, 0.8, 5, torch.Generator().manual_seed(6), use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert torch.equal(*texts), f"{texts[0].tolist()} is not {texts[1].tolist()}"


def test_generator_seed_decides_the_text(lively):
    model = lively(scale=0.2)
    idx = torch.tensor([[1, 2, 3]])
    first, again, other = (
        model.generate(idx, 40, generator=torch.Generator().manual_seed(seed)).tolist() for seed in (7, 7, 8)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored_and_dropout_is_off(lively, training):
    model = lively(dropout=0.5)
    idx = torch.tensor([[1, 2, 3]])
    expected = naive_greedy(model, idx, 20)
    model.train(training)
    made = model.generate(idx, 20, temperature=0)
    assert torch.equal(made, expected), "dropout acted while generating"
    assert all(module.training == training for module in model.modules())
    with pytest.raises(ValueError):
        model.generate(idx, 5, temperature=-1)
    assert model.training == training


def test_top_k_keeps_the_k_most_likely(lively):
    model = lively()
    idx = torch.tensor([[1, 2, 3]])
    assert torch.equal(model.generate(idx, 20, top_k=1), model.generate(idx, 20, temperature=0))
    beyond, every = (model.generate(idx, 20, top_k=k, generator=torch.Generator().manual_seed(9)) for k in (1000, None))
    assert torch.equal(beyond, every), "k beyond the vocabulary is not all of it"


@pytest.mark.parametrize("temperature, top_k", [(1.0, None), (0.7, None), (1.0, 4), (1.5, 40)])
def test_sampled_frequencies_are_the_softmax_probabilities(temperature, top_k):
    logits = torch.linspace(-1.5, 1.5, 9)
    kept = logits.clone()
    kept[: -top_k if top_k else 0] = -math.inf
    expected = (kept / temperature).softmax(-1) * 20_000
    sample = Sampler(temperature, top_k, torch.Generator().manual_seed(10))
    counts = sample(logits.expand(20_000, 1, 9)).flatten().bincount(minlength=9)
    assert counts[expected == 0].sum() == 0, f"sampled what top_k leaves out: {counts.tolist()}"
    possible = expected > 0
    chi_square = ((counts - expected)[possible].square() / expected[possible]).sum().item()
    freedom = possible.sum().item() - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom), (
        f"chi-square {chi_square:.1f} at {freedom} degrees: {counts.tolist()} for {expected.tolist()}"
    )


@pytest.mark.parametrize(
    "idx, wrong, named",
    [
        (torch.zeros(1, 0, dtype=torch.long), {}, "at least one token"),
        (torch.tensor([1, 2]), {}, r"shape \(2,\)"),
        (torch.tensor([[1, 23]]), {}, "id 23.*vocabulary of 23"),
        (torch.tensor([[-1, 2]]), {}, "id -1"),
        (torch.tensor([[1]]), {"temperature": -0.5}, "temperature -0.5"),
        (torch.tensor([[1]]), {"temperature": math.nan}, "temperature nan"),
        (torch.tensor([[1]]), {"top_k": 0}, "top_k 0"),
        (torch.tensor([[1]]), {"top_k": -3}, "top_k -3"),
        (torch.tensor([[1]]), {"max_new_tokens": -1}, "max_new_tokens -1"),
    ],
)
def test_senseless_requests_are_refused_by_name(lively, idx, wrong, named):
    with pytest.raises(ValueError, match=named):
        lively().generate(idx, **{"max_new_tokens": 3, **wrong})


# -------------------------------------------------------------------------------------------------------- CUDA


@pytest.mark.parametrize("prompt", [1, 12, 14])
def test_cuda_generation_equals_a_naive_loop(lively, cuda, prompt):
    model = lively().to(cuda)
    idx = torch.randint(23, (3, prompt), generator=torch.Generator().manual_seed(prompt)).to(cuda)
    expected = naive_greedy(model, idx, 60)  # past the block, and long enough to be captured as graphs
    for use_cache in (True, False):
        made = model.generate(idx, 60, temperature=0, use_cache=use_cache)
        assert torch.equal(made, expected), f"cache {use_cache}: {made.tolist()} is not {expected.tolist()}"


def test_cuda_generator_seed_decides_the_text(lively, cuda):
    model = lively(block_size=64, scale=0.2).to(cuda)
    idx = torch.tensor([[1, 2, 3]], device=cuda)
    first, again, other = (
        model.generate(idx, 100, generator=torch.Generator(cuda).manual_seed(seed)).tolist() for seed in (7, 7, 8)
    )
    assert first == again
    assert first != other


def test_cuda_logits_equal_the_cpus(lively, cuda):
    model = lively(vocab_size=65)  # not a multiple of 64: the output layer is padded there
    idx = torch.arange(12)[None]
    expected = model(idx, idx)[0].detach()
    logits = model.to(cuda)(idx.to(cuda), idx.to(cuda))[0].detach().cpu()
    assert logits.shape == expected.shape and far_apart(logits, expected) < 1e-3, far_apart(logits, expected)


# -------------------------------------------------------------------------------- switches beyond the plan


def test_all_ways_to_the_loss_agree(lively, switches):
    """The training's, the evaluation's and that of the logits, for a small vocabulary and for one in pieces."""
    for vocab_size in (23, 5000):
        model = lively(vocab_size, **switches)
        idx, targets = torch.randint(vocab_size, (2, 3, 12), generator=torch.Generator().manual_seed(4))
        logits, loss = model(idx, targets)
        assert model.loss(idx, targets).item() == pytest.approx(loss.item(), rel=1e-5)
        x = model.hidden(idx)
        copies = model.copies(x, idx)
        nats = model.nats(x.flatten(0, 1), targets.flatten(), copies and tuple(part.flatten(0, 1) for part in copies))
        assert nats.mean().item() == pytest.approx(loss.item(), rel=1e-5)
        assert logits.shape == (3, 12, vocab_size)


def test_pointer_gives_probabilities_of_what_stood_before(lively):
    model = lively(pointer=True)
    idx = torch.randint(23, (2, 12), generator=torch.Generator().manual_seed(5))
    x = model.hidden(idx)
    share, ids = model.copies(x, idx)
    assert torch.allclose(share.sum(-1), torch.ones(2, 12)), "shares do not sum to 1"
    assert not share[..., :-1].triu(1).any(), "a later token is copied"
    vocabulary = torch.nn.functional.linear(x, model.lm_head.weight).double().softmax(-1)
    for row, t in ((0, 0), (1, 7), (1, 11)):
        expected = share[row, t, -1] * vocabulary[row, t]
        for place, token in enumerate(ids[row, t].tolist()):
            expected[token] += share[row, t, place]
        found = model(idx, idx)[0][row, t].double().exp()
        assert found.sum().item() == pytest.approx(1, abs=1e-5)
        assert torch.allclose(found, expected, atol=1e-6), f"off by {far_apart(found, expected):g} at {t}"


def test_rotary_attention_sees_distances_only():
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(6))

    def score(at, other):
        place = [turn(part, turns(torch.tensor([position]), 8)) for part, position in ((q, at), (k, other))]
        return (place[0] * place[1]).sum().item()

    assert score(5, 2) == pytest.approx(score(105, 102), abs=1e-4)
    assert score(5, 2) != pytest.approx(score(5, 4), abs=1e-3), "distance does not matter at all"


def test_a_switch_that_is_off_leaves_no_parameter(lively):
    names = [{name for name, _ in lively(**switches).named_parameters()} for switches in ({}, {"pointer": True}, {"rotary": True})]
    assert names[1] - names[0] == {"pointer.weight", "sentinel.weight", "sentinel.bias"}
    assert names[0] - names[2] == {"transformer.wpe.weight"}


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (24, 24)])
def test_muon_steps_like_pytorch_s(shape):
    """On matrices that are not split in three; PyTorch's works in bf16, which bounds the agreement."""
    torch.manual_seed(7)
    start, gradients = torch.randn(shape), torch.randn(4, *shape)
    ends = []
    for make in (lambda w: Muon([w], torch.tensor(0.01), factor=2.0, weight_decay=0.1),
                 lambda w: torch.optim.Muon([w], lr=0.02, weight_decay=0.1, momentum=0.95)):  # fmt: skip
        weight = torch.nn.Parameter(start.clone())
        optimizer = make(weight)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        ends.append(weight.detach() - start)
    assert (ends[0] - ends[1]).norm() < 0.03 * ends[1].norm(), (ends[0] - ends[1]).norm() / ends[1].norm()


def test_muon_brings_all_singular_values_near_one():
    matrices = torch.randn(5, 16, 40, generator=torch.Generator().manual_seed(8))
    values = torch.linalg.svdvals(orthogonal(matrices))
    assert 0.5 < values.min() and values.max() < 1.5, (values.min(), values.max())


def test_muon_takes_queries_keys_and_values_apart():
    torch.manual_seed(9)
    whole, gradient = torch.nn.Parameter(torch.zeros(24, 8)), torch.randn(24, 8)
    whole.grad = gradient
    Muon([whole], torch.tensor(1.0), factor=1.0, weight_decay=0.0).step()
    for part, rows in zip(whole.split(8), gradient.split(8), strict=True):
        assert torch.allclose(part, -orthogonal(rows[None] * (0.05 + 0.95 * 0.05))[0], atol=1e-3)


def test_muon_leaves_out_a_step_whose_gradient_overflowed():
    weight = torch.nn.Parameter(torch.ones(4, 8))
    optimizer = Muon([weight], torch.tensor(0.1), factor=1.0, weight_decay=0.1)
    for gradient, overflow in ((1.0, 0.0), (math.inf, 1.0)):
        before = weight.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"])
        weight.grad = torch.full((4, 8), gradient)
        optimizer.found_inf, optimizer.grad_scale = torch.tensor(overflow), None
        optimizer.step()
    assert torch.equal(weight, before[0]) and torch.equal(optimizer.state[weight]["momentum"], before[1][0]["momentum"])


# ------------------------------------------------------------------------------------------- losses in pieces


@pytest.mark.parametrize(("vocab_size", "rows"), [(11, 5), (70_000, 130)])
def test_chunked_loss_and_gradients_equal_pytorch_s(vocab_size, rows):
    torch.manual_seed(3)
    x, weight = torch.randn(rows, 6, requires_grad=True), torch.randn(vocab_size, 6, requires_grad=True)
    targets = torch.randint(vocab_size, (rows,))
    results = []
    for loss in (lambda: F.cross_entropy(F.linear(x, weight), targets), lambda: ChunkedCrossEntropy.apply(x, weight, targets)):
        x.grad = weight.grad = None
        value = loss()
        (3 * value).backward()
        results.append((value.detach(), x.grad, weight.grad))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_cuda_fused_loss_and_gradients_equal_pytorch_s(dtype):
    if not torch.cuda.is_available():
        pytest.skip("the fused loss runs on CUDA only")
    if fused_loss_obstacle():
        pytest.skip(f"the fused loss cannot run: {fused_loss_obstacle()}")
    torch.manual_seed(3)
    dtype = getattr(torch, dtype)
    x, weight = (torch.randn(rows, 64, device="cuda").to(dtype) for rows in (37, 5003))
    weight = weight / 2
    targets = torch.randint(len(weight), (len(x),), device="cuda")
    exact = [part.detach().double().requires_grad_() for part in (x, weight)]
    expected = F.cross_entropy(F.linear(*exact), targets)
    (2 * expected).backward()
    fused = [part.clone().requires_grad_() for part in (x, weight)]
    found = FusedCrossEntropy.apply(*fused, targets).mean()
    (2 * found).backward()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert found.item() == pytest.approx(expected.item(), rel=tolerance), "loss"
    for name, mine, right in zip(("x", "weight"), fused, exact, strict=True):
        error = (mine.grad.double() - right.grad).norm() / right.grad.norm()
        assert error < tolerance, f"gradient of {name} off by {error:.1e} of its norm in {dtype}"
