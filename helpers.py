"""Settings, training, evaluation and figures of the report, in the order in which the data flows.

Nothing here holds state between calls: settings travel as one frozen object, functions return values, and a
run lives in its folder as `ckpt.pt` (best validation estimate) and `last.pt` (where to go on).
"""

import argparse
import ast
import contextlib
import copy
import functools
import gc
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import platform
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data.batches import ResidentBatches, StreamedBatches, get_batch, tokens_at, tokens_on
from data.dataset import load
from data.fetch import DataError, replacing
from data.prepare import NAMES, ROOT, prepare
from model import GPT, GPTConfig, GraphedStep, Muon, fused_loss_obstacle

# ---------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Settings:
    """One training run. Raises ValueError for values that cannot be trained with."""

    batch_size: int = 12  # sequences a forward pass
    block_size: int = 256  # tokens of context
    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    dropout: float = 0.1
    bias: bool = True
    rotary: bool = False  # this and the next four: see GPTConfig
    qk_norm: bool = False
    squared_relu: bool = False
    rms_norm: bool = False
    pointer: bool = False
    learning_rate: float = 1e-3  # peak, reached after the warm-up
    min_lr: float = 1e-4  # floor, reached when the last step is done
    decay_lr: bool = True  # cosine from the peak to the floor; False: the peak throughout
    max_iters: int = 5000  # optimizer steps
    warmup_iters: int = 200
    weight_decay: float = 0.1  # on matrices only
    muon_factor: float = 0.0  # Muon moves the blocks' matrices, at a rate so many times higher; 0: AdamW does
    beta1: float = 0.9
    beta2: float = 0.99
    grad_clip: float = 1.0  # largest norm of the whole gradient; 0: no clipping
    gradient_accumulation_steps: int = 1  # forward passes an optimizer step
    eval_interval: int = 250  # steps between two evaluations
    eval_iters: int = 200  # batches of one estimate
    seed: int = 1337
    compile: bool = False  # torch.compile on CUDA: its set-up pays from some ten thousand steps on

    def __post_init__(self):
        wanted = {int: "a whole number", float: "a number", bool: "True or False"}  # Python's own: a checkpoint holds no other
        for field in fields(self):
            kinds = (int, float) if field.type is float else (field.type,)
            _require(type(getattr(self, field.name)) in kinds, field.name, self, f"{wanted[field.type]} of Python's own type")
        at_least_one = ("batch_size", "block_size", "max_iters", "gradient_accumulation_steps", "eval_interval")
        for field in (*at_least_one, "eval_iters", "n_layer", "n_head", "n_embd"):
            value = getattr(self, field)
            _require(value >= 1, field, self, "a whole number of at least 1")
        for field in ("learning_rate", "min_lr"):
            _require(0 < getattr(self, field) < math.inf, field, self, "a number above 0")
        for field in ("weight_decay", "grad_clip", "muon_factor"):
            _require(0 <= getattr(self, field) < math.inf, field, self, "a number of at least 0")
        for field in ("warmup_iters", "seed"):
            value = getattr(self, field)
            _require(0 <= value < 2**32, field, self, "a whole number from 0 to 2**32 - 1")
        for field in ("beta1", "beta2", "dropout"):
            _require(0 <= getattr(self, field) < 1, field, self, "a number of at least 0 and below 1")
        _require(self.min_lr <= self.learning_rate, "min_lr", self, f"at most learning_rate {self.learning_rate}")
        self.model_config(vocab_size=1)

    def model_config(self, vocab_size):
        shape = {f.name: getattr(self, f.name) for f in fields(GPTConfig) if f.name != "vocab_size"}
        return GPTConfig(vocab_size=vocab_size, **shape)

    @property
    def sliding_stride(self):
        """Tokens by which sliding windows move on, wherever they score this run: a quarter of the block."""
        return max(1, self.block_size // 4)

    @property
    def tokens_per_step(self):
        return self.batch_size * self.block_size * self.gradient_accumulation_steps


def _require(holds, field, settings, wanted):
    if not holds:
        raise ValueError(f"{field} is {getattr(settings, field)!r}: give {wanted}.")


@dataclass(frozen=True)
class Preset:
    """The two runs of the report, and how much is scored and generated around them."""

    name: str
    wikitext2: Settings
    shakespeare: Settings
    needs_real_data: bool  # False: the stand-in will do where the real texts cannot be had
    score_everything: bool  # False: without the training split and validation by sliding windows, minutes on a CPU
    beyond: tuple = ()  # settings of the section beyond the plan, for both data sets; empty: kept results are shown
    seeds: int = 3  # runs of each of these
    new_tokens: int = 150  # generated tokens a sample
    temperature: float = 0.8
    top_k: int = 40


def choose_preset(name=None):
    """The preset called `name`, or else by NANOGPT_PRESET, or else `full` with CUDA and `quick` without."""
    name = name or os.environ.get("NANOGPT_PRESET") or ("full" if torch.cuda.is_available() else "quick")
    full = Settings()
    quick = Settings(
        batch_size=12, block_size=64, n_layer=4, n_head=4, n_embd=64, learning_rate=3e-3, min_lr=3e-4,
        dropout=0.0, max_iters=300, warmup_iters=30, eval_interval=50, eval_iters=20,
    )  # fmt: skip
    smoke = replace(
        quick, block_size=32, n_layer=2, n_head=2, n_embd=16, batch_size=4, max_iters=20, warmup_iters=4,
        eval_interval=5, eval_iters=2,
    )  # fmt: skip
    modern = dict(rotary=True, qk_norm=True, squared_relu=True, rms_norm=True, bias=False, min_lr=1e-5, compile=True)
    beyond = (
        replace(full, **modern, pointer=True, batch_size=8, block_size=1024, dropout=0.35, learning_rate=6e-4, muon_factor=33.0,
                max_iters=9600, warmup_iters=300, eval_interval=1600, eval_iters=25),
        replace(full, **modern, batch_size=64, dropout=0.4, muon_factor=20.0, weight_decay=0.3, max_iters=2500, warmup_iters=100,
                eval_interval=500, eval_iters=40),
    )  # fmt: skip
    plan = Preset("full", full, replace(full, max_iters=3000, learning_rate=3e-3, min_lr=3e-4), True, True)
    presets = {
        "full": plan,
        "record": replace(plan, name="record", beyond=beyond),
        "quick": Preset("quick", quick, replace(quick, n_embd=128, max_iters=800, eval_interval=100), False, False),
        "smoke": Preset("smoke", smoke, smoke, False, False, new_tokens=20),
    }
    if name not in presets:
        raise ValueError(f"There is no preset {name!r}: set NANOGPT_PRESET to one of {', '.join(presets)}.")
    return presets[name]


# ------------------------------------------------------------------------------------ device and precision


@dataclass(frozen=True)
class Precision:
    """Where and in which floating-point type a model runs, with the reason as text."""

    device: torch.device
    dtype: torch.dtype
    reason: str

    def autocast(self):
        """Mixed precision around a forward pass; float32 throughout where the type is float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def choose_precision(device=None):
    """bf16 on CUDA cards that compute in it (capability 8.0 on), fp16 with a scaler on older ones, else float32."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type != "cuda":
        return Precision(device, torch.float32, "float32, since half precision gains nothing dependable on a CPU")
    capability = torch.cuda.get_device_capability(device)
    version = ".".join(map(str, capability))
    if capability >= (8, 0):
        return Precision(device, torch.bfloat16, f"bf16, computed natively by capability {version}; needs no scaler")
    return Precision(device, torch.float16, f"fp16 with a gradient scaler: capability {version} only emulates bf16")


def describe_machine(precision):
    """What the run was made on, as plain text values."""
    cuda = precision.device.type == "cuda"
    card = torch.cuda.get_device_properties(precision.device) if cuda else None
    return {
        "device": f"{card.name}, {card.total_memory / 2**30:.0f} GiB" if cuda else f"CPU, {torch.get_num_threads()} threads",
        "precision": precision.reason,
        "PyTorch": torch.__version__,
        "CUDA": torch.version.cuda if cuda else "not used",
        "Python": platform.python_version(),
    }


# ------------------------------------------------------------------------------------- batches and schedule


def draw_starts(n_tokens, settings, step, batches):
    """First positions (batches, batch_size) of random windows, on the CPU.

    They depend on seed, step and sizes alone, so a resumed run draws what an unbroken one would, on any
    device. Step -1 is the evaluation's draw, the same at every evaluation.
    """
    check_length(n_tokens, settings.block_size)
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step + 1)
    return torch.randint(n_tokens - settings.block_size, (batches, settings.batch_size), generator=generator)


def check_length(n_tokens, block_size):
    if n_tokens <= block_size:
        raise ValueError(
            f"The split has {n_tokens} tokens and the block {block_size}: a window needs one token more than the "
            f"block, so use a longer text or a smaller block_size."
        )


def get_lr(step, settings):
    """Learning rate of a step: linear warm-up, then a cosine down to `min_lr` when the last is done."""
    if step < settings.warmup_iters:
        return settings.learning_rate * (step + 1) / (settings.warmup_iters + 1)
    if not settings.decay_lr:
        return settings.learning_rate
    if step >= settings.max_iters:
        return settings.min_lr
    progress = (step - settings.warmup_iters) / (settings.max_iters - settings.warmup_iters)
    return settings.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (settings.learning_rate - settings.min_lr)


# --------------------------------------------------------------------------------- several processes (torchrun)


def rank():
    """Which of the processes that train together this is: 0, the first, also where there is only one."""
    return dist.get_rank() if joined() else 0


def world_size():
    return dist.get_world_size() if joined() else 1


def joined():
    return dist.is_available() and dist.is_initialized()


