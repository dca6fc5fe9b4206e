"""The model: causality, formulas in float64, losses, names, optimizers, generation and sampling.

python -m pytest tests/test_model.py
"""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from model import (
    GPT,
    CUDAGraphed,
    FusedCrossEntropy,
    GPTConfig,
    Muon,
    fused_loss_obstacle,
    newton_schulz,
    sample,
)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def random_ids(*shape, vocab_size=23, seed=1):
    return torch.randint(vocab_size, shape, generator=seeded(seed))


def gap(found, expected):
    """Norm of the difference, relative to what is expected."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return ((found - expected).norm() / expected.norm()).item()


# ----- forward pass -----
def test_a_later_token_changes_no_earlier_logit(lively, switches):
    model, idx = lively(**switches), random_ids(3, 12)
    before = model(idx)
    for position in range(12):
        changed = idx.clone()
        changed[:, position] = (changed[:, position] + 1) % 23
        moved = (model(changed) != before).any(-1).any(0)
        assert not moved[:position].any(), f"token {position} moved logits at {moved.nonzero()}"
        assert moved[position], f"token {position} does not reach its own logits"


def linear(weights, x, name):
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)


def rms(x):
    return x / x.square().mean(-1, keepdim=True).sqrt()


def norm(weights, x, name):
    if f"{name}.weight" not in weights:
        return rms(x)
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return x * weights[f"{name}.weight"] + weights.get(f"{name}.bias", 0)


def rotated(x):
    """Channels i and i + D / 2 of (T, D) as a complex number, turned further at each position."""
    real, imag = x.chunk(2, dim=1)
    frequencies = 10_000.0 ** -torch.linspace(0, 1, real.size(1)).double()
    angles = torch.arange(len(x))[:, None] * frequencies
    turned = torch.complex(real, imag) * torch.exp(1j * angles)
    return torch.cat([turned.real, turned.imag], dim=1)


def attend(weights, x, name, config):
    heads = []
    for i in range(config.n_head):
        part = slice(i * config.head_dim, (i + 1) * config.head_dim)
        qkv = linear(weights, x, f"{name}.c_attn").split(config.n_embd, dim=-1)
        q, k, v = (whole[:, part] for whole in qkv)
        q, k = (rotated(q), rotated(k)) if config.rotary else (q, k)
        scores = (q @ k.T / math.sqrt(config.head_dim)).exp().tril()
        heads.append(scores / scores.sum(1, keepdim=True) @ v)
        if config.attn_gate:
            gate = linear(weights, x, f"{name}.c_gate")[:, part]
            heads[-1] = heads[-1] * 2 / (1 + (-gate).exp())
    return linear(weights, torch.cat(heads, dim=1), f"{name}.c_proj")


def with_copies(weights, x, logits, idx):
    """Logarithms of the pointer's mixture: a key is of a token and of the state before it."""
    query, key, next_key = linear(weights, x, "pointer.c_attn").chunk(3, dim=-1)
    key = key + F.pad(next_key[:-1], (0, 0, 1, 0))
    scores = (query @ key.T / math.sqrt(x.size(1))).exp().tril()
    gate = linear(weights, x, "pointer.sentinel").exp()
    copied = scores @ F.one_hot(idx, logits.size(1)).double()
    return ((copied + gate * logits.softmax(-1)) / (scores.sum(1, keepdim=True) + gate)).log()


def written_out(model, idx):
    """What the model gives for ids (T,), in float64 from its parameters, by head and position."""
    config = model.config
    weights = {k: v.detach().double() for k, v in model.state_dict().items()}
    x = weights["transformer.wte.weight"][idx]  # (T, C)
    if not config.rotary:
        x = x + weights["transformer.wpe.weight"][: len(idx)]
    for layer in (f"transformer.h.{i}" for i in range(config.n_layer)):
        x = x + attend(weights, norm(weights, x, f"{layer}.ln_1"), f"{layer}.attn", config)
        inner = linear(weights, norm(weights, x, f"{layer}.ln_2"), f"{layer}.mlp.c_fc")
        gelu = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        x = x + linear(weights, gelu, f"{layer}.mlp.c_proj")
    x = norm(weights, x, "transformer.ln_f")
    logits = x @ weights["lm_head.weight"].T
    return with_copies(weights, x, logits, idx) if config.pointer else logits


