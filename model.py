"""A GPT language model: pre-norm Transformer decoder with tied embeddings (Radford et al. 2019).

Parameter names and shapes are those of nanoGPT, so that its checkpoints load with `strict=True`.
In comments: B sequences, T positions, C embedding width, H heads, D head dimension, V vocabulary,
S slots of the KV cache, N rows of any kind.
"""

import contextlib
import functools
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

try:  # comes with PyTorch's CUDA builds on Linux
    import triton
    import triton.language as tl
except ImportError:
    triton = None


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model. Raises ValueError for sizes that cannot be built."""

    vocab_size: int = 50257  # number of token ids
    block_size: int = 256  # context length, in tokens
    n_layer: int = 6  # Transformer layers
    n_head: int = 6  # attention heads per layer
    n_embd: int = 384  # embedding width
    dropout: float = 0.1  # probability, on embeddings, attention weights and layer outputs
    bias: bool = True  # biases in linear layers and layer norms, as in GPT-2
    rotary: bool = False  # rotary position embedding (Su et al. 2021), not a learned one
    rms_norm: bool = False  # RMSNorm without gain (Zhang and Sennrich 2019), not layer norm
    attn_gate: bool = False  # attention's output scaled by a sigmoid gate (Qiu et al. 2025)
    pointer: bool = False  # pointer-sentinel mixture over the context (Merity et al. 2016)

    def __post_init__(self):
        for field in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}: give at least 1.")
        pairs = 2 if self.rotary else 1  # rotary embedding rotates pairs of channels
        if self.n_embd % (pairs * self.n_head):
            text = f"n_embd {self.n_embd} is not divisible by {pairs} x n_head {self.n_head}"
            raise ValueError(f"{text}: choose n_embd as a multiple, so that all heads are alike.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}: give at least 0 and below 1.")

    @property
    def head_dim(self):
        return self.n_embd // self.n_head


def rotary_angles(positions, head_dim):
    """Cosines and sines (2, T, 1, D / 2) that rotate the pairs of channels at positions (T,)."""
    frequencies = 10_000.0 ** -torch.linspace(0, 1, head_dim // 2, device=positions.device)
    angles = positions[:, None, None].float() * frequencies
    return torch.stack([angles.cos(), angles.sin()])


def apply_rotary(x, rotary):
    """Rotates queries or keys (B, T, H, D) by `rotary_angles`."""
    cos, sin = rotary
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).type_as(x)


def make_norm(config):
    """RMSNorm or layer norm."""
    if config.rms_norm:
        return nn.RMSNorm(config.n_embd, elementwise_affine=False)
    return nn.LayerNorm(config.n_embd, bias=config.bias)


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention; no position sees a later one (Vaswani et al. 2017)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        if config.attn_gate:
            self.c_gate = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, rotary=None, past=None):
        B, T, C = x.shape  # below: (B, T, H, D)
        qkv = self.c_attn(x).view(B, T, 3, self.config.n_head, self.config.head_dim)
        q, k, v = qkv.unbind(2)
        if rotary is not None:
            q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
        mask, dropout = None, self.config.dropout if self.training else 0.0
        if past is not None:
            slots, positions, mask = past  # (B, S, 2, H, D), (T,), (T, S)
            slots.index_copy_(1, positions, torch.stack([k, v], dim=2))
            k, v = slots.unbind(2)  # (B, S, H, D)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        causal = {"dropout_p": dropout, "is_causal": mask is None}
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **causal)
        y = y.transpose(1, 2).reshape(B, T, C)
        if self.config.attn_gate:
            y = y * (2 * torch.sigmoid(self.c_gate(x)))  # near 1 at first
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Position-wise feed-forward network with a hidden layer of four times the width."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x))))


class Block(nn.Module):
    """One pre-norm Transformer layer."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, rotary=None, past=None):
        x = x + self.attn(self.ln_1(x), rotary, past)
        return x + self.mlp(self.ln_2(x))