def join_processes():
    """Joins the others that torchrun started, if it did; returns this one's device, None for the usual choice."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return None
    cuda, local, cards = torch.cuda.is_available(), int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if cuda and local >= cards:
        raise ValueError(f"There is no card for process {local + 1} of this machine: start {cards} by --nproc-per-node.")
    if cuda:
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return torch.device("cuda", local) if cuda else None


def summed(tensor):
    """The sum over all processes, in place."""
    if world_size() > 1 and tensor.numel():
        dist.all_reduce(tensor)
    return tensor


def from_first(make):
    """What `make()` gives in the first process, in every process; an error of it is raised in all."""
    if world_size() == 1:
        return make()
    box = [None]
    if rank() == 0:
        try:
            box[0] = make()
        except Exception as error:
            box[0] = error
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    if isinstance(box[0], Exception):
        raise box[0]
    return box[0]


def own_share(starts):
    """This process's part of first positions (steps, passes, batch), each as large as any other's."""
    ranks, (passes, batch) = world_size(), starts.shape[1:]
    if passes % ranks == 0:  # as many sequences a pass as on one card
        return starts[:, rank() :: ranks]
    if batch % ranks == 0:
        return starts[:, :, rank() :: ranks]
    raise ValueError(
        f"batch_size {batch} with gradient_accumulation_steps {passes} cannot be shared out to {ranks} processes: make one "
        f"of the two a multiple of {ranks}."
    )


# ----------------------------------------------------------------------------------------------- evaluation


def nats_of(model, idx, targets, chosen=None, words=None, places=None):
    """Cross-entropy in nats of the targets (B, T) behind windows `idx` (B, T): of all, or of the N where `chosen` (B, T) is true.

    Returns (1, N): among all tokens; or (2, N): among all, and among those that may follow at `places` (B, T) in the
    tree `words`.
    """
    x = model.hidden(idx)

    def pick(part):
        return part.flatten(0, 1) if chosen is None else part[chosen]

    rows = [pick(part) for part in (x, targets, *(model.copies(x, idx) or ()))]
    if words is None:  # as many rows together as a card of a few GB holds logits for
        parts = zip(*(part.split(8192) for part in rows), strict=True)
        return torch.cat([model.nats(states, wanted, copies or None) for states, wanted, *copies in parts])[None]
    parts = zip(*(part.split(2048) for part in (pick(places), *rows)), strict=True)
    both = [words.both(model.head(states, copies=copies or None).float(), wanted, at) for at, states, wanted, *copies in parts]
    return torch.cat(both, dim=1)


@contextlib.contextmanager
def evaluation_mode(model):
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def estimate_loss(model, tokens, settings, precision):
    """Mean loss over `eval_iters` random batches, in nats a token: for curves, not for tables.

    The windows are the same at every evaluation, and their draw is apart from the training's.
    """
    starts = draw_starts(len(tokens), settings, -1, settings.eval_iters).flatten().to(precision.device)
    total = torch.zeros((), dtype=torch.float64, device=precision.device)
    with evaluation_mode(model), precision.autocast():
        for part in starts[rank() :: world_size()].split(max(1, 16384 // settings.block_size)):
            x, y = get_batch(tokens, part, settings.block_size)
            total += nats_of(model, x, y).sum(dtype=torch.float64)
    return summed(total).item() / (len(starts) * settings.block_size)


@dataclass(frozen=True)
class Score:
    """A whole split scored once: `nats` is the sum over every token."""

    nats: float
    tokens: int
    bytes: int
    words: int | None  # with one end-of-line a line; None for characters

    @property
    def loss(self):
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def perplexity(self):
        """Per token."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self):
        return self.nats / math.log(2) / self.bytes

    @property
    def word_perplexity(self):
        """Per word, end-of-lines counted as words, as the WikiText-2 literature has it (Merity et al. 2016)."""
        return math.exp(self.nats / self.words) if self.words else None


def score_split(model, data, split, stride=None):
    """Scores every token of a split exactly once, in float32; returns a Score. See `token_nats`."""
    return score_of(token_nats(model, data, split, stride)[0], data, split)


def score_of(nats, data, split):
    return Score(nats.sum(dtype=torch.float64).item(), len(nats), data.bytes[split], data.words.get(split))


def token_nats(model, data, split, stride=None, words=None):
    """Nats of each of a split's tokens, in order: (1, N), among all tokens; or (2, N), among all, and among those of `words`.

    Without a stride, in non-overlapping blocks: a block's first token sees only the last token before it. With
    one, in windows that move on by `stride` tokens, so that each token sees at least block - stride others.
    The split's first token is predicted from a line end. `words` is a WordTree.
    """
    device, block = next(model.parameters()).device, model.config.block_size
    tokens, windows = scoring_windows(data, split, block, stride, device)
    places = words.places(data, split).to(device) if words else None
    with evaluation_mode(model):
        return torch.cat([
            nats_of(model, before, tokens_at(tokens, inside), scored, words, words and places[inside])
            for before, inside, scored in windows
        ], dim=1)  # fmt: skip