@pytest.mark.parametrize("shape", [{}, {"n_head": 1}, {"n_head": 4, "bias": False}], ids=str)
def test_agrees_with_the_formulas_written_out_in_float64(lively, switches, shape):
    model, idx = lively(**shape, **switches), random_ids(12, seed=2)
    expected = written_out(model, idx)
    exact = not (model.config.rotary or model.config.pointer)  # these compute in float32 always
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12 if exact else 1e-5)):
        off = gap(model.to(dtype)(idx[None])[0], expected)
        assert off < tolerance, f"{dtype}: off by {off:.1e}"


def test_pointer_gives_probabilities(lively):
    sums = lively(pointer=True)(random_ids(4, 12)).exp().sum(-1)
    assert (sums - 1).abs().max() < 1e-5, sums


def test_too_long_an_input_names_both_lengths(lively):
    with pytest.raises(ValueError, match="13.*12"):
        lively()(random_ids(1, 13))


# ----- loss -----
def by_halves(model, idx, targets):
    places = torch.arange(idx.numel(), device=idx.device)
    parts = [model.token_losses(idx, targets, chosen) for chosen in (places[::2], places[1::2])]
    return torch.cat(parts).mean()


WAYS = {
    "logits": lambda model, x, y: F.cross_entropy(model(x).flatten(0, 1), y.flatten()),
    "mean": lambda model, x, y: model(x, y),
    "rows": lambda model, x, y: model.token_losses(x, y).mean(),
    "chosen rows": by_halves,
}


def loss_and_gradients(way, model, idx, targets):
    model.zero_grad()
    loss = WAYS[way](model, idx, targets)
    loss.backward()
    return {"loss": loss} | {name: value.grad for name, value in model.named_parameters()}


def check_all_ways_agree(model, idx, targets, device="cpu"):
    """With float64 on the CPU; also the losses without gradients, which are computed by pieces."""
    expected = loss_and_gradients("logits", copy.deepcopy(model).double(), idx, targets)
    batch = (model.to(device), idx.to(device), targets.to(device))
    for way in WAYS:
        for name, value in loss_and_gradients(way, *batch).items():
            off = gap(value, expected[name])
            assert off < 1e-4, f"{way}, {name} off by {off:.1e}"
    with torch.no_grad():
        assert gap(WAYS["rows"](*batch), expected["loss"]) < 1e-5, "without gradients"


@pytest.mark.parametrize("vocab_size", [23, 5000])
def test_losses_and_gradients_of_all_ways_agree(lively, switches, vocab_size):
    model = lively(vocab_size, block_size=20, **switches)
    check_all_ways_agree(model, *random_ids(2, 15, 20, vocab_size=vocab_size))


def test_cuda_losses_and_gradients_of_all_ways_equal_the_cpu_s(lively, switches, cuda):
    """With a vocabulary that is no multiple of 64, so that the output layer is padded there."""
    model = lively(1003, block_size=20, **switches)
    check_all_ways_agree(model, *random_ids(2, 15, 20, vocab_size=1003), cuda)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_cuda_fused_loss_and_gradients_equal_pytorch_s(cuda, dtype):
    if fused_loss_obstacle():
        pytest.skip(f"the fused loss cannot run: {fused_loss_obstacle()}")
    torch.manual_seed(3)
    inputs = [torch.randn(37, 64, device=cuda), torch.randn(5003, 64, device=cuda) / 2]
    targets = torch.randint(5003, (37,), device=cuda)
    fused = [part.to(dtype).requires_grad_() for part in inputs]
    exact = [part.detach().double().requires_grad_() for part in fused]
    losses = FusedCrossEntropy.apply(*fused, targets, True)
    expected = F.cross_entropy(F.linear(*exact), targets, reduction="none")
    (2 * losses.mean()).backward()
    (2 * expected.mean()).backward()
    found = [gap(losses, expected), *(gap(fused[i].grad, exact[i].grad) for i in range(2))]
    assert max(found) < {torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype], found