class PointerHead(nn.Module):
    """Copies a token of the context (Merity et al. 2016).

    Its key is of the state at it and of the one before: what once followed a state like this one.
    """

    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.sentinel = nn.Linear(config.n_embd, 1)

    def scores(self, x, kv_cache=None, positions=None):
        """Scores (B, T, S) of the tokens to copy and (B, T) of copying none, in float32."""
        query, key, next_key = self.c_attn(x).chunk(3, dim=-1)
        if kv_cache is None:
            keys = key + F.pad(next_key, (0, 0, 1, -1))
            mask = x.new_full((x.size(1), x.size(1)), -math.inf).triu(1)
        else:
            keys, mask = kv_cache.add_keys(key, next_key, positions), kv_cache.mask[positions]
        scores = torch.add(mask.float(), query @ keys.mT, alpha=x.size(-1) ** -0.5)
        return scores, self.sentinel(x)[..., 0].float()

    def probabilities(self, *where):
        """Probabilities of copying (B, T, S) and of the vocabulary (B, T), together 1."""
        scores, sentinel = self.scores(*where)
        probs = torch.cat([scores, sentinel[..., None]], dim=-1).softmax(-1)
        return probs[..., :-1], probs[..., -1]

    def forward(self, x, idx, targets):
        """Log-probabilities (B, T) of copying the targets from `idx`, and of the vocabulary."""
        scores, sentinel = self.scores(x)
        total = torch.logaddexp(scores.logsumexp(-1), sentinel)
        right = scores.masked_fill(idx[:, None] != targets[..., None], -1e4)  # finite: no NaN
        return right.logsumexp(-1) - total, sentinel - total


class KVCache:
    """Keys and values of a context, (B, S, 2, H, D) per layer, and the pointer's, (B, S + 1, C)."""

    def __init__(self, config, batch_size, weight):
        size, like = config.block_size, {"dtype": weight.dtype, "device": weight.device}
        shape = (batch_size, size, 2, config.n_head, config.head_dim)
        self.layers = [torch.zeros(shape, **like) for _ in range(config.n_layer)]
        self.mask = torch.full((size, size), -math.inf, **like).triu(1)
        self.keys = torch.zeros(batch_size, size + 1, config.n_embd, **like)

    def add_keys(self, key, next_key, positions):
        """All keys (B, S, C): slot t holds key(t) + next_key(t - 1), which are (B, T, C)."""
        self.keys.index_copy_(1, positions + 1, next_key)
        self.keys.index_add_(1, positions, key)
        return self.keys[:, :-1]


