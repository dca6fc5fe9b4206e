"""A GPT language model: pre-norm Transformer decoder with tied embeddings (Radford et al. 2019).

Parameter names and shapes are those of nanoGPT, so that checkpoints load both ways with `strict=True`.
Shapes in comments: B sequences, T positions, C channels, H heads, D channels a head, V vocabulary, S cache slots.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


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

    def __post_init__(self):
        for field in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}: give a whole number of at least 1.")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}: every head needs the same "
                f"number of channels, so choose n_embd as a multiple of n_head."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}: give a probability of at least 0 and below 1.")


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention in which no position sees a later one (Vaswani et al. 2017)."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None, positions=None):
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in self.c_attn(x).split(C, dim=2))
        if cache is None:
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)  # (B, H, T, D)
        else:
            keys, values = cache  # (B, H, S, D) each, filled up to the last position
            keys.index_copy_(2, positions, k.to(keys.dtype))
            values.index_copy_(2, positions, v.to(values.dtype))
            visible = torch.arange(keys.size(2), device=x.device) <= positions[:, None]  # (T, S)
            y = F.scaled_dot_product_attention(q.to(keys.dtype), keys, values, attn_mask=visible)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    """Position-wise feed-forward network, four times as wide inside."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x))))


class Block(nn.Module):
    """One pre-norm Transformer block."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, positions=None):
        x = x + self.attn(self.ln_1(x), cache, positions)
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
                ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # tied (Press and Wolf 2017)
        self.apply(self._init_weights)
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
        return total - self.transformer.wpe.weight.numel() if non_embedding else total

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """AdamW (Loshchilov and Hutter 2019) in PyTorch's fused form; only matrices decay, not biases and norms.

        `learning_rate` may be a tensor, so that a captured step reads a rate that changes.
        """
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        capturable = device_type == "cuda"
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True, capturable=capturable)

    def hidden(self, idx, cache=None, positions=None):
        """Token ids (B, T) to the normalised residual stream (B, T, C).

        With a `cache` from `new_cache`, `positions` (T,) says where in the sequence the tokens stand.
        """
        if idx.size(1) > self.config.block_size:
            raise ValueError(
                f"{idx.size(1)} tokens do not fit a block of {self.config.block_size}: crop the input to the block."
            )
        if positions is None:
            positions = torch.arange(idx.size(1), device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(positions))
        for layer, block in enumerate(self.transformer.h):
            x = block(x, None if cache is None else cache[layer], positions)
        return self.transformer.ln_f(x)

    def head(self, x):
        """Residual stream (..., C) to logits (..., V)."""
        if not x.is_cuda:
            return self.lm_head(x)
        # a matrix whose rows number a multiple of 64 runs on the aligned tensor-core kernels; the parameter keeps V
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
        weight = F.pad(self.lm_head.weight.to(dtype), (0, 0, 0, -self.config.vocab_size % 64))
        return F.linear(x, weight)[..., : self.config.vocab_size]

    def forward(self, idx, targets=None):
        """Token ids (B, T) and, if given, the next ids (B, T), -1 where none is to be predicted.

        Returns logits (B, T, V) and the mean loss in nats a token; without targets the logits of the last
        position alone (B, 1, V), and None.
        """
        x = self.hidden(idx)
        if targets is None:
            return self.head(x[:, -1:]), None
        logits = self.head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def new_cache(self, batch_size):
        """Room for the keys and values of one block: per layer a pair of tensors (B, H, block_size, D)."""
        config, weight = self.config, self.lm_head.weight
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else weight.dtype
        shape = (batch_size, config.n_head, config.block_size, config.n_embd // config.n_head)
        return [
            tuple(torch.zeros(shape, dtype=dtype, device=weight.device) for _ in range(2)) for _ in range(config.n_layer)
        ]

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
        if max_new_tokens < 0 or temperature < 0 or (top_k is not None and top_k < 1):
            raise ValueError(
                f"max_new_tokens {max_new_tokens}, temperature {temperature}, top_k {top_k}: give counts of at "
                f"least 0, a temperature of at least 0 and a top_k of at least 1 or None."
            )

    def _generate(self, idx, max_new_tokens, sample, use_cache):
        block, prompt = self.config.block_size, idx.size(1)
        tokens = F.pad(idx, (0, max_new_tokens))  # (B, T + new), filled from the left
        last = torch.tensor([prompt - 1], device=idx.device)  # index of the newest token, on the device
        window = torch.arange(1 - block, 1, device=idx.device)

        def append(logits):
            tokens.index_copy_(1, last + 1, sample(logits))
            last.add_(1)

        def from_cache():
            append(self.head(self.hidden(tokens.index_select(1, last), cache, last)))

        def from_window():
            append(self(tokens.index_select(1, last + window))[0])

        cached = min(max_new_tokens, block - prompt + 1) if use_cache else 0
        if cached > 0:
            cache = self.new_cache(idx.size(0))
            append(self.head(self.hidden(idx, cache, torch.arange(prompt, device=idx.device))[:, -1:]))
            replay(from_cache, cached - 1, idx.device, sample.generator)
        known, wanted = prompt + max(cached, 0), prompt + max_new_tokens
        for length in range(known, min(block, wanted)):  # without a cache each length up to the block comes once
            append(self(tokens[:, :length])[0])
        replay(from_window, wanted - max(known, min(block, wanted)), idx.device, sample.generator)
        return tokens


@dataclass(frozen=True)
class Sampler:
    """Draws the next token (B, 1) from logits (B, 1, V), without waiting for the device."""

    temperature: float
    top_k: int | None
    generator: torch.Generator | None

    def __call__(self, logits):
        logits = logits[:, -1].float()
        if self.temperature == 0:
            return logits.argmax(-1, keepdim=True)
        logits = logits / self.temperature
        if self.top_k is not None:
            kth = logits.topk(min(self.top_k, logits.size(-1))).values[:, -1:]
            logits = logits.masked_fill(logits < kth, -math.inf)
        # the largest p / e with e ~ Exp(1) is a draw from p; torch.multinomial would make the host wait
        waits = torch.empty_like(logits).exponential_(generator=self.generator)
        return (logits.softmax(-1) / waits).argmax(-1, keepdim=True)


class GraphedStep:
    """Calls `step` again and again; on CUDA, from the fourth call on, as one captured graph.

    `step` takes and returns nothing: it reads and writes tensors that stay where they are, and never asks the
    device for a value. The first calls run eagerly, do real work and warm up what capture needs. Where capture
    fails, `reason` says why and every call stays eager: the results are the same, only slower.
    """

    def __init__(self, step, enabled, generator=None, warmup=3):
        self.step, self.enabled, self.generator, self.warmup = step, enabled, generator, warmup
        self.stream = torch.cuda.Stream() if self.enabled else None
        self.graph, self.reason = None, None

    def __call__(self):
        if not self.enabled:
            return self.step()
        if self.graph is None and self.warmup <= 0:
            self._capture()
        if self.graph is not None:
            return self.graph.replay()
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


def replay(step, times, device, generator=None):
    """Runs `step` so many times, as a CUDA graph where that is possible and pays."""
    graphed = GraphedStep(step, enabled=device.type == "cuda" and times > 8, generator=generator)
    for _ in range(times):
        graphed()