def test_starts_near_uniform_and_overfits_one_batch(switches):
    torch.manual_seed(4)
    model = GPT(GPTConfig(23, 16, n_layer=2, n_head=2, n_embd=32, dropout=0.0, **switches))
    idx, losses = random_ids(4, 17), []
    optimizer = model.configure_optimizers(0.0, torch.tensor(1e-2), (0.9, 0.99), "cpu")
    for _ in range(150):
        loss = model(idx[:, :-1], idx[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - math.log(23)) < 0.2, f"{losses[0]:.4f}, ln V is {math.log(23):.4f}"
    assert losses[-1] < 0.05, f"loss {losses[-1]:.4f} after 150 steps on one batch"


# ----- parameters and optimizers -----
def nanogpt_shapes(config):
    """Names and shapes of nanoGPT's state."""
    C, V = config.n_embd, config.vocab_size
    layer = {"ln_1": (C,), "attn.c_attn": (3 * C, C), "attn.c_proj": (C, C)}
    layer |= {"ln_2": (C,), "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
    parts = {f"h.{i}.{name}": layer[name] for i in range(config.n_layer) for name in layer}
    parts |= {"ln_f": (C,)}
    biases = {f"transformer.{name}.bias": shape[:1] for name, shape in parts.items()}
    parts |= {"wte": (V, C), "wpe": (config.block_size, C)}
    weights = {f"transformer.{name}.weight": shape for name, shape in parts.items()}
    return weights | {"lm_head.weight": (V, C)} | (biases if config.bias else {})


@pytest.mark.parametrize("bias", [True, False])
def test_state_is_nanogpt_s_both_ways(lively, bias):
    model, other = lively(bias=bias), lively(bias=bias, seed=1)
    shapes, idx = nanogpt_shapes(model.config), random_ids(2, 12)
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert ours == shapes, f"differ in {set(shapes.items()) ^ set(ours.items())}"
    theirs = {name: model.state_dict()[name].clone() for name in shapes}
    other.load_state_dict(theirs, strict=True)
    assert torch.equal(model(idx), other(idx))
    assert other.lm_head.weight is other.transformer.wte.weight, "loading parted the tied weights"
    shapes.pop("lm_head.weight")  # tied, so it counts once
    counts = {name: math.prod(shape) for name, shape in shapes.items()}
    assert model.get_num_params(non_embedding=False) == sum(counts.values())
    assert model.get_num_params() == sum(counts.values()) - counts["transformer.wpe.weight"]


def test_initial_spread_of_the_weights():
    torch.manual_seed(5)
    model = GPT(GPTConfig(500, block_size=64, n_layer=8, n_head=2, n_embd=64))
    for name, value in model.named_parameters():
        std = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
        mean, std = (0, std) if value.dim() == 2 else (int(name.endswith("weight")), 0)
        found = (value.mean().item(), value.std().item())
        assert found == pytest.approx((mean, std), abs=std / 20), f"{name}: {found}"


def test_only_matrices_decay_and_each_parameter_is_stepped_once(lively, switches):
    model = lively(**switches)
    left_out = [model.transformer.h[0].attn.c_attn.weight]
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu", leave_out=left_out)
    groups = ((group["params"], group["weight_decay"]) for group in optimizer.param_groups)
    decays = [(id(parameter), decay) for parameters, decay in groups for parameter in parameters]
    expected = [(id(p), 0.1 if p.dim() == 2 else 0.0) for p in model.parameters()]
    expected.remove((id(left_out[0]), 0.1))
    assert sorted(decays) == sorted(expected)


WRONG_SHAPES = [{field: 0} for field in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")]
WRONG_SHAPES += [{"dropout": value} for value in (-0.1, 1.0, math.nan)] + [{"n_layer": -2}]
WRONG_SHAPES += [{"n_embd": 10, "n_head": 4}, {"n_embd": 12, "n_head": 4, "rotary": True}]


@pytest.mark.parametrize("wrong", WRONG_SHAPES, ids=str)
def test_a_shape_that_cannot_be_built_is_refused_by_name(wrong):
    field, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"{field}.*{value}"):
        GPTConfig(**wrong)


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (24, 24), (24, 8)], ids=str)
def test_muon_steps_like_pytorch_s(shape):
    """PyTorch's works in bfloat16, hence 3%; queries, keys and values are three matrices to it."""
    torch.manual_seed(7)
    rows = 8 if shape == (24, 8) else shape[0]
    start, gradients = torch.randn(shape), torch.randn(4, *shape)
    whole = torch.nn.Parameter(start.clone())
    parts = [torch.nn.Parameter(part.clone()) for part in start.split(rows)]
    options = {"weight_decay": 0.1, "momentum": 0.95}
    optimizers = [Muon([whole], torch.tensor(0.01), lr_scale=2.0, **options)]
    optimizers.append(torch.optim.Muon(parts, lr=0.02, **options))
    for scale, gradient in zip((1.0, 30.0, 0.1, 2.0), gradients, strict=True):
        for parameter, own in zip([whole, *parts], [gradient, *gradient.split(rows)], strict=True):
            parameter.grad = own.clone()
        whole.grad, optimizers[0].grad_scale = scale * gradient, torch.tensor(scale)
        for optimizer in optimizers:
            optimizer.step()
    off = gap(whole - start, torch.cat(parts) - start)
    assert off < 0.03, f"off by {off:.1%}"