def scoring_windows(data, split, block, stride, device):
    """The tokens (N,) of a split, from `tokens_on`, and windows over them, some at a time.

    A window is the tokens (B, T) that it sees, the places (B, T) after them, and a mask (B, T) of those that it scores.
    """
    tokens = tokens_on(device, data.splits[split])
    stride = block if stride is None else stride
    if not 1 <= stride <= block:
        raise ValueError(f"stride is {stride}: give a number of tokens from 1 to the block's {block}.")

    def windows():
        for part in torch.arange(0, len(tokens), stride, device=device).split(max(1, 32768 // block)):
            starts = (part - (block - stride)).clamp(min=0)
            positions = starts[:, None] + torch.arange(block, device=device)
            scored = (positions >= part[:, None]) & (positions < (part + stride).clamp(max=len(tokens))[:, None])
            inside = positions.clamp(max=len(tokens) - 1)  # what overhangs the end is never seen: causal
            yield tokens_at(tokens, (inside - 1).clamp(min=0)).where(inside > 0, data.first_context), inside, scored

    return tokens, windows()


def mixed(nats):
    """Nats (N,) a token of an ensemble that averages its members' probabilities; `nats` (M, N) are theirs."""
    return math.log(len(nats)) - torch.logsumexp(-nats.double(), dim=0)


@dataclass(frozen=True, eq=False)
class WordTree:
    """The words of a training split, as a tree of tokens that says which token may come next.

    Published WikiText-2 models choose among the 33,278 words of its vocabulary, line end and `<unk>` included.
    So does a model of word pieces whose probabilities are shared out anew among the pieces that go on to one of
    these words. A word is a token that begins with a space, and those after it that do not.
    """

    first: torch.Tensor  # (R,) tokens that begin a word
    inner: torch.Tensor  # (nodes, K) tokens that go on from a node, filled up with -1
    ends: torch.Tensor  # (nodes,) whether a word may be complete there
    nodes: dict  # from a word's first tokens, a tuple, to its node; the empty one is between words
    words: frozenset  # each a tuple of tokens

    @functools.cache  # a walk of seconds, and the same for every model
    def places(self, data, split):
        """The node (N,) at which each token of a split is chosen. Raises ValueError for a word that is not in the tree."""
        places, before = [], 0
        for word in split_words(data, split):
            if word not in self.words:
                raise ValueError(f"{data.tokenizer.decode(word)!r} of the {split} split is no word of the training split: score without words.")
            # until the next one has begun, the word before could have gone on to a longer one
            places += [before, *(self.nodes[word[:length]] for length in range(1, len(word)))]
            before = self.nodes[word]
        return torch.tensor(places)

    def nats(self, logits, targets, places):
        """Nats (N,) of targets (N,), by logits (N, V) of the tokens that may come next at `places` (N,)."""
        inner = self.inner[places]
        within = logits.gather(1, inner.clamp(min=0)).masked_fill(inner < 0, -math.inf)
        between = logits[:, self.first].logsumexp(1).masked_fill(~self.ends[places], -math.inf)
        total = torch.cat([within, between[:, None]], dim=1).logsumexp(1)
        return total - logits.gather(1, targets[:, None])[:, 0]

    def both(self, logits, targets, places):
        """Nats (2, N): among all tokens, which alone has a gradient, and among those that may come next."""
        return torch.stack([F.cross_entropy(logits, targets, reduction="none"), self.nats(logits.detach(), targets, places)])


def split_words(data, split):
    """A split's words, each a tuple of tokens."""
    begins = np.array([data.tokenizer.decode([token]).startswith(" ") for token in range(data.vocab_size)])
    tokens = np.asarray(data.splits[split])
    starts = np.flatnonzero(begins[tokens])
    edges, tokens = [0, *starts[starts > 0].tolist(), len(tokens)], tokens.tolist()
    return [tuple(tokens[start:end]) for start, end in itertools.pairwise(edges)]


def word_tree(data, device):
    """The WordTree of a data set; None if its other splits hold words that the training split lacks."""
    words = frozenset(split_words(data, "train"))
    if not all(words.issuperset(split_words(data, split)) for split in data.splits if split != "train"):
        return None
    following = {(): set()}
    for word in sorted(words):
        for length in range(1, len(word)):
            following.setdefault(word[:length], set()).add(word[length])
        following.setdefault(word, set())
    inner = torch.full((len(following), max(1, *map(len, following.values()))), -1)
    for node, tokens in enumerate(following.values()):
        inner[node, : len(tokens)] = torch.tensor(sorted(tokens), dtype=torch.int64)
    ends = torch.tensor([not prefix or prefix in words for prefix in following])
    first = torch.tensor(sorted({word[0] for word in words}))
    nodes = {prefix: node for node, prefix in enumerate(following)}
    return WordTree(first.to(device), inner.to(device), ends.to(device), nodes, words)


def dynamic_nats(model, data, split, rate, precision, words=None, n_tokens=None):
    """Nats of a split's tokens, or of its first `n_tokens`, by a copy of the model that learns as it reads.

    Dynamic evaluation (Krause et al. 2018): an eighth of a block is scored, then learnt from in one step of Adam
    without first moments, then the next eighth is read. So no token moves an earlier score. Returns what `token_nats`
    does; with `words` or without, it is from the choice among all tokens that is learnt. Computed in bf16 where
    `precision` is, else in float32.
    """
    device, block = precision.device, model.config.block_size
    stride = max(1, block // 8)
    model = copy.deepcopy(model).eval()
    tokens = tokens_on(device, data.splits[split][:n_tokens], resident=True).long()
    places = words.places(data, split).to(device)[: len(tokens)] if words else torch.zeros_like(tokens)
    inputs = torch.cat([tokens.new_tensor([data.first_context]), tokens])
    length, inputs, tokens, places = len(tokens), *(F.pad(values, (0, block)) for values in (inputs, tokens, places))
    begins = torch.arange(0, length, stride, device=device)
    nats = torch.zeros(len(begins), 2 if words else 1, stride, device=device)
    row = torch.zeros(1, dtype=torch.int64, device=device)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, betas=(0.0, 0.999), fused=True, capturable=device.type == "cuda")

    def step():
        begin = begins[row]
        start = (begin - (block - stride)).clamp(min=0)
        scored = begin + torch.arange(stride, device=device)
        idx, rows = inputs[start + torch.arange(block, device=device)][None], scored - start
        with torch.autocast(device.type, torch.bfloat16, enabled=precision.dtype == torch.bfloat16):  # fp16 needs a scaler
            x = model.hidden(idx)
            copies = model.copies(x, idx)
            logits = model.head(x[0, rows], copies=copies and tuple(part[0, rows] for part in copies)).float()
        losses = words.both(logits, tokens[scored], places[scored]) if words else F.cross_entropy(logits, tokens[scored], reduction="none")[None]
        nats.index_copy_(0, row, losses.detach()[None])
        (losses[0] * (scored < length)).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        row.add_(1)

    graphed = GraphedStep(step, enabled=device.type == "cuda", recover=lambda: optimizer.zero_grad(set_to_none=True))
    for _ in range(len(begins)):
        graphed()
    return nats.transpose(0, 1).flatten(1)[:, :length]


def choose_rate(model, data, precision, rates=(1e-5, 2e-5, 4e-5)):
    """The rate of dynamic evaluation with the least loss on the first quarter of the validation split.

    Less would choose too high a rate: the longer the text, the lower the best one.
    """
    n_tokens = len(data.splits["val"]) // 4
    return min(rates, key=lambda rate: dynamic_nats(model, data, "val", rate, precision, n_tokens=n_tokens).mean().item())


def score_baselines(data, split):
    """Uniform, unigram and bigram models fitted to the training split; returns Scores by name.

    Unigram counts are smoothed by one, bigrams by a Dirichlet prior around the unigrams (MacKay and Peto 1995)
    whose strength is chosen on the validation split.
    """
    vocab, train = data.vocab_size, np.asarray(data.splits["train"]).astype(np.int64)
    unigram = (np.bincount(train, minlength=vocab) + 1) / (len(train) + vocab)
    strengths = (10, 30, 100, 300, 1000, 3000)
    pairs, counts = np.unique(train[:-1] * vocab + train[1:], return_counts=True)
    before = np.bincount(train[:-1], minlength=vocab)

    def bigram_nats(tokens, strength):
        contexts = np.concatenate([[data.first_context], tokens[:-1]])
        wanted = contexts * vocab + tokens
        found = np.searchsorted(pairs, wanted).clip(max=len(pairs) - 1)
        seen = np.where(pairs[found] == wanted, counts[found], 0)
        return -np.log((seen + strength * unigram[tokens]) / (before[contexts] + strength)).sum()

    held_out, tokens = (np.asarray(data.splits[name]).astype(np.int64) for name in ("val", split))
    best = min(strengths, key=lambda strength: bigram_nats(held_out, strength))
    nats = {
        "uniform": len(tokens) * math.log(vocab),
        "unigram": -np.log(unigram[tokens]).sum(),
        "bigram": bigram_nats(tokens, best),
    }
    sizes = (len(tokens), data.bytes[split], data.words.get(split))
    return {name: Score(float(value), *sizes) for name, value in nats.items()}


# ---------------------------------------------------------------------------------------------- checkpoints


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or used, and what to do about it."""


def write_atomically(path, write):
    """Calls `write(file)` on a temporary file beside `path`, then renames it: the old file stays until then."""
    try:
        with replacing(Path(path)) as file:
            write(file)
    except (DataError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError, caused by an OSError
        cause = error
        while not isinstance(cause, OSError) and (cause.__cause__ or cause.__context__):
            cause = cause.__cause__ or cause.__context__
        reason = getattr(cause, "strerror", None) or str(error).splitlines()[0]
        raise CheckpointError(
            f"{path} could not be written ({reason}): free disk space or choose another folder; what stood there "
            f"before is unharmed."
        ) from None


def save_checkpoint(path, checkpoint):
    write_atomically(path, lambda file: torch.save(checkpoint, file))


def checked_copy(path):
    """A file of torch.save in memory, every part with its right sum. Raises BadZipFile.

    torch checks neither these sums nor that the directory, by which it finds the parts, fits them.
    """
    whole = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(whole, "w") as copied:
        for part in archive.infolist():
            if part.compress_type or part.compress_size != part.file_size:
                raise zipfile.BadZipFile(f"{part.filename} is compressed")
            copied.writestr(part.filename, archive.read(part))
    whole.seek(0)
    return whole


def load_checkpoint(path):
    """Reads a checkpoint's plain values onto the CPU; never unpickles code. Raises CheckpointError."""
    try:
        checkpoint = torch.load(checked_copy(path), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(
            f"There is no checkpoint {path}: run the training cell that writes it first, with fresh=True if it was deleted."
        ) from None
    except pickle.UnpicklingError:
        raise CheckpointError(f"{path} holds more than plain values and was not opened: use a file you trust.") from None
    except MemoryError:
        raise
    except Exception as error:  # what is no checkpoint fails in many ways
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} is not a whole checkpoint ({reason}): train again with fresh=True, which replaces it.") from None
    if not isinstance(checkpoint, dict) or not {"model", "model_args", "iter_num"} <= checkpoint.keys():
        raise CheckpointError(f"{path} is no checkpoint of a GPT of this kind: delete it or choose another file.")
    return checkpoint


def load_model(path, device="cpu", vocab_size=None):
    """The model saved in a checkpoint of this project or of nanoGPT, in eval mode. Raises CheckpointError."""
    return model_of(load_checkpoint(path), path, device, vocab_size)


def model_of(checkpoint, path, device, vocab_size):
    """The model in a checkpoint that was read from `path`."""
    try:
        model = GPT(GPTConfig(**checkpoint["model_args"]))
        # a model that was compiled whole, as nanoGPT's is, has this before each of its names
        model.load_state_dict({name.removeprefix("_orig_mod."): value for name, value in checkpoint["model"].items()})
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} does not fit the model that it describes ({reason}): use another file.") from None
    if vocab_size not in (None, model.config.vocab_size):
        raise CheckpointError(
            f"{path} has a vocabulary of {model.config.vocab_size} and the data one of {vocab_size}: load the "
            f"checkpoint that was trained on this data."
        )
    return model.to(device).eval()


def start_weights(path, settings, data):
    """Weights by name to start a run of these settings from, and 16 digits that identify them. Raises CheckpointError.

    They come from a checkpoint of this project or of nanoGPT whose model has the same vocabulary and shape.
    """
    model = load_model(path)
    there, here = asdict(model.config), asdict(settings.model_config(data.vocab_size))
    differing = [f"{key} {there[key]!r} there, {here[key]!r} here" for key in here if "dropout" not in key and there[key] != here[key]]
    if differing:
        raise CheckpointError(f"{path} cannot start this run ({'; '.join(differing)}): change the settings, or start from another.")
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.numpy())
    return model.state_dict(), digest.hexdigest()[:16]


def check_same_run(checkpoint, settings, data, path, **more):
    """Refuses to go on from a checkpoint of other settings or data, or of other values of `more`; the error names what differs."""
    parts = [checkpoint.get(part) for part in ("settings", "data")]
    saved = {key: value for part in parts if isinstance(part, dict) for key, value in part.items()}
    saved |= {key: checkpoint.get(key) for key in more}
    wanted = {**asdict(settings), **data_identity(data), **more}
    differing = [
        f"{key} {saved.get(key)!r} there, {value!r} here" for key, value in wanted.items() if saved.get(key) != value
    ]
    if differing:
        raise CheckpointError(
            f"{path} belongs to another run ({'; '.join(differing)}): pass fresh=True to train anew, which replaces "
            f"it, or choose another folder."
        )


def unusable(path):
    return CheckpointError(f"{path} lacks what a run needs to go on: pass fresh=True to train anew, which replaces it.")


def data_identity(data):
    return {"data": data.name, "title": data.title, "vocab_size": data.vocab_size, "fingerprint": data.fingerprint}


# ------------------------------------------------------------------------------------------------- training


class LossOf(nn.Module):
    """`model.loss` as a module's forward, which DistributedDataParallel asks for."""

    def __init__(self, model, blocks):
        super().__init__()
        self.model, self.blocks = model, blocks

    def forward(self, x, y):
        return self.model.loss(x, y, self.blocks)


