"""A GPT language model: pre-norm Transformer decoder with tied embeddings (Radford et al. 2019).

Parameter names and shapes are those of nanoGPT, so that checkpoints load both ways with `strict=True`.
Shapes in comments: B sequences, T positions, C channels, H heads, D channels a head, V vocabulary, S cache slots.
"""

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
    block_size: int = 256  # longest context, in tokens
    n_layer: int = 6  # Transformer blocks
    n_head: int = 6  # attention heads a block
    n_embd: int = 384  # channels of the residual stream
    dropout: float = 0.1  # probability, on embeddings, attention weights and block outputs
    bias: bool = True  # biases in linear layers and layer norms, as in GPT-2
    rotary: bool = False  # positions as turns of queries and keys (Su et al. 2021), instead of an embedding
    qk_norm: bool = False  # queries and keys of unit mean square (Henry et al. 2020)
    squared_relu: bool = False  # in place of GELU (So et al. 2021)
    rms_norm: bool = False  # norms without mean and weights (Zhang and Sennrich 2019), in place of layer norms
    pointer: bool = False  # the head may also copy a token of the context (Merity et al. 2016)

    def __post_init__(self):
        for field in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}: give a whole number of at least 1.")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}: every head needs the same "
                f"number of channels, so choose n_embd as a multiple of n_head."
            )
        if self.rotary and self.n_embd // self.n_head % 2:
            raise ValueError(
                f"A head has {self.n_embd // self.n_head} channels: rotary positions turn them in pairs, so choose "
                f"n_embd as an even multiple of n_head."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}: give a probability of at least 0 and below 1.")


def turns(positions, channels):
    """Cosines and sines (2, T, 1, D / 2) by which rotary embedding turns the channel pairs at positions (T,)."""
    speeds = 10_000.0 ** -torch.linspace(0, 1, channels // 2, device=positions.device)
    angles = positions[:, None, None].float() * speeds
    return torch.stack([angles.cos(), angles.sin()])


def turn(x, by):
    """Turns channel pairs of x (B, T, H, D) by `turns`."""
    (cos, sin), (a, b) = by, x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).type_as(x)


def norm(config):
    if config.rms_norm:
        return nn.RMSNorm(config.n_embd, elementwise_affine=False)
    return nn.LayerNorm(config.n_embd, bias=config.bias)


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention in which no position sees a later one (Vaswani et al. 2017)."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.qk_norm = config.n_head, config.qk_norm
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, by=None, past=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, -1)
        if self.qk_norm or by is not None:
            qkv = torch.stack([*(self.placed(part, by) for part in qkv[:, :, :2].unbind(2)), qkv[:, :, 2]], dim=2)
        if past is None:
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        else:
            cache, positions, mask = past  # (B, S, 2, H, D), (T,), (T, S)
            cache.index_copy_(1, positions, qkv[:, :, 1:])
            k, v = cache.permute(2, 0, 3, 1, 4)  # (B, H, S, D) each
            y = F.scaled_dot_product_attention(qkv[:, :, 0].transpose(1, 2), k, v, attn_mask=mask)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))

    def placed(self, x, by):
        """Queries or keys (B, T, H, D), normalised and turned to their positions."""
        if self.qk_norm:
            x = F.rms_norm(x, x.shape[-1:]).type_as(x)
        return x if by is None else turn(x, by)


class MLP(nn.Module):
    """Position-wise feed-forward network, four times as wide inside."""

    def __init__(self, config):
        super().__init__()
        self.squared_relu = config.squared_relu
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = self.c_fc(x)
        return self.dropout(self.c_proj(F.relu(x).square() if self.squared_relu else F.gelu(x)))