class GPT(nn.Module):
    """The language model: gives logits or the training loss; `generate` continues a prompt."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        parts = {"wte": nn.Embedding(config.vocab_size, config.n_embd)}
        parts |= {} if config.rotary else {"wpe": nn.Embedding(config.block_size, config.n_embd)}
        layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        parts |= {"drop": nn.Dropout(config.dropout), "h": layers, "ln_f": make_norm(config)}
        self.transformer = nn.ModuleDict(parts)
        self.pointer = PointerHead(config) if config.pointer else None
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False, device="meta")
        for name, module in self.named_modules():
            # 2 * n_layer layers add to the residual stream: its variance must not grow with depth
            layers = 2 * config.n_layer if name.endswith("c_proj") else 1
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, mean=0.0, std=0.02 / math.sqrt(layers))
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        self.lm_head.weight = self.transformer.wte.weight  # tied (Press and Wolf 2017)
        if config.pointer:  # about 15% of the probability are copies at first
            nn.init.constant_(self.pointer.sentinel.bias, math.log(config.block_size) + 1)

    def get_num_params(self, non_embedding=True):
        """Number of parameters; like nanoGPT's, without the position embedding unless asked for."""
        learned = "wpe" in self.transformer and non_embedding
        total = sum(parameter.numel() for parameter in self.parameters())
        return total - self.transformer.wpe.weight.numel() if learned else total

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type, leave_out=()):
        """Fused AdamW (Loshchilov and Hutter 2019), weight decay on matrices only."""
        others = {id(parameter) for parameter in leave_out}
        parameters = [p for p in self.parameters() if p.requires_grad and id(p) not in others]
        matrices = {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay}
        vectors = {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}
        options = {"betas": tuple(map(float, betas)), "fused": True}
        options["capturable"] = device_type == "cuda"
        return torch.optim.AdamW([matrices, vectors], lr=learning_rate, **options)

    def backbone(self, idx, kv_cache=None, positions=None):
        """Ids (B, T) to final states (B, T, C); with a KVCache, at its `positions` (T,)."""
        T, limit = idx.size(1), self.config.block_size
        if limit < T:
            raise ValueError(f"{T} tokens exceed the context of {limit}: crop the input.")
        # sparse: the gradient of the batch's few rows is added to the output layer's dense one
        x, rotary = F.embedding(idx, self.transformer.wte.weight, sparse=True), None
        if self.config.rotary:
            where = torch.arange(T, device=idx.device) if positions is None else positions
            rotary = rotary_angles(where, self.config.head_dim)
        else:
            x = x + self.transformer.wpe.weight[slice(T) if positions is None else positions]
        x = self.transformer.drop(x)
        mask = kv_cache and kv_cache.mask[positions]
        for layer, block in enumerate(self.transformer.h):
            x = block(x, rotary, kv_cache and (kv_cache.layers[layer], positions, mask))
        return self.transformer.ln_f(x)

    def logits(self, x, weight=None, pointer=None, context=None):
        """Logits (B, T, V) of states (B, T, C); `weight` is `pad_vocab`'s, if made before.

        With a pointer's probabilities over `context` (B, S), the logarithms of the mixture's.
        For generation and charts: training and scores take `vocab_losses`, which needs none.
        """
        weight = pad_vocab(self.lm_head.weight) if weight is None else weight
        logits = F.linear(x, weight)[..., : self.config.vocab_size]
        if pointer is None:
            return logits
        copy_probs, gate = pointer
        probs = logits.float().softmax(-1) * gate[..., None]
        ids = context[:, None].expand_as(copy_probs)
        return probs.scatter_add(-1, ids, copy_probs).clamp(min=1e-30).log()

    def forward(self, idx, targets=None):
        """Logits (B, T, V) after ids (B, T); with targets (B, T), the mean loss in nats instead."""
        if targets is not None:
            return self.token_losses(idx, targets, reduction="mean")
        x = self.backbone(idx)
        return self.logits(x, pointer=self.pointer and self.pointer.probabilities(x), context=idx)

    def token_losses(self, idx, targets, chosen=None, reduction="none"):
        """Losses in nats (N,) of the targets (B, T) after ids (B, T), or of those `chosen` (N,)."""
        x, pick = self.backbone(idx), slice(None) if chosen is None else chosen
        rows, wanted = x.flatten(0, 1)[pick], targets.flatten()[pick]
        if self.pointer is None:
            return vocab_losses(rows, self.lm_head.weight, wanted, reduction)
        copied, gate = (part.flatten()[pick] for part in self.pointer(x, idx, targets))
        losses = vocab_losses(rows, self.lm_head.weight, wanted)
        losses = -torch.logaddexp(copied, gate - losses)
        return losses.mean() if reduction == "mean" else losses

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None):
        """Continues the prompts `idx` (B, T) by `max_new_tokens` samples; returns (B, T + new).

        Temperature 0 takes the most likely token; `top_k` keeps the k most likely ones. Within the
        first context keys and values, and nothing else, are cached; past it all positions shift,
        so that each token is computed from its whole window. ValueError for what cannot be.
        """
        idx = self._checked_prompt(idx, max_new_tokens, temperature, top_k)
        (B, T), block, device = idx.shape, self.config.block_size, idx.device
        tokens = F.pad(idx, (0, max(max_new_tokens, block - T)))  # at least one context
        last = torch.tensor([T - 1], device=device)  # the newest token's place, on the device
        window = torch.arange(1 - block, 1, device=device)
        weight = pad_vocab(self.lm_head.weight)
        kv_cache = KVCache(self.config, B, weight)

        def append(new, context, kv_cache=None, positions=None):
            x = self.backbone(new, kv_cache, positions)
            pointer = self.pointer and self.pointer.probabilities(x, kv_cache, positions)
            pointer = pointer and [part[:, -1:] for part in pointer]
            logits = self.logits(x[:, -1:], weight, pointer, context)[:, -1]
            last.add_(1)
            tokens.index_copy_(1, last, sample(logits, temperature, top_k, generator))

        def from_cache():
            append(tokens.index_select(1, last), tokens[:, :block], kv_cache, last)

        def from_window():
            context = tokens.index_select(1, last + window)
            append(context, context)

        with evaluating(self):
            cached = max(0, min(max_new_tokens, block - T + 1))
            if cached:
                append(idx, tokens[:, :block], kv_cache, torch.arange(T, device=device))
            repeat(from_cache, cached - 1, device, generator)
            repeat(from_window, max_new_tokens - cached, device, generator)
        return tokens[:, : T + max_new_tokens]

    def _checked_prompt(self, idx, max_new_tokens, temperature, top_k):
        if idx.dim() != 2 or idx.numel() == 0 or idx.is_floating_point():
            raise ValueError(f"The prompt is {idx.dtype} {tuple(idx.shape)}: give ids (B, T).")
        low, high, V = idx.min().item(), idx.max().item(), self.config.vocab_size
        if low < 0 or high >= V:
            text = f"The prompt's ids run from {low} to {high}, the vocabulary from 0 to {V - 1}"
            raise ValueError(f"{text}: use the tokenizer of the model's data set.")
        counts = [max_new_tokens, 1 if top_k is None else top_k - 1]
        if not (all(isinstance(n, int) and n >= 0 for n in counts) and 0 <= temperature < math.inf):
            text = f"max_new_tokens {max_new_tokens}, temperature {temperature}, top_k {top_k}"
            raise ValueError(f"{text}: give a count, a number of at least 0, and a count or None.")
        return idx.long()