class Trainer:
    """A run's state on its device, and the one optimizer step that every device and precision takes.

    The step reads its batch and the rate of its row from tables, and writes loss and gradient norm into others:
    nothing in it waits for the host, so that a CUDA graph can hold it whole. Of several processes each takes its
    share of the batch. `resident`: see `tokens_on`.
    """

    def __init__(self, model, data, settings, precision, resident=None):
        self.model, self.settings, self.precision = model, settings, precision
        device, rows = precision.device, settings.eval_interval
        self.tokens = {name: tokens_on(device, data.splits[name], resident) for name in ("train", "val")}
        self.rate = torch.zeros((), device=device)
        betas = (settings.beta1, settings.beta2)
        matrices = model.block_matrices() if settings.muon_factor else []
        adamw = model.configure_optimizers(settings.weight_decay, self.rate, betas, device.type, leave_out=matrices)
        self.optimizers = {"optimizer": adamw}
        if matrices:
            self.optimizers["muon"] = Muon(matrices, self.rate, settings.muon_factor, settings.weight_decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision.dtype == torch.float16)
        self.together = 32 if device.type == "cuda" else 1  # steps queued before the host looks up
        shape = own_share(torch.empty(rows, settings.gradient_accumulation_steps, settings.batch_size, device="meta")).shape
        self.streamed, self.passes = not isinstance(self.tokens["train"], torch.Tensor), shape[1]
        batches = StreamedBatches if self.streamed else ResidentBatches
        self.batches = batches(self.tokens["train"], shape, settings.block_size, self.together, device)
        self.rates, self.losses, self.norms = (torch.zeros(rows, device=device) for _ in range(3))
        self.row = torch.zeros(1, dtype=torch.int64, device=device)
        self.blocks = compiled_blocks(model, precision, shape[2]) if settings.compile and device.type == "cuda" else None
        self.loss, alone = LossOf(model, self.blocks), world_size() == 1
        if not alone:
            self.loss = DistributedDataParallel(self.loss, device_ids=[device] if device.type == "cuda" else None)
        self.graphed_step = GraphedStep(self.step, enabled=device.type == "cuda" and alone, recover=self.forget_step)
        self.graphed_step.reason = None if alone else "several processes share the step"

    def fill_tables(self, first, last):
        """Positions and rates of the steps from `first` up to `last`."""
        n_tokens, passes = len(self.tokens["train"]), self.settings.gradient_accumulation_steps
        starts = [draw_starts(n_tokens, self.settings, step, passes) for step in range(first, last)]
        self.batches.begin(own_share(torch.stack(starts)))
        self.rates[: last - first] = torch.tensor([get_lr(step, self.settings) for step in range(first, last)])
        self.row.zero_()

    def step(self):
        self.model.zero_grad(set_to_none=True)
        self.rate.copy_(self.rates[self.row][0])
        total = torch.zeros_like(self.rate)
        for index in range(self.passes):
            x, y = self.batches.get(self.row, index)
            self.loss.require_backward_grad_sync = index == self.passes - 1  # as DistributedDataParallel.no_sync sets it
            with self.precision.autocast():
                loss = self.loss(x, y) / self.passes
            self.scaler.scale(loss).backward()
            total += loss.detach()
        for optimizer in self.optimizers.values():
            self.scaler.unscale_(optimizer)
        norm = clip_gradients(self.model.parameters(), self.settings.grad_clip)
        for optimizer in self.optimizers.values():
            self.scaler.step(optimizer)
        self.scaler.update()
        self.losses.index_copy_(0, self.row, total[None])
        self.norms.index_copy_(0, self.row, norm[None])
        self.row.add_(1)

    def slower_because(self):
        """Which fast path this card or machine does not have, as text; None if it has all, or is a CPU."""
        if self.precision.device.type != "cuda":
            return None
        graph, loss = self.graphed_step.reason, fused_loss_obstacle()
        reasons = (graph and f"no CUDA graph ({graph})", loss and f"no fused loss ({loss})")
        return ", ".join(filter(None, reasons)) or None

    def forget_step(self):
        """After a capture that failed: nothing of the step was computed, so nothing of it may stay."""
        self.model.zero_grad(set_to_none=True)
        if self.scaler.is_enabled():
            self.scaler.update(self.scaler.get_scale())  # the same scale, and no trace of the step in the scaler

    def advance(self, first, last, stop, progress):
        """Takes the steps from `first` up to `last`, or to where a stop is asked for.

        Returns the losses and gradient norms of the steps taken, one float each.
        """
        self.fill_tables(first, last)
        step = first
        while step < last and not stop.asked():
            until = min(step + self.together, last)
            for _ in range(step, until):
                self.graphed_step()
            step = until
            self.batches.prefetch(step - first)
            if self.precision.device.type == "cuda":
                torch.cuda.synchronize()
            progress(step)
        taken = step - first
        return (summed(self.losses[:taken]) / world_size()).tolist(), self.norms[:taken].tolist()

    def state(self):
        """Everything that the next step depends on, as plain values and tensors."""
        cuda = self.precision.device.type == "cuda"
        return {
            "model": self.model.state_dict(),
            **{name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "scaler": self.scaler.state_dict(),
            "rng": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.precision.device) if cuda else None,
            },
        }

    def load_state(self, state):
        self.model.load_state_dict(state["model"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name])
            for group in optimizer.param_groups:
                group["lr"] = self.rate  # loading put a copy there, which the step would not move
                if "capturable" in group:
                    group["capturable"] = self.precision.device.type == "cuda"  # the file may be of another device
        if state["scaler"]:  # there is none, where the run began in another precision
            self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"]["cpu"])
        if self.precision.device.type == "cuda" and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.precision.device)


def compiled_blocks(model, precision, batch_size=1):
    """The model's blocks through torch.compile, or None, with one printed line, where that fails.

    Block by block, since they are alike and compile once: the whole model takes three times as long to
    compile and is little faster.
    """
    blocks = [torch.compile(block) for block in model.transformer.h]
    try:  # compilers fail in many ways, all at the first call
        with precision.autocast():
            shape = (batch_size, model.config.block_size, model.config.n_embd)
            x = torch.zeros(shape, device=precision.device, requires_grad=True)
            blocks[0](x, model.rotation(x.size(1)), None).sum().backward()
        return blocks
    except Exception as error:
        print(f"Training runs uncompiled, a little slower: {type(error).__name__} from torch.compile.")
        return None
    finally:
        model.zero_grad(set_to_none=True)


def clip_gradients(parameters, largest):
    """Scales the gradients so that their joint norm is at most `largest` (0: as they are); returns the norm."""
    parameters = list(parameters)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if largest > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm


class TrainingError(RuntimeError):
    """Training cannot go on: what happened at which step, and what to change."""


class StopRequests:
    """While entered, an interrupt or a termination is only noted, so that training ends at a step's edge.

    A second one acts at once, as outside. Only the main thread can catch signals; elsewhere nothing changes.
    """

    caught = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.received, self.previous = None, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self.note) for number in self.caught}
        return self

    def note(self, number, frame):
        self.received = number
        self.__exit__()

    def asked(self):
        """Whether any process has received one; all of them ask at the same steps, and so stop at the same one."""
        if world_size() == 1:
            return self.received is not None
        number = torch.tensor(self.received or 0)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        self.received = self.received or number.item() or None  # one that came since is agreed on next time
        return number.item() > 0

    def __exit__(self, *error):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def pass_on(self):
        """A termination, once the work is saved, does what it would have done; an interrupt is answered already."""
        if self.received == signal.SIGTERM:
            signal.raise_signal(self.received)


HISTORY_KEYS = ("iter", "train_loss", "val_loss", "learning_rate", "time", "seconds", "tokens", "grad_norm", "peak_memory")


def new_history():
    """One list a quantity. A row each evaluation; `step_loss` and `step_grad_norm` have one each step.

    iter: steps done. train_loss, val_loss: 200-batch estimates, nats a token. learning_rate: of the next step.
    time: training seconds since the row before. seconds, tokens: trained so far. grad_norm: mean since the row
    before, ahead of clipping. peak_memory: bytes. No time holds evaluation.
    """
    return {key: [] for key in (*HISTORY_KEYS, "step_loss", "step_grad_norm")}


def record(history, trainer, step, seconds):
    """Evaluates, and appends one row to the history."""
    settings = trainer.settings
    since = history["iter"][-1] if history["iter"] else 0
    norms = [norm for norm in history["step_grad_norm"][since:step] if math.isfinite(norm)]
    row = {
        "iter": step,
        "learning_rate": get_lr(step, settings),
        "time": seconds - (history["seconds"][-1] if history["seconds"] else 0.0),
        "seconds": seconds,
        "tokens": step * settings.tokens_per_step,
        "grad_norm": sum(norms) / len(norms) if norms else 0.0,
        "peak_memory": peak_memory(trainer.precision.device),
    }
    for split in ("train", "val"):
        row[f"{split}_loss"] = estimate_loss(trainer.model, trainer.tokens[split], settings, trainer.precision)
    for key, value in row.items():
        history[key].append(value)


def peak_memory(device):
    """Bytes: allocated on the card, or of the whole process on a CPU (0 where the system does not say)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def check_finite(taken, first, trainer):
    """Stops a run whose loss or gradient is no number; fp16 overflow is the scaler's to skip."""
    scaled = trainer.scaler.is_enabled()
    for offset, (loss, norm) in enumerate(zip(*taken)):
        if not math.isfinite(loss) or not (scaled or math.isfinite(norm)):
            step = first + offset
            scale = f", scale {trainer.scaler.get_scale():g}" if scaled else ""
            raise TrainingError(
                f"Step {step} gave loss {loss} and gradient norm {norm} at learning rate "
                f"{get_lr(step, trainer.settings):.2e}{scale}: lower learning_rate or raise warmup_iters; the best "
                f"checkpoint so far is kept."
            )


def check_evaluated(history, trainer):
    """Stops a run whose weights give no finite loss, before they are saved over good ones."""
    step, losses = history["iter"][-1], (history["train_loss"][-1], history["val_loss"][-1])
    if not all(map(math.isfinite, losses)):
        raise TrainingError(
            f"After step {step} the estimates are {losses[0]} and {losses[1]} at learning rate "
            f"{get_lr(max(step - 1, 0), trainer.settings):.2e}: lower learning_rate or raise warmup_iters; the best "
            f"checkpoint so far is kept."
        )


def train_model(
    model, data, settings, out_dir, *, precision=None, fresh=False, view=None, save_seconds=30.0, start_from=None, resident=None
):
    """Trains a model of this shape on `data`, from its seed's initial weights; returns the history.

    `start_from` is a checkpoint to take the initial weights from instead, and no more than these, as for fine-tuning.
    `model` then holds the weights of the last step, whatever it held before.

    Writes `out_dir/ckpt.pt`, the step with the best validation estimate, and `out_dir/last.pt`; unsaved work is
    at most `save_seconds` of training and one evaluation interval. Called again it goes on from `last.pt`, to
    the same end as a run never stopped, or, if that run is finished, only loads it; `fresh=True` starts over.
    An interrupt or a termination ends at a step's edge, saves and returns (a termination then takes its course).
    Under torchrun all processes call this alike, after `join_processes`; the first one writes. `resident`: see `tokens_on`.
    Raises CheckpointError for a checkpoint of another run, TrainingError for a loss that is no number and where
    the memory does not suffice.
    """
    precision = precision or choose_precision()
    for split in ("train", "val"):
        check_length(len(data.splits[split]), settings.block_size)
    if model.config != settings.model_config(data.vocab_size):
        raise ValueError("The model does not have the shape of these settings and this data: make it with make_model.")
    start = from_first(lambda: start_weights(start_from, settings, data)) if start_from else (None, None)
    with StopRequests() as stop:
        history = None
        with contextlib.suppress(torch.OutOfMemoryError):
            history = train_loop(
                model, data, settings, precision, RunStore(Path(out_dir), settings, data, save_seconds, *start), fresh,
                view or SilentView(), stop, resident,
            )  # fmt: skip
    if history is None:  # out here nothing of the run is held any more, so the same kernel can try smaller values
        model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
        raise TrainingError(
            f"The memory of {precision.device} does not suffice for batch_size {settings.batch_size} and block_size "
            f"{settings.block_size}: lower batch_size, and raise gradient_accumulation_steps to keep the batch's size."
        )
    stop.pass_on()
    return history