class Block(nn.Module):
    """One pre-norm Transformer block."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = norm(config)
        self.mlp = MLP(config)

    def forward(self, x, by=None, past=None):
        x = x + self.attn(self.ln_1(x), by, past)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The language model. `forward` gives logits and loss, `generate` continues a prompt."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                ln_f=norm(config),
            )
        )
        if config.rotary:
            del self.transformer["wpe"]
        if config.pointer:
            self.pointer = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
            self.sentinel = nn.Linear(config.n_embd, 1)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # tied (Press and Wolf 2017)
        self.apply(self._init_weights)
        if config.pointer:
            nn.init.constant_(self.sentinel.bias, math.log(config.block_size) + 1)  # at first, copy little
        # 2 * n_layer branches add into the residual stream; scaled so that its variance does not grow with depth
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))

    @staticmethod
    def _init_weights(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def get_num_params(self, non_embedding=True):
        """Number of parameters; like nanoGPT's, without the position embedding unless `non_embedding=False`.

        The token embedding counts, since the tied output layer uses it.
        """
        total = sum(parameter.numel() for parameter in self.parameters())
        return total - self.transformer.wpe.weight.numel() if non_embedding and not self.config.rotary else total

    def block_matrices(self):
        """The weights of the blocks' linear layers: what Muon is for."""
        return [parameter for parameter in self.transformer.h.parameters() if parameter.dim() == 2]

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type, leave_out=()):
        """AdamW (Loshchilov and Hutter 2019) in PyTorch's fused form; only matrices decay, not biases and norms.

        `learning_rate` may be a tensor, so that a captured step reads a rate that changes. What `leave_out`
        holds, another optimizer moves.
        """
        others = {id(parameter) for parameter in leave_out}
        parameters = [p for p in self.parameters() if p.requires_grad and id(p) not in others]
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        capturable = device_type == "cuda"
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True, capturable=capturable)

    def hidden(self, idx, cache=None, positions=None, blocks=None):
        """Token ids (B, T) to the normalised residual stream (B, T, C).

        With a `cache` from `new_cache`, `positions` (T,) says where in the sequence the tokens stand.
        """
        if idx.size(1) > self.config.block_size:
            raise ValueError(
                f"{idx.size(1)} tokens do not fit a block of {self.config.block_size}: crop the input to the block."
            )
        # sparse: the gradient of the batch's few rows is added to the output layer's dense one, in place
        x, by = F.embedding(idx, self.transformer.wte.weight, sparse=True), self.rotation(idx.size(1), positions)
        if by is None:
            x = x + (self.transformer.wpe.weight[: idx.size(1)] if positions is None else self.transformer.wpe(positions))
        x = self.transformer.drop(x)
        mask = None if cache is None else cache.mask[positions]
        for layer, block in enumerate(blocks or self.transformer.h):
            x = block(x, by, None if cache is None else (cache.layers[layer], positions, mask))
        return self.transformer.ln_f(x)

    def rotation(self, length, positions=None):
        """What rotary embedding turns the channels of the first `length` positions by, or of these; None without it."""
        if not self.config.rotary:
            return None
        places = torch.arange(length, device=self.lm_head.weight.device) if positions is None else positions
        return turns(places, self.config.n_embd // self.config.n_head)

    def output_weight(self):
        """The output layer's matrix as `head` multiplies with it: on CUDA in autocast's type and aligned."""
        return aligned(self.lm_head.weight) if self.lm_head.weight.is_cuda else self.lm_head.weight

    def head(self, x, weight=None, copies=None):
        """Residual stream (..., C) to logits (..., V); `weight` may hold `output_weight()` from before.

        With the `copies` of a pointer, the logits are logarithms of the probabilities of both ways together.
        """
        logits = F.linear(x, self.output_weight() if weight is None else weight)[..., : self.config.vocab_size]
        if copies is None:
            return logits
        share, ids = copies
        both = logits.float().softmax(-1) * share[..., -1:]
        return both.scatter_add(-1, ids, share[..., :-1]).clamp(min=1e-30).log()

    def copies(self, x, idx, cache=None, positions=None):
        """What a pointer would copy: None without one, else shares (B, T, S + 1) and ids (B, T, S).

        The shares sum to 1. The last is the sentinel's, that of the vocabulary; the others are those of the S
        tokens of the context `idx` (B, S), none of them later than its row. A token is found by the state at it
        and by the one before it.
        """
        if not self.config.pointer:
            return None
        query, at, after = self.pointer(x).chunk(3, dim=-1)
        if cache is None:
            keys, mask = at + F.pad(after, (0, 0, 1, -1)), x.new_full((x.size(1), x.size(1)), -math.inf).triu(1)
        else:
            keys, mask = cache.found_by(at, after, positions), cache.mask[positions]
        scores = (query @ keys.mT).float() / math.sqrt(x.size(-1)) + mask
        share = torch.cat([scores, self.sentinel(x).float()], dim=-1).softmax(-1)
        return share, idx[:, None].expand(-1, x.size(1), -1)

    def loss(self, idx, targets, blocks=None):
        """Mean loss in nats a token, as `forward` gives it, without keeping logits that nobody reads.

        Every target is an id here. `blocks` stand in for `transformer.h`: the same blocks, compiled.
        """
        x, weight = self.hidden(idx, blocks=blocks), self.lm_head.weight
        copies, rows, wanted = self.copies(x, idx), x.flatten(0, 1), targets.flatten()
        if x.is_cuda and fused_loss_obstacle() is None:
            nats = FusedCrossEntropy.apply(rows, weight, wanted)
        elif not x.is_cuda and self.config.vocab_size > 4096 and copies is None:  # fewer columns fit in the cache as they are
            return ChunkedCrossEntropy.apply(rows, weight, wanted)
        else:
            nats = F.cross_entropy(self.head(rows).float(), wanted, reduction="none")
        return with_copies(nats.view_as(targets), targets, copies).mean()

    @torch.no_grad()
    def nats(self, x, targets, copies=None):
        """Cross-entropy in nats (N,) of residual streams (N, C) against targets (N,), for evaluation."""
        if x.is_cuda and fused_loss_obstacle() is None:
            nats = row_losses(F.linear(x, self.output_weight()), targets, self.config.vocab_size)[0]
        elif not x.is_cuda:
            chunks = logit_chunks(x, self.lm_head.weight, targets)
            nats = torch.cat([F.cross_entropy(z, wanted, reduction="none") for z, wanted, _ in chunks])
        else:
            nats = F.cross_entropy(self.head(x).float(), targets, reduction="none")
        return with_copies(nats, targets, copies)

    def forward(self, idx, targets=None):
        """Token ids (B, T) and, if given, the next ids (B, T), -1 where none is to be predicted.

        Returns logits (B, T, V) and the mean loss in nats a token; without targets the logits of the last
        position alone (B, 1, V), and None.
        """
        x = self.hidden(idx)
        copies = self.copies(x, idx)
        if targets is None:
            return self.head(x[:, -1:], copies=last_of(copies)), None
        logits = self.head(x, copies=copies)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def new_cache(self, batch_size):
        """Room for the keys and values of `batch_size` sequences of one block."""
        return Cache(self.config, batch_size, self.lm_head.weight)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None, use_cache=True):
        """Continues the prompts `idx` (B, T) by `max_new_tokens` sampled tokens; returns (B, T + max_new_tokens).

        Temperature 0 takes the most likely token; `top_k` keeps the k most likely ones (all, if k exceeds the
        vocabulary). The context is cropped to the last block. Runs in eval mode and restores the mode.
        Within the first block, keys and values are cached; past it every learned position shifts with each
        token, so each token is computed from its whole window. Raises ValueError for an empty prompt, a token
        id beyond the vocabulary, or senseless sampling settings.
        """
        self._check_prompt(idx, max_new_tokens, temperature, top_k)
        was_training = self.training
        self.eval()
        try:
            return self._generate(idx, max_new_tokens, Sampler(temperature, top_k, generator), use_cache)
        finally:
            self.train(was_training)

    def _check_prompt(self, idx, max_new_tokens, temperature, top_k):
        if idx.dim() != 2 or idx.size(1) == 0:
            raise ValueError(f"The prompt has shape {tuple(idx.shape)}: give at least one token a sequence, (B, T).")
        if idx.min() < 0 or idx.max() >= self.config.vocab_size:
            raise ValueError(
                f"The prompt holds token id {idx.max() if idx.min() >= 0 else idx.min()}, beyond the model's "
                f"vocabulary of {self.config.vocab_size}: encode it with the tokenizer of the model's data set."
            )
        if max_new_tokens < 0 or not temperature >= 0 or (top_k is not None and top_k < 1):
            raise ValueError(
                f"max_new_tokens {max_new_tokens}, temperature {temperature}, top_k {top_k}: give counts of at "
                f"least 0, a temperature of at least 0 and a top_k of at least 1 or None."
            )

    def _generate(self, idx, max_new_tokens, sample, use_cache):
        block, prompt = self.config.block_size, idx.size(1)
        tokens = F.pad(idx, (0, max(max_new_tokens, block - prompt)))  # at least a block, filled from the left
        last = torch.tensor([prompt - 1], device=idx.device)  # index of the newest token, on the device
        window = torch.arange(1 - block, 1, device=idx.device)
        weight = self.output_weight()

        def append(logits):
            tokens.index_copy_(1, last + 1, sample(logits))
            last.add_(1)

        def from_cache(seen, positions):
            x = self.hidden(seen, cache, positions)
            copies = self.copies(x, tokens[:, :block], cache, positions)
            append(self.head(x[:, -1:], weight, last_of(copies)))

        def from_window():
            seen = tokens.index_select(1, last + window)
            x = self.hidden(seen)
            append(self.head(x[:, -1:], weight, last_of(self.copies(x, seen))))

        cached = min(max_new_tokens, block - prompt + 1) if use_cache else 0
        if cached > 0:
            cache = self.new_cache(idx.size(0))
            from_cache(idx, torch.arange(prompt, device=idx.device))
            replay(lambda: from_cache(tokens.index_select(1, last), last), cached - 1, idx.device, sample.generator)
        known, wanted = prompt + max(cached, 0), prompt + max_new_tokens
        for length in range(known, min(block, wanted)):  # without a cache each length up to the block comes once
            append(self(tokens[:, :length])[0])
        replay(from_window, wanted - max(known, min(block, wanted)), idx.device, sample.generator)
        return tokens[:, : prompt + max_new_tokens]