@contextlib.contextmanager
def evaluating(model):
    """Evaluation mode, no gradients and no compiled layers; the mode is restored afterwards."""
    was_training = model.training
    compiled = any(module._compiled_call_impl for module in model.modules())
    eager = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    model.eval()
    try:
        with torch.no_grad(), eager:
            yield
    finally:
        model.train(was_training)


def sample(logits, temperature, top_k, generator):
    """Draws token ids (B, 1) from logits (B, V), without waiting for the device."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits, ids = logits.topk(min(top_k or logits.size(-1), logits.size(-1)), sorted=False)
    # the largest logit / temperature - log(e), e ~ Exp(1), is a draw (Gumbel): the host never waits
    noise = torch.empty_like(logits, dtype=torch.float32).exponential_(generator=generator).log_()
    return ids.gather(-1, torch.sub(logits, noise, alpha=temperature).argmax(-1, keepdim=True))


# ----- the optimizer of the hidden matrices -----
class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum with decoupled weight decay, for matrices (Jordan et al. 2024).

    Unlike PyTorch's own it reads its rate, `lr` times `lr_scale`, on the device, as a graph must.
    """

    # as fused AdamW's: gradients are divided by the one, the other leaves everything as it is
    grad_scale = found_inf = None

    def __init__(self, matrices, lr, lr_scale, weight_decay, momentum=0.95):
        options = {"lr": lr, "lr_scale": lr_scale, "weight_decay": weight_decay}
        super().__init__(matrices, options | {"momentum": momentum})

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix]["momentum"] = torch.zeros_like(matrix)
        gradients = [matrix.grad for matrix in matrices]
        momenta = [self.state[matrix]["momentum"] for matrix in matrices]
        lr = group["lr"] * group["lr_scale"]
        if self.grad_scale is not None:
            gradients = torch._foreach_div(gradients, self.grad_scale)
        if self.found_inf is not None:
            pairs = zip(gradients, momenta, strict=True)
            gradients = [torch.where(self.found_inf > 0, m, g) for g, m in pairs]
            lr = lr * (self.found_inf == 0)
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        nesterov = torch._foreach_lerp(gradients, momenta, group["momentum"])
        torch._foreach_mul_(matrices, 1 - lr * group["weight_decay"])
        by_shape = {}
        for matrix, direction in zip(matrices, nesterov, strict=True):
            by_shape.setdefault(matrix.shape, []).append((_wide(matrix), _wide(direction)))
        for (rows, columns), pairs in by_shape.items():  # all of a shape at once
            targets, directions = zip(*pairs, strict=True)
            n = len(targets[0])
            updates = newton_schulz(torch.cat(directions)).split(n)
            scale = lr * max(1, rows / columns / n) ** 0.5  # a tall matrix moves further
            for target, update in zip(targets, updates, strict=True):
                target.sub_(update * scale)