def train_loop(model, data, settings, precision, store, fresh, view, stop, resident=None):
    """Steps and evaluations in turn, from where the store says, to the end or to a stop; returns the history."""
    model.to(precision.device).train()
    if precision.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(precision.device)
    trainer = Trainer(model, data, settings, precision, resident)
    history, step, seconds = store.resume(trainer, fresh)
    if step < settings.max_iters:
        from_first(store.check_writable)
        if trainer.streamed and rank() == 0:
            print(f"The {len(data.splits['train']):,} training tokens stay on the disk, since {precision.device} has too little "
                  "room for them; batches are fetched ahead of the steps.")  # fmt: skip
    view.began(step)
    with store.keeping_best():
        while True:
            if step not in history["iter"] and (step % settings.eval_interval == 0 or step == settings.max_iters):
                record(history, trainer, step, seconds)
                check_evaluated(history, trainer)
                store.keep(trainer, history, step, seconds)
                view.evaluated(history)
            if step == settings.max_iters or stop.asked():
                break
            last = min(step - step % settings.eval_interval + settings.eval_interval, settings.max_iters)
            started = time.perf_counter()
            taken = trainer.advance(step, last, stop, view.progress)
            seconds += time.perf_counter() - started
            check_finite(taken, step, trainer)
            history["step_loss"] += taken[0]
            history["step_grad_norm"] += taken[1]
            step += len(taken[0])
    store.finish(trainer, history, step, seconds)
    summed(torch.zeros(1))  # nobody leaves before the files are written
    view.finished(history, step, trainer.slower_because())
    return history


class RunStore:
    """The two checkpoint files of a run: what is in them, and when the first process writes them."""

    def __init__(self, folder, settings, data, save_seconds, weights=None, start=None):
        self.best_path, self.last_path = folder / "ckpt.pt", folder / "last.pt"
        self.settings, self.data, self.save_seconds = settings, data, save_seconds
        self.weights, self.start = weights, start  # to start from in place of the seed's, and what identifies them
        self.unsaved_best, self.saved_step, self.saved_at = None, None, time.monotonic()

    def resume(self, trainer, fresh):
        """Puts a saved state into the trainer, or the seed into a new run; returns history, step and seconds."""
        checkpoint = from_first(lambda: None if fresh or not self.last_path.exists() else self.saved_state())
        if checkpoint is None:
            trainer.model.load_state_dict(self.weights or make_model(self.settings, self.data).state_dict())
            torch.manual_seed(self.settings.seed + rank())  # dropout differs from process to process
            return new_history(), 0, 0.0
        try:
            trainer.load_state(checkpoint)
        except torch.OutOfMemoryError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError):
            raise unusable(self.last_path) from None
        if rank():  # the file holds the first one's generator: with dropout the others go on in another way, no worse
            torch.manual_seed((self.settings.seed + rank()) * 1_000_003 + checkpoint["iter_num"])
        self.saved_step = checkpoint["iter_num"]
        return checkpoint["history"], checkpoint["iter_num"], checkpoint["seconds"]

    def saved_state(self):
        """The last checkpoint, if both are of this very run. Raises CheckpointError."""
        checkpoint, best = (self.read(path) for path in (self.last_path, self.best_path))
        # a best state ahead of the last one is from a kill between the two writes: going on comes past it again
        if best["iter_num"] <= checkpoint["iter_num"] and best["best_val_loss"] != checkpoint["best_val_loss"]:
            raise CheckpointError(
                f"{self.best_path} is not the best state of the run in {self.last_path}: pass fresh=True to train anew, "
                f"which replaces both, or choose another folder."
            )
        return checkpoint

    def check_writable(self):
        """Fails before the first step, not at the first save. Raises CheckpointError."""
        folder = self.last_path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"room for at least this")
        except OSError as error:
            raise CheckpointError(
                f"{self.last_path} cannot be written ({error.strerror}): free disk space or choose another folder."
            ) from None

    def read(self, path):
        """A whole checkpoint of this very run. Raises CheckpointError."""
        checkpoint = load_checkpoint(path)
        check_same_run(checkpoint, self.settings, self.data, path, start_from=self.start)
        dicts, numbers = ("model", "model_args", "optimizer", "scaler", "rng", "history"), ("best_val_loss", "seconds")
        kinds = {**dict.fromkeys(dicts, dict), **dict.fromkeys(numbers, float), "iter_num": int}
        whole = all(isinstance(checkpoint.get(part), kind) for part, kind in kinds.items())
        if not whole or checkpoint["history"].keys() != new_history().keys():
            raise unusable(path)
        return checkpoint

    def checkpoint(self, trainer, history, step, seconds):
        return {
            **trainer.state(),
            "model_args": asdict(trainer.model.config),
            "settings": asdict(self.settings),
            "data": data_identity(self.data),
            "start_from": self.start,
            "iter_num": step,
            "best_val_loss": min(history["val_loss"]),
            "history": history,
            "seconds": seconds,
        }

    def keep(self, trainer, history, step, seconds):
        """After an evaluation: holds the state if it is the best, and writes both files when it is time."""
        if rank():
            return
        if history["val_loss"][-1] == min(history["val_loss"]):
            self.unsaved_best = copy.deepcopy(self.checkpoint(trainer, history, step, seconds))
        if time.monotonic() - self.saved_at >= self.save_seconds:
            self.write(trainer, history, step, seconds)

    def write(self, trainer, history, step, seconds):
        if rank():
            return
        # the best first: were only it written, going on from the older last would come past it again
        if self.unsaved_best is not None:
            save_checkpoint(self.best_path, self.unsaved_best)
        save_checkpoint(self.last_path, self.checkpoint(trainer, history, step, seconds))
        self.unsaved_best, self.saved_step, self.saved_at = None, step, time.monotonic()

    @contextlib.contextmanager
    def keeping_best(self):
        """Writes the best state so far, if training breaks off before it is on the disk."""
        try:
            yield
        except (TrainingError, torch.OutOfMemoryError):
            if self.unsaved_best is not None:
                save_checkpoint(self.best_path, self.unsaved_best)
            raise

    def finish(self, trainer, history, step, seconds):
        if step != self.saved_step:
            self.write(trainer, history, step, seconds)


def make_model(settings, data):
    """A new model for a data set, its initial weights fixed by the seed."""
    torch.manual_seed(settings.seed)
    return GPT(settings.model_config(data.vocab_size))


# ------------------------------------------------------------------------------------- what a reader watches


class SilentView:
    """Shows nothing: for tests."""

    def began(self, step):
        pass

    def progress(self, step):
        pass

    def evaluated(self, history):
        pass

    def finished(self, history, step, reason):
        pass


def loss_rows(history):
    """The table of a run: one row an evaluation."""
    header = ("step", "train loss", "validation loss", "learning rate", "gradient norm", "tokens/s")
    rows = [
        (f"{h['iter']:,}", f"{h['train_loss']:.4f}", f"{h['val_loss']:.4f}", f"{h['learning_rate']:.2e}",
         f"{h['grad_norm']:.2f}" if h["iter"] else "", f"{h['rate']:,.0f}" if h["iter"] else "")
        for h in history_rows(history)
    ]  # fmt: skip
    return header, rows


def history_rows(history):
    """The history as one dict an evaluation, with `rate`, tokens/s since the one before."""
    before = [0, *history["tokens"]]
    rows = [dict(zip(HISTORY_KEYS, values)) for values in zip(*(history[key] for key in HISTORY_KEYS))]
    return [{**row, "rate": (row["tokens"] - b) / row["time"] if row["time"] else 0.0} for row, b in zip(rows, before)]


def overflows(history):
    """Steps whose gradient was no number: in fp16 the scaler leaves them out and lowers its scale."""
    return sum(not math.isfinite(norm) for norm in history["step_grad_norm"])


def tokens_per_second(history):
    """Training throughput; the first interval, which holds compilation and capture, is left out."""
    first = min(1, len(history["iter"]) - 2)
    seconds = history["seconds"][-1] - history["seconds"][first]
    return (history["tokens"][-1] - history["tokens"][first]) / seconds if seconds > 0 else 0.0


def markdown_table(header, rows):
    """A table that renders everywhere, GitHub included."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


class LiveView:
    """One progress line, one growing loss curve and one growing table in a notebook; a bar elsewhere."""

    def __init__(self, data, settings, color):
        self.title, self.unit, self.settings, self.color = data.title, unit_of(data), settings, color
        self.first, self.started, self.shown_at = 0, None, 0.0
        self.line = self.picture = self.table = self.bar = None
        if in_notebook():
            from IPython.display import Markdown, display

            self.show = Markdown
            self.line = display(Markdown(""), display_id=True)
            self.picture = display(Markdown(""), display_id=True)
            self.table = display(Markdown(""), display_id=True)

    def began(self, step):
        self.first = step
        if self.line is None:
            self.bar = tqdm(total=self.settings.max_iters, desc=self.title, unit="step")

    def progress(self, step):
        now = time.perf_counter()
        if self.started is None:
            self.started = step, now
        elif now - self.shown_at > 0.5:
            self.shown_at = now
            speed = (step - self.started[0]) / (now - self.started[1])
            self._say(step, f"{speed * self.settings.tokens_per_step:,.0f} tokens/s, "
                            f"about {(self.settings.max_iters - step) / speed:,.0f} s left")  # fmt: skip

    def evaluated(self, history):
        if self.table is None:
            self.bar.set_postfix(val_loss=f"{history['val_loss'][-1]:.4f}")
            return
        figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
        plot_losses(axes, history, self.title, self.color, self.unit)
        self.picture.update(figure)
        plt.close(figure)
        self.table.update(self.show(markdown_table(*loss_rows(history))))

    def finished(self, history, step, reason):
        if reason:
            print(f"The training step ran more slowly, but to the same end: {reason}.")
        if step < self.settings.max_iters:
            state = "interrupted and saved: run this cell again to go on"
        elif self.first == step:
            state = "finished before and now loaded, not trained again (fresh=True would)"
        else:
            state = f"finished, gone on from step {self.first:,}" if self.first else "finished"
        if overflows(history):
            state += f" with {overflows(history)} steps left out for overflow in fp16"
        self.evaluated(history)
        if history["seconds"][-1]:
            state += (
                f"; {history['seconds'][-1]:,.1f} s of training, {tokens_per_second(history):,.0f} tokens/s after the first interval"
            )
        self._say(step, state)
        if self.bar is not None:
            self.bar.close()

    def _say(self, step, text):
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
            if step == self.settings.max_iters or "interrupted" in text:
                self.bar.write(f"{self.title}: {text}.")
        else:
            self.line.update(self.show(f"**{self.title}**: step {step:,} of {self.settings.max_iters:,}; {text}."))


def in_notebook():
    """Whether a Jupyter kernel runs this, which can show pictures."""
    if "IPython" not in sys.modules:
        return False
    shell = sys.modules["IPython"].get_ipython()
    return shell is not None and hasattr(shell, "kernel")


# ------------------------------------------------------------------------------------- runs in the report


def unit_of(data):
    """What one id of a data set stands for."""
    return {"char": "character", "bytes": "byte"}.get(data.tokenizer.name, "token")


@dataclass(frozen=True)
class Run:
    """A trained run as the report reads it."""

    data: object  # the data set, as data.dataset.load gives it
    settings: Settings
    history: dict
    folder: Path
    color: str

    @property
    def title(self):
        return self.data.title

    @property
    def unit(self):
        return unit_of(self.data)

    @property
    def steps(self):
        """Steps trained; fewer than asked for after an interrupt."""
        return len(self.history["step_loss"])

    @property
    def best(self):
        """The history's row with the lowest validation estimate."""
        return min(history_rows(self.history), key=lambda row: row["val_loss"])

    @property
    def last(self):
        return history_rows(self.history)[-1]

    @property
    def passes(self):
        """How often the training text was read, on average."""
        return self.last["tokens"] / len(self.data.splits["train"])

    @property
    def final_split(self):
        """What the final figures are of: the test split where there is one."""
        return "test" if "test" in self.data.splits else "val"

    @property
    def paces(self):
        """Validation gain in nats per 1000 steps with the rate above half its peak, and below it.

        The first sixth of the run, where everything falls fast, is left out.
        """
        rows = [row for row in history_rows(self.history) if row["iter"] >= self.last["iter"] / 6]
        high = [row for row in rows if row["learning_rate"] > self.settings.learning_rate / 2] or rows[:1]
        return tuple(
            1000 * (part[0]["val_loss"] - part[-1]["val_loss"]) / max(1, part[-1]["iter"] - part[0]["iter"])
            for part in (high, rows[len(high) - 1 :])
        )

    @property
    def learnt_late(self):
        """Whether validation gained clearly faster, by a fifth or more, once the rate had fallen below half its peak."""
        high, low = self.paces
        return low > max(0.0, 1.2 * high)

    @property
    def gap(self):
        """Validation minus training estimate at the end, nats a token."""
        return self.last["val_loss"] - self.last["train_loss"]

    def load(self, which, device):
        """The model of the `best` or `last` checkpoint."""
        name = {"best": "ckpt.pt", "last": "last.pt"}[which]
        path = Path(self.folder) / name
        checkpoint = load_checkpoint(path)
        check_same_run(checkpoint, self.settings, self.data, path)  # another process may have written there
        return model_of(checkpoint, path, device, self.data.vocab_size)