def with_copies(nats, targets, copies):
    """Nats (...) of targets (...) by the vocabulary, and, where there is a pointer, by its copies too."""
    if copies is None:
        return nats
    share, ids = copies
    copied = (share[..., :-1] * (ids == targets[..., None])).sum(-1)
    return -(copied + share[..., -1] * torch.exp(-nats)).clamp(min=1e-30).log()


def last_of(copies):
    return copies and tuple(part[:, -1:] for part in copies)


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal (Jordan et al. 2024), with decoupled decay, for matrices (rows, columns).

    PyTorch's own Muon reads the rate on the host, so no CUDA graph can hold its step, and takes matrix after
    matrix; this one takes those of a size together. `lr` is a tensor on the matrices' device, and `factor` says
    how much higher their rate is. Queries, keys and values count as three matrices.
    """

    _step_supports_amp_scaling = True  # so that a scaler does not ask the device for a value

    def __init__(self, matrices, lr, factor, weight_decay, momentum=0.95):
        super().__init__(matrices, dict(lr=lr, factor=factor, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix]["momentum"] = torch.zeros_like(matrix)
        gradients, momenta = [m.grad for m in matrices], [self.state[m]["momentum"] for m in matrices]
        overflow = getattr(self, "found_inf", None)
        if overflow is not None:  # fp16: such a step leaves everything as it is
            gradients = [torch.where(overflow > 0, momentum, g) for g, momentum in zip(gradients, momenta)]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov's
        rate = group["lr"] * group["factor"]
        if overflow is not None:
            rate = rate * (overflow == 0)
        torch._foreach_mul_(matrices, 1 - rate * group["weight_decay"])
        by_size = {}
        for matrix, direction in zip(matrices, ahead, strict=True):
            pieces = wide(direction)
            higher = max(1, matrix.size(0) / matrix.size(1) / len(pieces)) ** 0.5  # rate of a tall matrix
            by_size.setdefault(pieces.shape[1:], []).append((wide(matrix), pieces, higher))
        for parts in by_size.values():
            targets, pieces, factors = zip(*parts, strict=True)
            updates = orthogonal(torch.cat(pieces)).split([len(piece) for piece in pieces])
            for target, update, higher in zip(targets, updates, factors, strict=True):
                target.sub_(update * (rate * higher))


def wide(matrix):
    """Views (n, rows, columns) of a matrix with at most as many rows as columns: three squares, or one transposed."""
    rows, columns = matrix.shape
    if rows == 3 * columns:
        return matrix.view(3, columns, columns)
    return matrix[None] if rows <= columns else matrix.t()[None]


def orthogonal(matrices):
    """Matrices (n, rows, columns), rows <= columns, with all singular values brought near 1.

    Five Newton-Schulz steps with the coefficients of Jordan et al. (2024); in bf16 on CUDA.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.to(matrices.dtype)