def _wide(matrix):
    """Views (n, rows, columns) with rows <= columns; queries, keys, values are three matrices."""
    rows, columns = matrix.shape
    if rows == 3 * columns:
        return matrix.view(3, columns, columns)
    return matrix[None] if rows <= columns else matrix.t()[None]


def newton_schulz(matrices):
    """Matrices (n, rows, columns), rows <= columns, with all singular values brought near 1.

    Five Newton-Schulz steps with the coefficients of Jordan et al. (2024); in bfloat16 on CUDA.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x.to(matrices.dtype)


# ----- CUDA graphs -----
class CUDAGraphed:
    """Calls `step` again and again; on CUDA, after `warmup` eager calls, as one captured graph.

    `step` reads and writes tensors that stay where they are and never asks the device for a value.
    Where capture fails, `reason` says why, `recover` is called, and every call stays eager.
    """

    def __init__(self, step, enabled, generator=None, warmup=3, recover=None):
        self.step, self.enabled, self.generator = step, enabled, generator
        self.warmup, self.recover = warmup, recover
        self.stream = torch.cuda.Stream() if enabled else None
        self.graph, self.reason = None, None

    def __call__(self):
        if self.enabled and self.graph is None and self.warmup <= 0:
            self._capture()
        if self.graph is not None:
            return self.graph.replay()
        if not self.enabled:
            return self.step()
        self.warmup -= 1
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.step()
        torch.cuda.current_stream().wait_stream(self.stream)

    def _capture(self):
        graph = torch.cuda.CUDAGraph()
        if self.generator is not None:
            graph.register_generator_state(self.generator)
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self.step()
            self.graph = graph
        except RuntimeError as error:
            self.enabled, self.reason = False, str(error).splitlines()[0]
            torch.cuda.synchronize()
            if self.recover:
                self.recover()


def repeat(step, times, device, generator=None, warmup=0):
    """Runs `step` so many times, as a CUDA graph where that is possible and pays."""
    graphed = CUDAGraphed(step, device.type == "cuda" and times > 8, generator, warmup)
    for _ in range(times):
        graphed()


# ----- cross-entropy over a large vocabulary -----
# Bound by memory: PyTorch's own writes copies of the logits in float32. On a CPU its chunks of rows
# stay in the cache; on CUDA one kernel reads a row for its loss and, while the row is in the
# cache, overwrites it by its gradient (the idea of Liger Kernel, Hsu et al. 2024).


def pad_vocab(weight):
    """A matrix (V, C); on CUDA in autocast's type and padded to full speed, 64 rows at a time."""
    if not weight.is_cuda:
        return weight
    autocast = torch.is_autocast_enabled("cuda")
    dtype = torch.get_autocast_dtype("cuda") if autocast else weight.dtype
    padded = weight.new_empty(len(weight) + -len(weight) % 64, weight.size(1), dtype=dtype)
    padded[: len(weight)] = weight
    padded[len(weight) :] = 0
    return padded


def vocab_losses(x, weight, targets, reduction="none"):
    """Cross-entropy of x (N, C) by weight (V, C) against targets (N,): (N,), or their mean."""
    if not x.is_cuda and len(weight) > 4096 and CHUNKED:
        return F.linear_cross_entropy(x, weight, targets, reduction=reduction, options=CHUNKED)
    if not torch.is_grad_enabled() and len(x) > 8192:
        parts = zip(x.split(8192), targets.split(8192), strict=True)  # for the memory
        losses = torch.cat([vocab_losses(part, weight, wanted) for part, wanted in parts])
    elif x.is_cuda and fused_loss_obstacle() is None:
        losses = FusedCrossEntropy.apply(x, weight, targets, torch.is_grad_enabled())
    else:
        logits = F.linear(x, pad_vocab(weight))[:, : len(weight)]
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
    return losses.mean() if reduction == "mean" else losses