class Stopwatch:
    """What took how long: `lap` names the time since the lap before."""

    def __init__(self):
        self.laps, self.last = {}, time.perf_counter()

    def lap(self, name):
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now

    def rows(self):
        total = ("all, without start and imports", sum(self.laps.values()))
        return [(name, f"{seconds:.1f}") for name, seconds in (*self.laps.items(), total)]


def score_run(run, device, splits, sliding):
    """Exact scores of both checkpoints: a dict from (checkpoint, split, method) to Score.

    All `splits` that the data set has are scored in blocks, those in `sliding` also by windows that move on by
    a quarter block.
    """
    best, scores, strides = run.load("best", device), {}, {"blocks": None, "sliding": run.settings.sliding_stride}
    for split in (split for split in splits if split in run.data.splits):
        for method in ("blocks", "sliding") if split in sliding else ("blocks",):
            scores["best", split, method] = score_split(best, run.data, split, strides[method])
    if run.best["iter"] == run.steps:  # both checkpoints hold the same weights
        return scores | {("last", *key[1:]): score for key, score in scores.items()}
    last = run.load("last", device)
    return scores | {("last", split, "blocks"): score_split(last, run.data, split) for _, split, m in scores if m == "blocks"}


def train_seeds(data, settings, folder, color, precision, seeds, fresh=False):
    """One run for each of so many seeds from the settings' own on, only the first one shown live; returns Runs."""
    runs = []
    for seed in range(settings.seed, settings.seed + seeds):
        own, place = replace(settings, seed=seed), f"{folder}-{seed}"
        view = LiveView(data, own, color) if seed == settings.seed else SilentView()
        history = train_model(make_model(own, data), data, own, place, precision=precision, fresh=fresh, view=view)
        runs.append(Run(data, own, history, place, color))
    return runs


def score_beyond(runs, precision):
    """Exact scores of runs that differ by their seed: a dict from method to {split: Scores}, and the dynamic rate.

    One Score a run by sliding windows; one of all by the mean of their probabilities; one of the first as it learns
    while it reads. Where the training split holds all words, also among these alone.
    """
    data, models = runs[0].data, [run.load("best", precision.device) for run in runs]
    words, stride, scores = word_tree(data, precision.device), runs[0].settings.sliding_stride, {}
    choices, splits = ("", ", among its words") if words else ("",), [split for split in data.splits if split != "train"]
    for split in splits:
        found = torch.stack([token_nats(model, data, split, stride, words) for model in models], dim=1)  # choices, models, tokens
        for choice, nats in zip(choices, found, strict=True):
            scores.setdefault(f"one model{choice}", {})[split] = [score_of(own, data, split) for own in nats]
            scores.setdefault(f"ensemble of {len(runs)}{choice}", {})[split] = [score_of(mixed(nats), data, split)]
    rate = choose_rate(models[0], data, precision)
    for split in splits:
        for choice, nats in zip(choices, dynamic_nats(models[0], data, split, rate, precision, words), strict=True):
            scores.setdefault(f"one model that learns as it reads{choice}", {})[split] = [score_of(nats, data, split)]
    return scores, rate


def spread(values):
    """Mean, and half of the distance from the lowest to the highest."""
    values = list(values)
    return sum(values) / len(values), (max(values) - min(values)) / 2


def complete(model, data, prompt, preset, precision, new_tokens=None, seed=1337):
    """The prompt and its continuation by the model, as text; computed in weights of the run's type."""
    ids = torch.tensor([data.tokenizer.encode(prompt)], dtype=torch.long, device=precision.device)
    generator = torch.Generator(precision.device).manual_seed(seed)
    model = copy.deepcopy(model).to(precision.device, precision.dtype)
    ids = model.generate(ids, new_tokens or preset.new_tokens, preset.temperature, preset.top_k, generator)
    return data.tokenizer.decode(ids[0].tolist())


def shares_of_known_words(prompts, texts_by_model, data):
    """For each model's texts, the share of the words written after the prompts that the training text holds too."""
    pattern = re.compile(r"[^\W\d_]+")
    known = set(pattern.findall(data.tokenizer.decode(data.splits["train"])))
    shares = []
    for texts in texts_by_model:
        words = [word for prompt, text in zip(prompts, texts, strict=True) for word in pattern.findall(text[len(prompt) :])]
        shares.append(sum(word in known for word in words) / max(1, len(words)))
    return shares