def test_newton_schulz_brings_all_singular_values_near_one():
    values = torch.linalg.svdvals(newton_schulz(torch.randn(5, 16, 40, generator=seeded(8))))
    assert values.min() > 0.5 and values.max() < 1.5, (values.min(), values.max())


def test_muon_leaves_out_a_step_whose_gradient_overflowed():
    weight, states = torch.nn.Parameter(torch.ones(4, 8)), []
    optimizer = Muon([weight], torch.tensor(0.1), lr_scale=1.0, weight_decay=0.1)
    for gradient, overflow in ((1.0, 0.0), (math.inf, 1.0)):
        weight.grad, optimizer.found_inf = torch.full((4, 8), gradient), torch.tensor(overflow)
        optimizer.step()
        states.append(copy.deepcopy([weight.detach(), *optimizer.state[weight].values()]))
    assert not torch.equal(states[0][0], torch.ones(4, 8)), "the step before did nothing"
    assert all(map(torch.equal, *states)), f"{states[0]} became {states[1]}"


# ----- generation -----
def naive(model, idx, new_tokens, temperature=0, top_k=None, generator=None):
    """The continuation by a whole forward pass over the cropped context for each token."""
    for _ in range(new_tokens):
        logits = model(idx[:, -model.config.block_size :])[:, -1]
        idx = torch.cat([idx, sample(logits, temperature, top_k, generator)], dim=1)
    return idx


@pytest.mark.parametrize("prompt", [1, 2, 5, 11, 12, 13, 20])
def test_generation_equals_a_naive_loop(lively, switches, prompt):
    """Up to the context of 12 and past it, from ids of any integer type."""
    model, idx = lively(**switches), random_ids(3, prompt, seed=prompt)
    for new_tokens, dtype in ((0, torch.int64), (1, torch.uint8), (5, torch.int32), (20, None)):
        made = model.generate(idx.to(dtype), new_tokens, 2.0, 5, seeded(prompt))
        expected = naive(model, idx, new_tokens, 2.0, 5, seeded(prompt))
        assert torch.equal(made, expected), f"{made.tolist()} is not {expected.tolist()}"
    other = model.generate(idx, 20, 2.0, 5, seeded(prompt + 1))
    assert not torch.equal(made, other), "the generator's seed does not decide the text"