# PyTorch 2.11 has no such options yet
CHUNKED = getattr(nn, "LinearCrossEntropyOptions", lambda **options: None)(batch_chunk_size=128)

if triton is not None:

    @triton.jit
    def _row_loss(logits, targets, losses, columns, width, GRADIENT: tl.constexpr):
        """One program a row: its loss; with GRADIENT logits become softmax - one-hot target."""
        log2e: tl.constexpr = 1.4426950408889634  # exp(z - top) as a fused product and 2 ** that
        row = tl.program_id(0).to(tl.int64)
        logits += row * width
        target = tl.load(targets + row)
        wanted = tl.load(logits + target).to(tl.float32)
        lanes = tl.arange(0, 1024)[:, None] * 8 + tl.arange(0, 8)[None, :]  # 16 bytes a lane
        largest = tl.full([1024], -1e30, tl.float32)  # running maximum and sum of each lane
        total = tl.zeros([1024], tl.float32)
        for start in range(0, width, 8192):
            column = start + lanes
            z = tl.load(logits + column, mask=column < width, other=0).to(tl.float32)
            z = tl.where(column < columns, z, -float("inf"))
            top = tl.maximum(largest, tl.max(z, 1))
            sums = tl.sum(tl.exp2(z * log2e - (top * log2e)[:, None]), 1)
            total = total * tl.exp(largest - top) + sums
            largest = top
        top = tl.max(largest, 0)
        normaliser = top + tl.log(tl.sum(total * tl.exp(largest - top), 0))
        tl.store(losses + row, normaliser - wanted)
        if GRADIENT:
            for start in range(0, width, 8192):
                column = start + lanes
                z = tl.load(logits + column, mask=column < width, other=0).to(tl.float32)
                z = tl.exp2(z * log2e - normaliser * log2e)
                z = tl.where(column < columns, z, 0.0)
                tl.store(logits + column, z, mask=column < width, cache_modifier=".cs")
            tl.debug_barrier()  # the whole row is written
            tl.store(logits + target, tl.exp(wanted - normaliser) - 1)


class FusedCrossEntropy(torch.autograd.Function):
    """Losses (N,) of x (N, C) by weight (V, C) against targets (N,) on CUDA, in autocast's type."""

    @staticmethod
    def forward(ctx, x, weight, targets, gradient):
        padded = pad_vocab(weight)
        states = x.to(padded.dtype)
        logits, losses = states @ padded.t(), torch.empty(len(x), device=x.device)
        sizes = {"columns": len(weight), "width": logits.size(1), "GRADIENT": gradient}
        _row_loss[(len(x),)](logits, targets, losses, **sizes, num_warps=16)
        if gradient:  # which the logits are now
            ctx.save_for_backward(states, padded, logits)
            ctx.columns, ctx.dtypes = len(weight), (x.dtype, weight.dtype)
        return losses

    @staticmethod
    def backward(ctx, scales):
        (states, padded, gradient), (dtype, weight_dtype) = ctx.saved_tensors, ctx.dtypes
        x_gradient = (gradient @ padded) * scales[:, None]
        scaled = (states * scales[:, None]).to(states.dtype)
        weight_gradient = torch.mm(gradient.t(), scaled, out_dtype=weight_dtype)[: ctx.columns]
        return x_gradient.to(dtype), weight_gradient, None, None


@functools.cache
def fused_loss_obstacle():
    """Why the fused loss cannot run on this machine's GPU; None if it can."""
    try:  # compiles both kernels: needs Triton, a C compiler and compute capability 7.0
        with torch.enable_grad():
            x, weight = (torch.zeros(n, 16, device="cuda", requires_grad=True) for n in (2, 60))
            targets = torch.zeros(2, dtype=torch.int64, device="cuda")
            FusedCrossEntropy.apply(x, weight, targets, True).sum().backward()
            torch.cuda.synchronize()
    except Exception as error:  # compilers fail in many ways
        return f"{type(error).__name__} from Triton" if triton else "Triton is not installed"
    return None