def loss_by_position(model, data, split="val", blocks=400):
    """Mean loss in nats of the four quarters of a block, over blocks that begin a quarter block apart.

    So nearly every token falls once into each quarter, and the quarters are of the same text.
    """
    block, device = model.config.block_size, next(model.parameters()).device
    quarter = max(1, block // 4)
    tokens = tokens_on(device, data.splits[split][: blocks * quarter + block + 1])
    starts = torch.arange(0, len(tokens) - block, quarter, device=device)
    totals = [0.0] * 4
    with evaluation_mode(model):
        for part in starts.split(max(1, 32768 // block)):
            x, y = get_batch(tokens, part, block)
            nats = nats_of(model, x, y).view_as(x)
            for index in range(4):
                totals[index] += nats[:, index * quarter : (index + 1) * quarter].sum(dtype=torch.float64).item()
    return [total / (quarter * len(starts)) for total in totals]


def most_common(data, count):
    """The most frequent tokens of the training split: pairs of text and share, most frequent first."""
    counts = np.bincount(data.splits["train"], minlength=data.vocab_size)
    top = np.argsort(-counts, kind="stable")[:count]
    return [(data.tokenizer.decode([token]), counts[token] / counts.sum()) for token in top]


# ---------------------------------------------------------------------------------- the sensitivity study

RESULTS = Path(__file__).resolve().parent / ".results"  # small files of what took long to measure

STUDIED = {
    "learning_rate": (3e-4, 1e-3, 3e-3),
    "batch_size": (6, 12, 24),
    "n_embd": (192, 384, 576),
    "block_size": (128, 256, 512),
    "dropout": (0.0, 0.1, 0.3),
}


def one_away(settings, share, studied):
    """(parameter, value, Settings) for each studied value, the others as they are, at a share of the tokens for all."""
    budget = share * settings.max_iters * settings.tokens_per_step
    for parameter, values in studied.items():
        for value in values:
            changed = {parameter: value}
            if parameter == "learning_rate":
                changed["min_lr"] = value * settings.min_lr / settings.learning_rate
            if parameter == "n_embd":  # heads keep their width
                changed["n_head"] = max(1, round(value * settings.n_head / settings.n_embd))
            changed = replace(settings, **changed)
            steps = round(budget / changed.tokens_per_step)
            yield parameter, value, replace(
                changed, max_iters=steps, eval_interval=steps, warmup_iters=round(steps * settings.warmup_iters / settings.max_iters)
            )


def sensitivity_study(datasets, all_settings, precision, share=0.2, seeds=(1337, 1338), studied=None):
    """Trains with one value at a time changed; returns the results as plain values. Nothing is saved while it trains."""
    rows, known = [], {}
    for data, settings in zip(datasets, all_settings, strict=True):
        for parameter, value, changed in one_away(settings, share, studied or STUDIED):
            for seed in seeds:
                own = replace(changed, seed=seed)
                if (data.name, own) not in known:  # what stands in the middle is trained once
                    model, seconds = train_unsaved(data, own, precision)
                    known[data.name, own] = score_split(model, data, "val").loss, seconds
                loss, seconds = known[data.name, own]
                rows.append(dict(data=data.title, unit=unit_of(data), parameter=parameter, value=value, seed=seed, steps=own.max_iters,
                                 tokens=own.max_iters * own.tokens_per_step, loss=loss, seconds=seconds))  # fmt: skip
    return {"made by": made_by(precision), "share": share, "rows": rows}


def train_unsaved(data, settings, precision):
    """A model trained by the same step as any, without evaluations and files; returns it and the seconds."""
    model = make_model(settings, data).to(precision.device).train()
    torch.manual_seed(settings.seed)
    trainer = Trainer(model, data, settings, precision)
    started = time.perf_counter()
    for first in range(0, settings.max_iters, settings.eval_interval):
        last = min(first + settings.eval_interval, settings.max_iters)
        check_finite(trainer.advance(first, last, StopRequests(), lambda step: None), first, trainer)
    return model, time.perf_counter() - started


def made_by(precision):
    """What a kept result was made on, and by which code."""
    return describe_machine(precision) | {"code": code_sum()}


def code_sum():
    """The first digits of the SHA-256 of the code that trains: names what made a kept result."""
    here = Path(__file__).resolve().parent
    return hashlib.sha256(b"".join((here / name).read_bytes() for name in ("model.py", "helpers.py"))).hexdigest()[:12]


def read_results(name):
    """A kept result file; None where there is none."""
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else None


def write_results(name, results):
    write_atomically(RESULTS / name, lambda file: file.write((json.dumps(results, indent=1) + "\n").encode()))


def sensitivity(datasets, all_settings, precision):
    """The kept study, or with NANOGPT_SENSITIVITY=1 a new one, which is then kept. Raises ValueError where there is none."""
    if os.environ.get("NANOGPT_SENSITIVITY") == "1":
        write_results("sensitivity.json", sensitivity_study(datasets, all_settings, precision))
    study = read_results("sensitivity.json")
    if study is None:
        raise ValueError(f"{RESULTS / 'sensitivity.json'} is missing: put it back, or set NANOGPT_SENSITIVITY=1 to measure it, minutes on a GPU.")
    return study


def study_means(study):
    """{data: {parameter: [(value, mean loss, half spread, seconds)]}} over the seeds of a study."""
    means = {}
    for row in study["rows"]:
        means.setdefault(row["data"], {}).setdefault(row["parameter"], {}).setdefault(row["value"], []).append(row)
    return {
        data: {
            parameter: [(value, *spread(row["loss"] for row in rows), spread(row["seconds"] for row in rows)[0]) for value, rows in values.items()]
            for parameter, values in parameters.items()
        }
        for data, parameters in means.items()
    }


def sensitivity_text(study):
    """What a study found, a paragraph a data set."""
    return "\n\n".join(f"**{data}**: {reading_of_study(parameters)}" for data, parameters in study_means(study).items())


def reading_of_study(parameters):
    """Parameters by how far their values lie apart, and the plan's two rates; what the seeds blur is not told apart."""
    told = []
    for parameter, values in parameters.items():
        losses, halves = [loss for _, loss, _, _ in values], [half for _, _, half, _ in values]
        width, (lowest, half) = max(losses) - min(losses), min(zip(losses, halves))
        best = " or ".join(f"{value:g}" for value, loss, doubt, _ in values if loss - doubt <= lowest + half)
        verdict = f"best at {best}" if width > 2 * max(halves) else "little more than the seeds do"
        told.append((width, f"`{parameter}` moves the loss by {width:.3f} nats, {verdict}"))
    text = "; ".join(sentence for _, sentence in sorted(told, reverse=True)) + "."
    rates = {value: (loss, half) for value, loss, half, _ in parameters.get("learning_rate", ())}
    if {1e-3, 3e-3} <= rates.keys():
        better, worse = sorted((1e-3, 3e-3), key=rates.get)
        gap, doubt = rates[worse][0] - rates[better][0], rates[worse][1] + rates[better][1]
        text += f" Of the two rates that the plan guesses, {better:g} is better than {worse:g} by {gap:.3f} nats"
        text += "." if gap > doubt else ", no more than the seeds are apart."
    return text


def sensitivity_figure(study, colors):
    """Small multiples: loss against each parameter, a row a data set; lines are means, dots are seeds."""
    means = study_means(study)
    figure, panels = plt.subplots(len(means), len(next(iter(means.values()))), figsize=(13, 2.8 * len(means)), layout="constrained",
                                  sharey="row", squeeze=False)  # fmt: skip
    for line, (data, parameters), color in zip(panels, means.items(), colors):
        for axes, (parameter, values) in zip(line, parameters.items()):
            places = {value: place for place, (value, *_) in enumerate(values)}
            rows = [row for row in study["rows"] if (row["data"], row["parameter"]) == (data, parameter)]
            axes.plot(list(places.values()), [loss for _, loss, _, _ in values], color=color)
            axes.plot([places[row["value"]] for row in rows], [row["loss"] for row in rows], "o", color=color, alpha=0.6)
            axes.set_xticks(list(places.values()), [f"{value:g}" for value in places])
            axes.set(xlabel=parameter, xlim=(-0.4, len(places) - 0.6))
        line[0].set_ylabel(f"{data}\nvalidation loss (nats a {rows[0]['unit']})")
    return figure


# ------------------------------------------------------------------------------------------ text and tables


def as_markdown(text):
    from IPython.display import Markdown

    return Markdown(text)


def say(text):
    """Shows Markdown, which every renderer keeps; nothing for an empty text."""
    from IPython.display import display

    if text:
        display(as_markdown(text))


def show_table(header, rows):
    """A table; nothing where there are no rows."""
    rows = list(rows)
    say(rows and markdown_table(header, rows))


MADE_IN = {
    "sections 1 and 2": "headline curves clock preset fresh variant own_text settings_wikitext settings_shakespeare precision",
    "sections 3 and 4": "folder_wikitext folder_shakespeare wikitext shakespeare datasets colors",
    "section 5": "model_wikitext model_shakespeare prompts before",
    "section 7": "history_wikitext run_wikitext",
    "section 8": "history_shakespeare run_shakespeare",
    "section 9": "runs splits scores final baselines saved",
    "section 11": "best_models after",
    "section 12": "positions",
    "section 13": "top",
    "section 14": "study",
    "section 15": "findings advice published literature ours comparable mine",
    "section 16": "beyond beyond_scores",
}


def explain_errors():
    """In a notebook, shows an error that this project raises as its one sentence, without a traceback.

    The error for a name not yet made says which section makes it; every other error looks as usual.
    """
    if not in_notebook():
        return
    sections = {name: section for section, names in MADE_IN.items() for name in names.split()}
    own = Path(__file__).resolve().parent

    def explain(shell, kind, error, trace, tb_offset=None):
        missing = sections.get(getattr(error, "name", None))
        if missing:
            error.args = (f"{error.name} is not made yet: run the cells of {missing} first (a finished training is only loaded).",)
        raised_in = Path(traceback.extract_tb(trace)[-1].filename).resolve().parent
        plain = missing or isinstance(error, CheckpointError | TrainingError | DataError | ValueError) and raised_in in (own, own / "data")
        return shell.showtraceback((kind, error, trace), tb_offset=tb_offset, exception_only=bool(plain))

    shell = sys.modules["IPython"].get_ipython()
    shell.set_custom_exc((NameError, ValueError, CheckpointError, TrainingError, DataError), explain)


def placeholder(text):
    """A place in the notebook that a later cell fills by `.update`."""
    from IPython.display import display

    return display(as_markdown(text), display_id=True)


def stand_in_notice(datasets):
    """What a reader must know where the real texts could not be had; empty where they could."""
    missing = [data for data in datasets if data.stand_in]
    return missing and (
        f"**No real data could be had, so this run is on {' and '.join(data.title for data in missing)}.** Its figures say "
        f"nothing about WikiText-2 or Shakespeare, also where a heading names them; `data/README.md` says how to get these."
    )


def reading_of_training(run):
    """One paragraph on a training run."""
    best, last = run.best, run.last
    turn = (
        f"It was lowest at step {best['iter']:,}, with {best['val_loss']:.4f}, and rose by {last['val_loss'] - best['val_loss']:.3f} after that."
        if last["val_loss"] > best["val_loss"] + 0.01
        else "It was lowest at the end, or within a hundredth of it."
    )
    partial = f" **Partial: {run.steps:,} of {run.settings.max_iters:,} steps.**" if run.steps < run.settings.max_iters else ""
    return (
        f"The validation estimate fell from {run.history['val_loss'][0]:.3f} to {last['val_loss']:.4f} nats a {run.unit}, the training estimate to "
        f"{last['train_loss']:.4f}. {turn} Training took {last['seconds']:.1f} s for {last['tokens']:,} tokens.{partial}"
    )


def show_samples(title, first, second, names=("before training", "after training")):
    """Two continuations of each of the same prompts, to the letter."""
    for number, (one, other) in enumerate(zip(first, second), 1):
        say(f"**{title}, prompt {number}, {names[0]}**\n\n````text\n{one}\n````\n\n**{names[1]}**\n\n````text\n{other}\n````")


def headline_rows(runs, scores, models):
    """Both runs in one table: what was trained, and how well it does on the final split."""
    header = ("", *(run.title for run in runs))
    final = [score["best", run.final_split, "blocks"] for run, score in zip(runs, scores)]
    sliding = [score["best", run.final_split, "sliding"] for run, score in zip(runs, scores)]
    words = [run.data.tokenizer.name != "char" for run in runs]
    return header, [
        ("parameters", *(f"{model.get_num_params(non_embedding=False) / 1e6:.2f}M" for model in models)),
        ("steps, best at", *(f"{run.steps:,}, {run.best['iter']:,}" for run in runs)),
        ("best validation estimate", *(f"{run.best['val_loss']:.4f} nats a {run.unit}" for run in runs)),
        ("whole split", *(run.final_split for run in runs)),
        ("loss, blocks / sliding", *(f"{a.loss:.4f} / {b.loss:.4f} nats a {run.unit}" for run, a, b in zip(runs, final, sliding))),
        ("perplexity a word, blocks / sliding", *(f"{a.word_perplexity:.5g} / {b.word_perplexity:.5g}" if w else "not counted by word"
                                                  for a, b, w in zip(final, sliding, words))),
        ("bits a byte, blocks / sliding", *(f"{a.bits_per_byte:.3f} / {b.bits_per_byte:.3f}" for a, b in zip(final, sliding))),
        ("training", *(f"{run.last['seconds']:.1f} s, {tokens_per_second(run.history):,.0f} tokens/s" for run in runs)),
    ]  # fmt: skip


def beyond_rows(run, found):
    """Scores of a recipe beyond the plan as table rows; `run` is its first seed's, and what is shown is of that one."""
    for method, splits in found.items():
        for split, scores in splits.items():
            one, (mean, half), by_word = scores[0], spread(score.loss for score in scores), run.data.tokenizer.name != "char"
            seeds = f"{mean:.4f} ± {half:.4f}" if len(scores) > 1 else ""
            words = f"{one.word_perplexity:.2f}" if by_word else "not counted by word"
            yield run.title, split, method, f"{one.loss:.4f}", seeds, words, f"{one.bits_per_byte:.4f}"


def steps_rows(kept, runs, scores, beyond, beyond_scores):
    """The way from the plan's models to those beyond it: this report's first and last, and between them kept results.

    A step's gain is over the one before it; that of another way to score the last model, over its usual one.
    """
    for index, run in enumerate(runs):
        by_word, way = run.data.tokenizer.name != "char", []

        def row(change, loss, words, seconds, gain):
            shown = f"{words:.2f}" if by_word else "not counted by word"
            return change, run.title, f"{loss:.4f}", f"{gain:+.4f}" if gain is not None else "", shown, f"{seconds:.1f}"

        if (plain := scores[index].get(("best", "val", "sliding"))) is not None:
            way.append(("the plan's settings, this run", plain.loss, plain.word_perplexity, run.last["seconds"]))
        for step in (kept or {}).get("steps", ()) if not run.data.stand_in else ():
            if step["data"] == run.title:
                way.append((step["change"], step["loss"], step["word_perplexity"], step["seconds"]))
        if index < len(beyond):
            last, trained = (kept or {}).get("last", {}).get(run.title, ""), beyond[index][0].last["seconds"]
            (first, best), *others = [(method, splits["val"][0]) for method, splits in beyond_scores[index][0].items()]
            way.append((f"{last} this run: {first}".strip(), best.loss, best.word_perplexity, trained))
        for before, (change, loss, words, seconds) in zip([None, *way], way):
            yield row(change, loss, words, seconds, before and before[1] - loss)
        if index < len(beyond):
            every = sum(seed.last["seconds"] for seed in beyond[index])
            for method, score in others:
                seconds = every if method.startswith("ensemble") else trained
                yield row(f"scored as {method}", score.loss, score.word_perplexity, seconds, best.loss - score.loss)


def beyond_text(ours, best_single, adapting):
    """How methods of this report, a dict to test perplexity a word, stand to the best published ones."""
    name, _, published, _ = best_single
    by_name = {row[0]: row[2] for row in adapting}
    peers = {"one model": (name, published), "ensemble": min(((n, v) for n, v in by_name.items() if "ensemble" in n), key=lambda row: row[1]),
             "learns": min(((n, v) for n, v in by_name.items() if "dynamic" in n), key=lambda row: row[1])}  # fmt: skip
    lines = []
    for method, test in ours.items():
        peer, value = peers["learns" if "learns" in method else "ensemble" if "ensemble" in method else "one model"]
        lines.append(f"- {method}: {test:.2f}, {'ahead of' if test < value else 'behind'} {peer} with {value:.2f}")
    return "Against the best published of its kind, on the test split:\n\n" + "\n".join(lines)


def beyond_headline(beyond, beyond_scores):
    """One table for the top of the report: the runs beyond the plan, the first seed of each."""
    rows = [row for group, (found, _) in zip(beyond, beyond_scores) for row in beyond_rows(group[0], found) if row[1] == group[0].final_split]
    return rows and "Beyond the plan, by settings alone (section 16):\n\n" + markdown_table(
        ("data set", "split", "method", "nats a token", "mean of the seeds ± half their spread", "perplexity a word", "bits a byte"), rows)  # fmt: skip


def headline_text(runs, scores, models, precision, preset, beyond=(), beyond_scores=()):
    """What the top of the report says."""
    machine = describe_machine(precision)
    notes = [
        f"Preset {preset.name} on {machine['device']}, with PyTorch {machine['PyTorch']}. Precision: {machine['precision']}.",
        stand_in_notice([run.data for run in runs]) or "",
        *(f"**Partial: {run.title} stopped at step {run.steps:,}.**" for run in runs if run.steps < run.settings.max_iters),
    ]
    caption = "*Below: loss against optimizer steps, training solid and validation dashed.*"
    parts = [markdown_table(*headline_rows(runs, scores, models)), " ".join(filter(None, notes)), beyond_headline(beyond, beyond_scores), caption]
    return "\n\n".join(filter(None, parts))


def write_summary(path, runs, scores, models, precision, findings):
    """The plan's text file: each run's figures on its final split, then what was found."""
    lines = ["Training summary", *(f"{key}: {value}" for key, value in describe_machine(precision).items()), ""]
    for run, score, model in zip(runs, scores, models):
        lines += [
            run.title,
            f"  training tokens: {len(run.data.splits['train']):,}",
            f"  model: {model.get_num_params(non_embedding=False):,} parameters, {run.settings.n_layer} layers, "
            f"{run.settings.n_head} heads, {run.settings.n_embd} channels",
            f"  steps: {run.steps:,}, best at {run.best['iter']:,}; training time: {run.last['seconds']:.1f} s",
            f"  validation estimate: best {run.best['val_loss']:.4f}, last {run.last['val_loss']:.4f} nats a {run.unit}",
            f"  whole {run.final_split} split: {score.loss:.4f} nats and perplexity {score.perplexity:.2f} a {run.unit}, "
            f"{score.bits_per_byte:.4f} bits a byte",
            "",
        ]
    text = "\n".join([*lines, "Findings", *(f"- {finding}" for finding in findings), ""])
    write_atomically(path, lambda file: file.write(text.encode()))


# -------------------------------------------------------------------------------------------------- figures


def plot_losses(axes, history, title, color, unit="token"):
    """Training (solid) and validation (dashed) estimates over the steps."""
    axes.plot(history["iter"], history["train_loss"], color=color, label=f"{title}, training")
    axes.plot(history["iter"], history["val_loss"], color=color, linestyle="--", marker=".", label=f"{title}, validation")
    axes.set(xlabel="optimizer step", ylabel=f"loss (nats a {unit})")
    axes.legend()


def learning_curves(runs):
    """Both runs' losses side by side, for the top of the report."""
    figure, panels = plt.subplots(1, len(runs), figsize=(11, 3.4), layout="constrained")
    for axes, run in zip(panels, runs):
        plot_losses(axes, run.history, run.title, run.color, run.unit)
    return figure


def comparison_figure(runs, perplexities):
    """The report's 2x2 figure. `perplexities`: per run a dict from a split's label to perplexity a token."""
    figure, ((loss, rate), (speed, bars)) = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    for run in runs:
        history = run.history
        plot_losses(loss, history, run.title, run.color)
        rate.plot(history["iter"], history["learning_rate"], color=run.color, label=run.title)
        rows = history_rows(history)[2:] or history_rows(history)[1:]
        speed.plot([row["iter"] for row in rows], [row["rate"] for row in rows], ".-", color=run.color, label=run.title)
    rate.set(xlabel="optimizer step", ylabel="learning rate")
    speed.set(xlabel="optimizer step", ylabel="training speed (tokens/s)", ylim=(0, None))
    for axes in (rate, speed):
        axes.legend()
    plot_bars(bars, runs, perplexities)
    return figure


def plot_bars(axes, runs, perplexities):
    """Grouped bars of perplexity, on a log axis since the units differ."""
    for index, (run, values) in enumerate(zip(runs, perplexities)):
        width = 0.8 / len(values)
        for place, (label, value) in enumerate(values.items()):
            x = index - 0.4 + (place + 0.5) * width
            axes.bar(x, value, 0.9 * width, color=run.color, alpha=1 - 0.3 * place)
            axes.text(x, value, f"{label}\n{value:.3g}", ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(runs)), [f"{run.title}\n(per {run.unit})" for run in runs])
    axes.set(ylabel="perplexity (log scale)", yscale="log", ylim=(1, 12 * max(map(max, (v.values() for v in perplexities)))))


def distribution_figure(datasets, colors):
    """Token frequency against rank in each training split, on log axes."""
    figure, panels = plt.subplots(1, len(datasets), figsize=(11, 3.8), layout="constrained")
    for axes, data, color in zip(panels, datasets, colors):
        counts = np.sort(np.bincount(data.splits["train"]))[::-1]
        counts = counts[counts > 0]
        axes.loglog(np.arange(1, len(counts) + 1), counts, color=color)
        axes.set(title=data.title, xlabel="rank", ylabel="occurrences in the training split")
    return figure


# --------------------------------------------------------------------------------------------- the command line


def out_folder(name, run="test"):
    """Where the notebook and the command keep the run on the data set of this name."""
    plan = {"shakespeare": ("shakespeare_char", "stand_in_char"), "wikitext2": ("wikitext2_raw", "stand_in_gpt2")}
    return f"out-{next((short for short, names in plan.items() if name in names), name)}-{run}"


def settings_with(settings, changes):
    """The settings with changes such as "dropout=0.2". Raises ValueError."""
    values = {}
    for change in changes:
        field, _, value = change.partition("=")
        if field not in asdict(settings):
            raise ValueError(f"There is no setting {field!r}: --set takes FIELD=VALUE with one of {', '.join(asdict(settings))}.")
        with contextlib.suppress(ValueError, SyntaxError):  # what is no number stays text, which Settings refuses by name
            value = ast.literal_eval(value)
        values[field] = value
    return replace(settings, **values)


def main(arguments=None):
    """`python helpers.py wikitext2`: trains as the notebook's cell does, to the same folder; returns the exit status."""
    parser = argparse.ArgumentParser(description="Train on a data set, also under torchrun; the notebook then loads the run.")
    parser.add_argument("dataset", help=f"{', '.join(NAMES)}, or a folder's name under data/ (see data/own.py)")
    parser.add_argument("--preset", help="full, record, quick or smoke")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="a setting other than the preset's")
    parser.add_argument("--fresh", action="store_true", help="train anew even where a checkpoint of the run exists")
    parser.add_argument("--out", help="the run's folder (default: the notebook's)")
    parser.add_argument("--start-from", metavar="CKPT", help="initial weights from this checkpoint")
    options = parser.parse_args(arguments)
    try:
        precision = choose_precision(join_processes())
        preset, name = choose_preset(options.preset), options.dataset
        settings = settings_with(preset.shakespeare if name == "shakespeare_char" else preset.wikitext2, options.set)
        folder = ROOT / name
        if name in NAMES:  # by the first process alone; on other hosts the prepared folder must be there
            folder = from_first(lambda: prepare(name, allow_stand_in=not preset.needs_real_data))
        data = load(folder)
        out, view = options.out or out_folder(data.name), SilentView() if rank() else LiveView(data, settings, None)
        history = train_model(make_model(settings, data), data, settings, out, precision=precision, fresh=options.fresh,
                              view=view, start_from=options.start_from)  # fmt: skip
    except (CheckpointError, TrainingError, DataError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not rank():
        print(reading_of_training(Run(data, settings, history, out, None)))
    if joined():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