@pytest.mark.parametrize("place", ["drop", "weights", "attn.resid_dropout", "mlp.dropout"])
def test_dropout_acts_at_each_of_its_places_while_training(lively, place):
    model, idx = lively(dropout=0.5), random_ids(1, 12)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and not name.endswith(place):
            module.p = 0.0
    if place != "weights":  # attention's
        for block in model.transformer.h:
            block.attn.config = replace(model.config, dropout=0.0)
    assert torch.equal(model.eval()(idx), model(idx))
    assert not torch.equal(model.train()(idx), model(idx))


@pytest.mark.parametrize("training", [True, False])
def test_generation_restores_the_mode_and_has_no_dropout(lively, training):
    model, idx = lively(dropout=0.5), random_ids(1, 3)
    expected = naive(model, idx, 20)
    model.train(training)
    assert torch.equal(model.generate(idx, 20, 0), expected), "dropout acted while generating"
    with pytest.raises(ValueError):
        model.generate(idx, 5, temperature=-1)
    assert all(module.training == training for module in model.modules())


@pytest.mark.parametrize("options", [(1.0, None), (0.7, None), (1.0, 4), (1.5, 40), (1.0, 1)])
def test_sampled_frequencies_are_the_softmax_probabilities(options):
    temperature, top_k = options
    logits = torch.linspace(-1.5, 1.5, 9)
    kept = logits.clone()
    kept[: -top_k if top_k else 0] = -math.inf
    probs = (kept / temperature).softmax(-1)
    counts = sample(logits.expand(20_000, 9), *options, seeded(10)).flatten().bincount(minlength=9)
    errors = (20_000 * probs * (1 - probs)).sqrt()  # 0 for what top_k leaves out
    off = (counts - 20_000 * probs).abs()
    assert (off <= 4 * errors).all(), f"{counts.tolist()} for {(20_000 * probs).tolist()}"


PROMPTS = {r"\(1, 0\)": torch.zeros(1, 0).long(), r"\(0, 5\)": torch.zeros(0, 5).long()}
PROMPTS |= {r"\(2,\)": torch.tensor([1, 2]), "float32": torch.zeros(1, 2)}
PROMPTS |= {"1 to 23.*0 to 22": torch.tensor([[1, 23]]), "-1 to 2": torch.tensor([[-1, 2]])}
OPTIONS = {"temperature": (-0.5, math.nan, math.inf), "top_k": (0, -3, 2.5, 2.0)}
OPTIONS |= {"max_new_tokens": (-1, 3.0)}
REFUSED = {named: {"idx": idx} for named, idx in PROMPTS.items()}
REFUSED |= {f"{name} {value}": {name: value} for name in OPTIONS for value in OPTIONS[name]}


@pytest.mark.parametrize("named", REFUSED)
def test_what_cannot_be_generated_is_refused_by_name(lively, named):
    with pytest.raises(ValueError, match=named):
        lively().generate(**{"idx": random_ids(1, 2), "max_new_tokens": 3, **REFUSED[named]})


# ----- CUDA -----
def test_cuda_generation_equals_a_naive_loop(lively, switches, cuda):
    """Past the context, and long enough to be captured as graphs, sampling included."""
    model = lively(**switches).to(cuda)
    for prompt in (1, 12, 14):
        idx = random_ids(3, prompt, seed=prompt).to(cuda)
        made, expected = model.generate(idx, 60, 0), naive(model, idx, 60)
        assert torch.equal(made, expected), f"{made.tolist()} is not {expected.tolist()}"
    generators = [torch.Generator(cuda).manual_seed(seed) for seed in (7, 7, 8)]
    texts = [model.generate(idx, 60, 2.0, 5, generator) for generator in generators]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


@pytest.mark.parametrize("capturable", [True, False])
def test_cuda_graph_counts_every_call(cuda, capturable):
    """Also where capture fails, since the step asks the device for a value."""
    count, recovered = torch.zeros(1, device=cuda), []

    def step():
        count.add_(1 if capturable else 1 + 0 * count.item())

    graphed = CUDAGraphed(step, True, warmup=2, recover=lambda: recovered.append(graphed.reason))
    for _ in range(6):
        graphed()
    found = (count.item(), graphed.graph is not None, len(recovered))
    assert found == (6, capturable, not capturable), f"{found}, {recovered}"