class Cache:
    """Keys and values of one block: a tensor (B, S, 2, H, D) a layer, and the causal mask (S, S) to add to scores.

    With a pointer also what its tokens are found by, (B, S + 1, C).
    """

    def __init__(self, config, batch_size, weight):
        dtype = computing_dtype(weight)
        size, heads = config.block_size, config.n_head
        shape = (batch_size, size, 2, heads, config.n_embd // heads)
        self.layers = [torch.zeros(shape, dtype=dtype, device=weight.device) for _ in range(config.n_layer)]
        self.mask = torch.full((size, size), -math.inf, dtype=dtype, device=weight.device).triu(1)
        if config.pointer:
            self.found = torch.zeros(batch_size, size + 1, config.n_embd, dtype=dtype, device=weight.device)

    def found_by(self, at, after, positions):
        """Adds the pointer's keys of new positions (T,), `at` them and `after` them (B, T, C); returns all (B, S, C)."""
        self.found.index_copy_(1, positions + 1, after)
        self.found.index_add_(1, positions, at)
        return self.found[:, :-1]


@dataclass(frozen=True)
class Sampler:
    """Draws the next token (B, 1) from logits (B, 1, V), without waiting for the device."""

    temperature: float
    top_k: int | None
    generator: torch.Generator | None

    def __call__(self, logits):
        logits = logits[:, -1]
        if self.temperature == 0:
            return logits.argmax(-1, keepdim=True)
        if self.top_k is None or self.top_k >= logits.size(-1):
            return self.draw(logits)
        logits, ids = logits.topk(self.top_k, sorted=False)
        return ids.gather(-1, self.draw(logits))

    def draw(self, logits):
        # the largest logit / temperature - log(e) with e ~ Exp(1) is a draw from their softmax (Gumbel's trick);
        # torch.multinomial would make the host wait
        waits = torch.empty_like(logits, dtype=torch.float32).exponential_(generator=self.generator)
        return torch.sub(logits, waits.log_(), alpha=self.temperature).argmax(-1, keepdim=True)


class GraphedStep:
    """Calls `step` again and again; on CUDA, from the fourth call on, as one captured graph.

    `step` takes and returns nothing: it reads and writes tensors that stay where they are, and never asks the
    device for a value. The first calls run eagerly, do real work and warm up what capture needs. Where capture
    fails, `reason` says why and every call stays eager: the results are the same, only slower.
    """

    def __init__(self, step, enabled, generator=None, warmup=3, recover=lambda: None):
        self.step, self.enabled, self.generator, self.warmup, self.recover = step, enabled, generator, warmup, recover
        self.stream = torch.cuda.Stream() if self.enabled else None
        self.graph, self.reason = None, None

    def __call__(self):
        if not self.enabled:
            return self.step()
        if self.graph is None and self.warmup <= 0:
            self._capture()
        if self.graph is not None:
            return self.graph.replay()
        if not self.enabled:  # the capture has just failed
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
            self.recover()


def replay(step, times, device, generator=None):
    """Runs `step` so many times, as a CUDA graph where that is possible and pays."""
    graphed = GraphedStep(step, enabled=device.type == "cuda" and times > 8, generator=generator, warmup=0)
    for _ in range(times):
        graphed()



# Cross-entropy over a large vocabulary is bound by memory: PyTorch's own writes the logits and copies of them in
# float32. On a CPU the two classes of it below stay in the cache; on CUDA they read each row once for the loss, and
# once more to overwrite it by its gradient (the idea of Liger Kernel, Hsu et al. 2024).


def computing_dtype(weight):
    """The type in which a product with `weight` is computed: autocast's on CUDA where it is on, else its own."""
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else weight.dtype


def aligned(weight):
    """A matrix (V, C) in autocast's type, with zero rows up to a multiple of 64.

    Tensor cores multiply several times slower where rows of the product begin at odd addresses.
    """
    rows, columns = weight.shape
    padded = torch.zeros(rows + -rows % 64, columns, dtype=computing_dtype(weight), device=weight.device)
    padded[:rows] = weight
    return padded


def logit_chunks(x, weight, targets):
    """A few rows at a time, in one buffer: logits of x (N, C) by weight (V, C), targets (N,), and the rows' slice."""
    rows = max(64, 2**22 // len(weight))
    logits = x.new_empty(min(rows, len(x)), len(weight))
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        yield torch.mm(x[part], weight.t(), out=logits[: len(x[part])]), targets[part], part


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean loss of `x @ weight.T` against targets, x (N, C), weight (V, C), targets (N,), a few rows at a time.

    The gradients are made in the forward pass, while a chunk's logits are in the cache.
    """

    @staticmethod
    def forward(ctx, x, weight, targets):
        x_gradient, weight_gradient = torch.empty_like(x), torch.zeros_like(weight)
        total = x.new_zeros(())
        for z, wanted, part in logit_chunks(x, weight, targets):
            place = torch.arange(len(z), device=x.device), wanted
            total += (torch.logsumexp(z, dim=1) - z[place]).sum()
            torch.softmax(z, dim=1, out=z)
            z[place] -= 1.0
            torch.mm(z, weight, out=x_gradient[part])
            weight_gradient.addmm_(z.t(), x[part])
        ctx.save_for_backward(x_gradient, weight_gradient)
        return total / len(x)

    @staticmethod
    def backward(ctx, gradient):
        x_gradient, weight_gradient = ctx.saved_tensors
        scale = gradient / len(x_gradient)
        return x_gradient * scale, weight_gradient * scale, None


if triton is not None:

    @triton.jit
    def _row_loss(logits, targets, losses, normalisers, columns, width, BLOCK: tl.constexpr):
        """One program a row: the logarithm of the sum of exponentials in one pass, then the loss."""
        row = tl.program_id(0).to(tl.int64)
        largest = tl.full([BLOCK], -1e30, tl.float32)  # running maximum and sum, one of each a lane
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            z = tl.load(logits + row * width + column, mask=column < width, other=0.0).to(tl.float32)
            z = tl.where(column < columns, z, -float("inf"))
            e = tl.exp(-tl.abs(z - largest))
            total = tl.where(z > largest, total * e + 1, total + e)
            largest = tl.maximum(largest, z)
        top = tl.max(largest, 0)
        normaliser = top + tl.log(tl.sum(total * tl.exp(largest - top), 0))
        target = tl.load(targets + row)
        tl.store(normalisers + row, normaliser)
        tl.store(losses + row, normaliser - tl.load(logits + row * width + target).to(tl.float32))

    @triton.jit
    def _row_gradient(logits, targets, normalisers, scales, columns, width, BLOCK: tl.constexpr):
        """Overwrites logits by the row's scale * (softmax - one-hot target), and what pads a row by zero."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        place = logits + row * width + column
        z = tl.load(place, mask=column < width, other=0.0).to(tl.float32)
        z = tl.where(column < columns, z, -float("inf"))
        gradient = tl.exp(z - tl.load(normalisers + row)) - tl.where(column == tl.load(targets + row), 1.0, 0.0)
        tl.store(place, (tl.load(scales + row) * gradient).to(logits.dtype.element_ty), mask=column < width)


def row_losses(logits, targets, columns):
    """Losses (N,) of logits (N, V or more) over their first `columns`, and each row's log of the sum of exponentials."""
    losses, normalisers = (torch.empty(len(logits), device=logits.device) for _ in range(2))
    width = logits.size(1)
    _row_loss[(len(logits),)](logits, targets, losses, normalisers, columns, width, BLOCK=4096, num_warps=8)
    return losses, normalisers


class FusedCrossEntropy(torch.autograd.Function):
    """Losses (N,) of `x @ weight.T` against targets, x (N, C), weight (V, C), targets (N,), in autocast's type.

    Backward once: it overwrites the logits by their gradient.
    """

    @staticmethod
    def forward(ctx, x, weight, targets):
        padded = aligned(weight)
        states = x.to(padded.dtype)
        logits = states @ padded.t()
        losses, normalisers = row_losses(logits, targets, len(weight))
        ctx.save_for_backward(states, padded, targets, logits, normalisers)
        ctx.columns, ctx.dtypes = len(weight), (x.dtype, weight.dtype)
        return losses

    @staticmethod
    def backward(ctx, gradient):
        states, padded, targets, logits, normalisers = ctx.saved_tensors
        rows, width = logits.shape
        grid = (rows, triton.cdiv(width, 4096))
        _row_gradient[grid](logits, targets, normalisers, gradient.contiguous(), ctx.columns, width, BLOCK=4096, num_warps=8)
        weight_gradient = (logits.t() @ states)[: ctx.columns]
        return (logits @ padded).to(ctx.dtypes[0]), weight_gradient.to(ctx.dtypes[1]), None


@functools.cache
def fused_loss_obstacle():
    """Why the fused loss cannot run on this machine's card; None if it can."""
    if triton is None:
        return "Triton is not installed"
    try:  # compiles both kernels, which needs a C compiler and a card of capability 7.0 or later
        with torch.enable_grad():
            x, weight = (torch.zeros(rows, 16, device="cuda", requires_grad=True) for rows in (2, 60))
            FusedCrossEntropy.apply(x, weight, torch.zeros(2, dtype=torch.int64, device="cuda")).sum().backward()
        torch.cuda.synchronize()
    except Exception as error:  # compilers fail in many ways
        return f"{type(error).__name__} from Triton"
    return None
