"""Configuration, training and evaluation, in the order in which data flows."""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while the imports run: no traceback at Ctrl-C

import argparse
import contextlib
import copy
import gc
import math
import os
import re
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from data.batches import BatchLoader, gather, get_batch, load_tokens, sample_starts
from data.dataset import load
from data.fetch import DataError, atomic_write, reason, sha256_of
from data.ngrams import ngram_nats
from data.prepare import NAMES, ROOT, STAND_INS, prepare
from model import GPT, CUDAGraphed, GPTConfig, Muon, evaluating, fused_loss_obstacle, repeat


# ----- configuration -----
@dataclass(frozen=True)
class TrainConfig:
    """One training run. Raises ValueError for values that cannot be trained with."""

    batch_size: int = 12  # sequences per micro-step
    block_size: int = 256  # context length, in tokens
    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    dropout: float = 0.1
    bias: bool = True
    rotary: bool = False  # this and the next three: see GPTConfig
    rms_norm: bool = False
    attn_gate: bool = False
    pointer: bool = False
    learning_rate: float = 1e-3  # peak, reached after the warm-up
    min_lr: float = 1e-4  # reached when the last step is done, if the warm-up is shorter
    decay_lr: bool = True  # cosine from the peak to min_lr; False: the peak throughout
    max_iters: int = 5000  # optimizer steps
    warmup_iters: int = 200
    weight_decay: float = 0.1  # on matrices only
    muon_lr_scale: float = 0.0  # Muon for the hidden matrices, at a rate so many times higher
    beta1: float = 0.9
    beta2: float = 0.99
    grad_clip: float = 1.0  # largest norm of the whole gradient; 0: no clipping
    gradient_accumulation_steps: int = 1  # micro-steps per optimizer step
    eval_interval: int = 250  # steps between two evaluations
    eval_iters: int = 200  # batches of one estimate
    seed: int = 1337
    compile: bool = False  # torch.compile on CUDA: pays from some ten thousand steps on

    def __post_init__(self):
        for field in fields(self):  # Python's own types alone: a checkpoint holds no others
            value, (low, high) = getattr(self, field.name), RANGES.get(field.name, (1, math.inf))
            kinds = {field.type, int} if field.type is float else {field.type}
            if type(value) not in kinds or field.type is not bool and not low <= value < high:
                wanted = f"a Python {field.type.__name__}"
                wanted += "" if field.type is bool else f" of at least {low} and below {high}"
                raise ValueError(f"{field.name} is {value!r}: give {wanted}.")
        if self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr is {self.min_lr}: give at most {self.learning_rate}.")
        self.model_config(vocab_size=1)

    def model_config(self, vocab_size):
        shape = {f.name: getattr(self, f.name) for f in fields(GPTConfig) if f.name != "vocab_size"}
        return GPTConfig(vocab_size=vocab_size, **shape)

    @property
    def tokens_per_step(self):
        return self.batch_size * self.block_size * self.gradient_accumulation_steps


RANGES = dict.fromkeys(("learning_rate", "min_lr"), (1e-12, math.inf))  # else at least 1
RANGES |= dict.fromkeys(("weight_decay", "grad_clip", "muon_lr_scale"), (0, math.inf))
RANGES |= dict.fromkeys(("beta1", "beta2", "dropout"), (0, 1))
RANGES |= dict.fromkeys(("warmup_iters", "seed"), (0, 2**32))


@dataclass(frozen=True)
class Preset:
    """The runs of the report, and how much is evaluated and generated around them."""

    name: str
    wikitext2: TrainConfig
    shakespeare: TrainConfig
    thorough: bool = False  # real texts, whole splits, sliding windows; else what a CPU can do
    improved: tuple = ()  # configs of the improved models, one per data set; empty: not trained
    seeds: int = 3  # runs of each of these
    new_tokens: int = 150  # generated tokens per sample


def _make_presets():
    full = TrainConfig()
    small = dict(block_size=64, n_layer=4, n_head=4, n_embd=64, dropout=0.0, warmup_iters=30)
    small |= dict(learning_rate=3e-3, min_lr=3e-4, max_iters=100, eval_interval=25, eval_iters=5)
    quick = replace(full, **small, batch_size=8)
    longer = replace(quick, batch_size=12, n_embd=96, max_iters=250, eval_interval=50)
    tiny = dict(batch_size=4, block_size=32, n_layer=2, n_head=2, n_embd=16, max_iters=20)
    tiny |= dict(warmup_iters=4, eval_interval=5, eval_iters=2)
    smoke = replace(quick, **tiny)
    modern = dict(rotary=True, rms_norm=True, attn_gate=True, bias=False, min_lr=1e-5, compile=True)
    words = dict(pointer=True, n_layer=12, n_head=3, batch_size=4, block_size=2048, dropout=0.3)
    words |= dict(learning_rate=8e-4, muon_lr_scale=25.0, max_iters=5000, warmup_iters=300)
    words |= dict(eval_interval=500, eval_iters=25)
    chars = dict(n_layer=9, batch_size=64, dropout=0.42, weight_decay=0.3, learning_rate=2e-3)
    chars |= dict(muon_lr_scale=10.0, max_iters=2000, warmup_iters=100, eval_interval=200)
    improved = replace(full, **modern, **words), replace(full, **modern, **chars, eval_iters=40)
    shakespeare = replace(full, max_iters=3000, learning_rate=3e-3, min_lr=3e-4)
    report = Preset("full", full, shakespeare, thorough=True)
    least = tuple(replace(config, **small | tiny) for config in improved)
    words, chars = (replace(config, **small, batch_size=8) for config in improved)
    words = replace(words, max_iters=70, learning_rate=2e-2, muon_lr_scale=1.5)
    chars = replace(chars, max_iters=120, learning_rate=6e-3, muon_lr_scale=6.0, n_embd=96)
    quick = Preset("quick", quick, longer, improved=(words, chars), seeds=1)
    smoke = Preset("smoke", smoke, smoke, improved=least, seeds=2, new_tokens=20)
    record = replace(report, name="record", improved=improved)
    return {preset.name: preset for preset in (report, record, quick, smoke)}


PRESETS = _make_presets()


def choose_preset(name=None):
    """The preset called `name` or in NANOGPT_PRESET; else `full` with CUDA and `quick` without."""
    name = name or os.environ.get("NANOGPT_PRESET")
    name = name or ("full" if torch.cuda.is_available() else "quick")
    if name not in PRESETS:
        raise ValueError(f"There is no preset {name!r}: choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]


@dataclass(frozen=True)
class Precision:
    """Where and in which floating-point type a model runs, with the reason as text."""

    device: torch.device
    dtype: torch.dtype
    reason: str

    def autocast(self, scaler=True):
        """Forward passes in the dtype; without a gradient scaler float16 is float32."""
        enabled = self.dtype == torch.bfloat16 or scaler and self.dtype == torch.float16
        return torch.autocast(self.device.type, self.dtype, enabled=enabled)


def choose_precision(device=None):
    """bfloat16 on GPUs that compute in it (capability 8.0), float16 on older ones, else float32."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type != "cuda":
        return Precision(device, torch.float32, "float32: half precision gains nothing on a CPU")
    major, minor = torch.cuda.get_device_capability(device)
    dtype = torch.bfloat16 if major >= 8 else torch.float16
    return Precision(device, dtype, f"{str(dtype)[6:]} autocast (capability {major}.{minor})")


def describe_machine(precision):
    """What a run is made on, as plain text values."""
    cuda, threads = precision.device.type == "cuda", torch.get_num_threads()
    device = torch.cuda.get_device_name(precision.device) if cuda else f"CPU, {threads} threads"
    versions = {"PyTorch": torch.__version__, "Python": sys.version.split()[0]}
    return {"device": device, "precision": precision.reason} | versions


def get_lr(step, config):
    """Learning rate of a step: linear warm-up, then cosine decay to `min_lr` at the end."""
    if step < config.warmup_iters or not config.decay_lr:
        return config.learning_rate * min(1, (step + 1) / (config.warmup_iters + 1))
    progress = (step - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1)))
    return config.min_lr + cosine * (config.learning_rate - config.min_lr)


# ----- several processes (torchrun) -----
def rank():
    """Number of this process among those that train together; 0, the main one, when alone."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size():
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextlib.contextmanager
def distributed():
    """Joins the processes that torchrun started, if any; yields this one's device, or None."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield None
        return
    if "LOCAL_RANK" not in os.environ:
        raise ValueError("WORLD_SIZE is set and LOCAL_RANK is not: start the command by torchrun.")
    import torch.distributed.nn.functional  # noqa: F401  # later it would keep the group alive

    cuda, number = torch.cuda.is_available(), int(os.environ["LOCAL_RANK"])
    if cuda and int(os.environ.get("LOCAL_WORLD_SIZE", number + 1)) > torch.cuda.device_count():
        raise ValueError("There are more processes than GPUs: start fewer on each machine.")
    if cuda:
        torch.cuda.set_device(number)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield torch.device("cuda", number) if cuda else None
    finally:
        gc.collect()  # a group that is still referenced keeps threads that abort the exit
        dist.destroy_process_group()


def all_reduce(tensor, operation="SUM"):
    """The sum or "MAX" over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
    return tensor


def on_main_process(make):
    """What `make()` gives in the main process, in every process; its error is raised in all."""
    box = [None]
    try:
        box[0] = make() if rank() == 0 else None
    except Exception as error:
        box[0] = error
    if world_size() > 1:
        dist.broadcast_object_list(box, device=torch.device("cpu"))
    if isinstance(box[0], Exception):
        raise box[0]
    return box[0]


def shard(starts):
    """This process's part of windows (steps, micro-steps, B), as large as any other's."""
    n, (micro_steps, batch) = world_size(), starts.shape[1:]
    if micro_steps % n == 0:  # batches as large as on one GPU
        return starts[:, rank() :: n]
    if batch % n == 0:
        return starts[:, :, rank() :: n]
    raise ValueError(f"Make batch_size or gradient_accumulation_steps a multiple of {n} processes.")


# ----- evaluation -----
def estimate_loss(model, tokens, config, precision):
    """Mean loss in nats per token over `eval_iters` random batches, always the same: for curves."""
    starts = sample_starts(len(tokens), config, -1, config.eval_iters).flatten()
    own = starts[rank() :: world_size()].to(precision.device)
    parts = own.split(max(1, (65536 if own.is_cuda else 16384) // config.block_size))
    with evaluating(model), precision.autocast():
        batches = (get_batch(tokens, part, config.block_size) for part in parts)
        total = sum(model.token_losses(x, y).sum(dtype=torch.float64) for x, y in batches)
    return all_reduce(total).item() / (len(starts) * config.block_size)


@dataclass(frozen=True)
class Score:
    """A whole split, every token evaluated once."""

    nats: float  # sum
    tokens: int
    bytes: int
    words: int  # including one <eos> per line

    @property
    def loss(self):  # nats per token
        return self.nats / self.tokens

    @property
    def perplexity(self):  # per token; infinite where it exceeds what a float holds
        return math.inf if self.loss > 709 else math.exp(self.loss)

    @property
    def word_perplexity(self):  # as in the literature on WikiText-2 (Merity et al. 2016)
        return replace(self, tokens=self.words).perplexity

    @property
    def bits_per_byte(self):
        return self.nats / math.log(2) / self.bytes


def score_of(losses, data, split):
    """The Score of a whole split with these token losses (N,)."""
    if len(losses) != data.meta["splits"][split]["tokens"]:  # whose words and bytes are known
        raise ValueError(f"Losses of {len(losses)} tokens: give those of the whole {split} split.")
    nats = losses.sum(dtype=torch.float64).item()
    return Score(nats, len(losses), data.bytes[split], data.words[split])


def token_losses(model, data, split, stride=None):
    """Losses in nats (N,) of a split's tokens, each evaluated exactly once, in float32.

    Without a stride, in non-overlapping windows; with one, in sliding windows `stride` tokens
    apart, so that each token sees at least block_size - stride others, where they exist.
    """
    device, block = next(model.parameters()).device, model.config.block_size
    stride = block if stride is None else stride
    if not isinstance(stride, int) or not 1 <= stride <= block:
        raise ValueError(f"stride is {stride}: give a whole number from 1 to {block}.")
    tokens, losses = load_tokens(data.splits[split], device), []
    for first in range(0, len(tokens), stride * max(1, 32768 // block)):
        last = min(first + stride * max(1, 32768 // block), len(tokens))
        begins = torch.arange(first, last, stride, device=device)[:, None]
        starts = (begins - (block - stride)).clamp(min=0)
        targets = starts + torch.arange(block, device=device)  # positions (B, T)
        chosen = (targets >= begins) & (targets < (begins + stride).clamp(max=last))
        inside = targets.clamp(max=len(tokens) - 1)  # what overhangs is never seen: causal
        x = gather(tokens, (inside - 1).clamp(min=0)).where(inside > 0, data.bos_id)
        y, chosen = gather(tokens, inside), chosen.flatten().nonzero()[:, 0]
        with evaluating(model):
            losses.append(model.token_losses(x, y, chosen))
    return torch.cat(losses)


def ensemble_losses(losses):
    """Losses (N,) of the mean of the probabilities of M members with losses (M, N)."""
    return math.log(len(losses)) - torch.logsumexp(-losses.double(), dim=0)


def squared_gradients(model, data, precision, n_tokens):
    """Mean squared gradient of each parameter over stretches of the training text's beginning."""
    model = copy.deepcopy(model).to(precision.device).eval()
    parameters = list(model.parameters())
    sums = [torch.zeros_like(parameter) for parameter in parameters]

    def learn(loss):
        gradients = torch.autograd.grad(loss, parameters)
        torch._foreach_addcmul_(sums, gradients, gradients)

    stretches = _read(model, data, "train", n_tokens, precision, learn)
    return torch._foreach_div(sums, len(stretches))


def dynamic_evaluation(model, data, split, lr, squares, precision, n_tokens=None):
    """Losses (N,) of a split, or its first `n_tokens`, by a copy of the model that learns on it.

    Dynamic evaluation (Krause et al. 2018): a stretch of tokens is evaluated, then, unless `lr` is
    0, learnt from by Adam without first moments; the second ones begin as `squared_gradients`.
    """
    model = copy.deepcopy(model).to(precision.device).eval()
    options = {"betas": (0.0, 0.9999), "fused": True, "capturable": precision.device.type == "cuda"}
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, **options)
    for parameter, square in zip(model.parameters(), squares, strict=True):
        state = {"step": torch.tensor(1e5).to(square), "exp_avg": torch.zeros_like(parameter)}
        optimizer.state[parameter] = state | {"exp_avg_sq": square.clone()}

    def learn(loss):
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    stretches = _read(model, data, split, n_tokens, precision, learn if lr else lambda loss: None)
    return stretches.flatten()[: len(data.splits[split][:n_tokens])]


def _read(model, data, split, n_tokens, precision, learn):
    """Losses (n, stretch) of a text's stretches, whose mean goes to `learn` before the next."""
    device, block = precision.device, model.config.block_size
    tokens = load_tokens(data.splits[split][:n_tokens], device, resident=True).long()
    stretch = torch.arange(max(1, min(128, block // 8)), device=device)
    begins = torch.arange(0, len(tokens), len(stretch), device=device)
    tokens = F.pad(F.pad(tokens, (1, 0), value=data.bos_id), (0, block))  # token p is at p + 1
    losses = torch.zeros(len(begins), len(stretch), device=device)
    row = torch.zeros(1, dtype=torch.int64, device=device)

    def step():
        start = (begins[row] - (block - len(stretch))).clamp(min=0)
        x, y = get_batch(tokens, start, block)
        with precision.autocast(scaler=False):
            found = model.token_losses(x, y, begins[row] + stretch - start)
        losses.index_copy_(0, row, found.detach()[None])
        inside = begins[row] + stretch < len(tokens) - block - 1
        learn((found * inside).mean())
        row.add_(1)

    repeat(step, len(begins), device, warmup=3)
    return losses


def evaluate_baselines(data, split):
    """Scores of uniform, unigram and bigram models of the training split, by name."""
    sizes = len(data.splits[split]), data.bytes[split], data.words[split]
    return {name: Score(nats, *sizes) for name, nats in ngram_nats(data, split).items()}


# ----- checkpoints -----
class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or used, and what to do about it."""


VOCABULARY = {"chars": None, "words": None}  # what a checkpoint holds of it, with neither GPT-2's
CODE = [Path(path).absolute() for path in (sys.modules["model"].__file__, __file__)]
SOURCES = [sha256_of(path) for path in CODE]  # as imported
FRESH = "move it away, or train again with fresh=True (--fresh on the command line) to replace it"


def save_checkpoint(path, checkpoint):
    """Writes plain values and tensors, whole or not at all. Raises CheckpointError."""
    try:
        with atomic_write(Path(path)) as file:
            torch.save(checkpoint, file)
    except RuntimeError as error:  # a DataError, or torch's way to pass on that a write failed
        why = reason(error.__cause__ or error.__context__ or error).splitlines()[0]
        raise CheckpointError(f"{path} cannot be written ({why}): make room there.") from None


def load_checkpoint(path, identity=None):
    """A checkpoint's plain values, never code; with an `identity`, those of this run alone."""
    advice = FRESH if identity else "choose another file"
    try:
        with open(path, "rb") as file:
            archive = zipfile.ZipFile(file)  # torch checks no sum, and leaves out what is a folder
            if archive.testzip() or any(part.external_attr & 16 for part in archive.infolist()):
                raise zipfile.BadZipFile("a part is damaged")
            file.seek(0)
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({reason(error)}): check the path.") from None
    except Exception as error:  # what is no checkpoint fails in many ways
        if out_of_memory(error):
            raise
        text = reason(error).splitlines()[0].split(". ")[0]
        raise CheckpointError(f"{path} is no whole checkpoint ({text}): {advice}.") from None
    if not (isinstance(checkpoint, dict) and {"model", "model_args"} <= checkpoint.keys()):
        raise CheckpointError(f"{path} is no checkpoint of a GPT of this kind: {advice}.")
    there = checkpoint.get("identity")
    if differing := identity and _differing(there if isinstance(there, dict) else {}, identity):
        raise CheckpointError(f"{path} belongs to another run ({differing}): {advice}.")
    return checkpoint


def stamp(path):
    """What a checkpoint's content is known by: None without a file, else never false."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [(part.filename, part.CRC) for part in archive.infolist()] or "nothing"
    except (FileNotFoundError, NotADirectoryError):
        return "nowhere" if os.path.islink(path) else None  # a link to a disk that is not there
    except Exception as error:  # the disk's, or what is no checkpoint
        return reason(error)


def _differing(there, here):
    names = (name for name in here | there if there.get(name) != here.get(name))
    return "; ".join(f"{name} {there.get(name)!r} there, {here.get(name)!r} here" for name in names)


def load_model(path, device="cpu", data=None, identity=None):
    """The model of this project's or a nanoGPT checkpoint, in eval mode; of `data`'s vocabulary."""
    checkpoint = load_checkpoint(path, identity)
    try:
        config = GPTConfig(**checkpoint["model_args"])
        weights = {k.removeprefix("_orig_mod."): v for k, v in checkpoint["model"].items()}
        head, size = weights["lm_head.weight"], data and data.vocab_size
        if not torch.equal(head, weights["transformer.wte.weight"]):
            raise ValueError("its output layer is not its token embedding")
        if data and data.tokenizer.name == "gpt2" and config.vocab_size == size + -size % 64:
            config = replace(config, vocab_size=size)  # nanoGPT pads it
            weights["lm_head.weight"] = weights["transformer.wte.weight"] = head[:size]
        model = GPT(config)
        kept = [k for k in weights if not k.endswith(".attn.bias") or k in model.state_dict()]
        model.load_state_dict({k: weights[k] for k in kept})  # without old versions' masks
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        if out_of_memory(error):
            raise
        text = f"{path} does not fit its own description ({' '.join(str(error).split())[:200]})"
        raise CheckpointError(f"{text}: {FRESH if identity else 'choose another file'}.") from None
    known = VOCABULARY | data.tokenizer.vocabulary if data else {}
    there = {kind: checkpoint.get(kind, own) for kind, own in known.items()}  # none in nanoGPT's
    if data and (config.vocab_size, there) != (size, known):
        text = f"{path} has another vocabulary ({len(head)} ids) than the data ({size})"
        raise CheckpointError(f"{text}: choose a checkpoint that was trained on such data.")
    return model.to(device).eval()


def start_weights(path, config, data):
    """Weights of a checkpoint to start a run from, and 16 digits that identify the file."""
    before, model, digest = stamp(path), load_model(path, data=data), sha256_of(path)[:16]
    if stamp(path) != before:
        raise CheckpointError(f"{path} changed while it was read: start from a copy of it.")
    wanted = asdict(config.model_config(data.vocab_size))
    if differing := _differing(asdict(replace(model.config, dropout=config.dropout)), wanted):
        raise CheckpointError(f"{path} cannot start this run ({differing}): choose another file.")
    return model.state_dict(), digest


# ----- the training step -----
def make_model(config, data):
    """A new model for a data set, its initial weights fixed by the seed."""
    torch.manual_seed(config.seed)
    return GPT(config.model_config(data.vocab_size))


class Optimizers:
    """AdamW and, if a config has it, Muon as one: one overflow leaves out the whole step."""

    _step_supports_amp_scaling = True  # the scaler then sets found_inf and asks the device nothing
    found_inf = None

    def __init__(self, model, config, lr, device_type):
        hidden = model.transformer.h.named_parameters() if config.muon_lr_scale else []
        matrices = [p for name, p in hidden if p.dim() == 2 and "c_gate" not in name]
        betas, decay = (config.beta1, config.beta2), config.weight_decay
        adamw = model.configure_optimizers(decay, lr, betas, device_type, leave_out=matrices)
        muon = {"muon": Muon(matrices, lr, config.muon_lr_scale, decay)} if matrices else {}
        self.by_name = {"optimizer": adamw} | muon

    @property
    def param_groups(self):
        return [group for o in self.by_name.values() for group in o.param_groups]

    def step(self, grad_scale):  # which divides the gradients, without writing them out first
        for optimizer in self.by_name.values():
            optimizer.grad_scale, optimizer.found_inf = grad_scale, self.found_inf
            optimizer.step()


class CastWeights(torch.autograd.Function):
    """Copies of weights in another type, and their gradients back in float32, in one launch."""

    @staticmethod
    def forward(ctx, dtype, *weights):
        copies = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        torch._foreach_copy_(copies, weights)
        return tuple(copies)

    @staticmethod
    def backward(ctx, *gradients):
        return None, *CastWeights.forward(ctx, torch.float32, *gradients)


class Trainer:
    """A run's state on its device, and the one step of all precisions, made for a CUDA graph."""

    def __init__(self, model, data, config, precision, resident=None):
        self.model, self.module, self.config, self.precision = model, model, config, precision
        device, cuda, alone = precision.device, precision.device.type == "cuda", world_size() == 1
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        self.tokens = {s: load_tokens(data.splits[s], device, resident) for s in ("train", "val")}
        for name, tokens in self.tokens.items():
            if len(tokens) <= config.block_size:
                text = f"The {name} split has {len(tokens)} tokens, block_size {config.block_size}"
                raise ValueError(f"{text}: use a longer text or a smaller block_size.")
        self.lr = torch.zeros((), device=device)
        self.optimizers = Optimizers(model, config, self.lr, device.type)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision.dtype == torch.float16)
        self.ahead = min(32, 1 + 2**20 // config.tokens_per_step) if cuda else 1  # steps queued
        batches = (self.ahead, config.gradient_accumulation_steps, config.batch_size)
        shape = shard(torch.empty(batches, device="meta")).shape
        self.loader = BatchLoader(self.tokens["train"], shape, config.block_size, device)
        self.lrs, self.losses, self.grad_norms = torch.zeros(3, self.ahead, device=device)
        self.row, self.loaded = torch.zeros(1, dtype=torch.int64, device=device), None  # first step
        slow = fused_loss_obstacle() if cuda else None
        self.obstacles = [f"no fused loss: {slow}"] if slow else []
        half = alone and precision.dtype != torch.float32
        self.cast = [n for n, _ in model.named_parameters() if half and re.search("attn|mlp", n)]
        if config.compile and cuda:
            self.obstacles += compile_layers(model, self.loss, shape[2])
        if not alone:
            self.module = DistributedDataParallel(model, [device] if cuda else None)
        self.graphed_step = CUDAGraphed(self.step, cuda and alone, recover=self.forget_step)

    def boundary(self, step):
        to_evaluation = self.config.eval_interval - step % self.config.eval_interval
        return min(step + min(self.ahead, to_evaluation), self.config.max_iters)

    def load(self, first):
        steps, n_tokens = range(first, self.boundary(first)), len(self.tokens["train"])
        batches = self.config.gradient_accumulation_steps
        starts = [sample_starts(n_tokens, self.config, step, batches) for step in steps]
        self.loader.load(shard(torch.stack(starts)))
        self.lrs[: len(steps)] = torch.tensor([get_lr(step, self.config) for step in steps])
        self.row.zero_()
        self.loaded = first

    def run_steps(self, first):
        """Takes the steps to the boundary; returns losses, gradient norms and seconds."""
        last, started = self.boundary(first), time.perf_counter()
        if self.loaded != first:
            self.load(first)
        if rank():  # checkpoints hold the main process's generators, and dropout has to differ
            torch.manual_seed((self.config.seed + rank()) * 1_000_003 + first)
        for _ in range(first, last):
            self.graphed_step()
        if last < self.config.max_iters:
            self.load(last)  # while the device works
        losses = all_reduce(self.losses[: last - first].clone()) / world_size()
        norms = self.grad_norms[: last - first].tolist()
        return losses.tolist(), norms, time.perf_counter() - started

    def loss(self, x, y):
        """The mean loss, by copies of the layers' weights in autocast's type."""
        weights = [self.model.get_parameter(name) for name in self.cast]
        copies = CastWeights.apply(self.precision.dtype, *weights) if weights else ()
        with self.precision.autocast():
            return functional_call(self.module, dict(zip(self.cast, copies, strict=True)), (x, y))

    def step(self):
        self.model.zero_grad(set_to_none=True)
        self.lr.copy_(self.lrs[self.row][0])
        total, micro_steps = torch.zeros_like(self.lr), self.loader.windows.size(1)
        for micro_step in range(micro_steps):
            x, y = self.loader.get(self.row, micro_step)
            self.module.require_backward_grad_sync = micro_step == micro_steps - 1  # DDP's no_sync
            loss = self.loss(x, y) / micro_steps
            self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.unscale_(self.optimizers)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters()])
        self.scaler.step(self.optimizers, (norm / (self.config.grad_clip or math.inf)).clamp(min=1))
        self.scaler.update()
        self.losses.index_copy_(0, self.row, total[None])
        self.grad_norms.index_copy_(0, self.row, norm[None])
        self.row.add_(1)

    def forget_step(self):
        self.obstacles.append(f"no CUDA graph: {self.graphed_step.reason}")
        self.scaler.update(self.scaler.get_scale())

    def state_dict(self):
        state = {name: o.state_dict() for name, o in self.optimizers.by_name.items()}
        state |= {"model": self.model.state_dict(), "scaler": self.scaler.state_dict()}
        cuda_rng = torch.cuda.get_rng_state(self.lr.device) if self.lr.is_cuda else None
        return state | {"rng": torch.get_rng_state(), "cuda_rng": cuda_rng}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        for name, optimizer in self.optimizers.by_name.items():
            optimizer.load_state_dict(state[name])
        for group in self.optimizers.param_groups:  # the file holds a copy, perhaps of a CPU's
            group["lr"] = self.lr
            if "capturable" in group:
                group["capturable"] = self.precision.device.type == "cuda"
        if state["scaler"]:  # there is none, where the run began in another precision
            self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and self.precision.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.precision.device)


def compile_layers(model, loss, batch_size):
    """Compiles layers and pointer in place, layers once for all; returns what prevents it."""
    idx = torch.zeros(batch_size, model.config.block_size).long().to(model.lm_head.weight.device)
    parts = [*model.transformer.h, *[model.pointer] * model.config.pointer]
    for part in parts:
        part.compile()
    try:
        loss(idx, idx).backward()
        return []
    except Exception as error:  # compilers fail in many ways, all at the first call
        for part in parts:
            part._compiled_call_impl = None
        return [f"no compiled layers: {type(error).__name__} from torch.compile"]


# ----- the run -----
class TrainingError(RuntimeError):
    """Training cannot go on: what happened at which step, and what to change."""


def out_of_memory(error):
    """Whether an error says that the memory of a device or of the machine does not suffice."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "CPUAllocator" in str(error)


class Interrupts:
    """While entered, signals to end are only noted; alone, a second interrupt acts at once."""

    def __enter__(self):
        self.received, self.previous = None, {}
        numbers = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)}
        heard = [n for n in numbers if signal.getsignal(n) != signal.SIG_IGN]  # as under nohup
        with contextlib.suppress(ValueError):  # outside of the main thread
            self.previous = {number: signal.signal(number, self.note) for number in heard}
        return self

    def note(self, number, frame):
        self.received = self.received or number
        if number == signal.SIGINT and "LOCAL_RANK" not in os.environ:  # torchrun passes its own on
            signal.signal(number, self.previous.get(number, signal.default_int_handler))

    def __exit__(self, *error):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        if self.received not in (None, signal.SIGINT):
            signal.raise_signal(self.received)  # takes its course, now that work is saved

    def __call__(self):
        """Whether any process has received one: all ask at the same steps, and stop together."""
        number = all_reduce(torch.tensor(self.received or 0), "MAX").item()
        self.received = self.received or number or None  # without a call, so no signal is lost
        return number > 0


class Run:
    """One training run: its history, and its folder with ckpt.pt (the best weights) and last.pt.

    history["evals"] has a row per evaluation: losses in nats per token, the next step's rate, the
    seconds of steps and mean gradient norm since the row before, the seconds since the call.
    """

    def __init__(self, config, data, folder, start_id=None):
        self.config, self.data, self.folder = config, data, Path(folder)
        self.identity = asdict(config) | {"start_from": start_id}
        self.identity |= {"data": data.name, "title": data.title, "fingerprint": data.fingerprint}
        self.history = {"evals": [], "step_loss": [], "step_grad_norm": []}
        self.began, self.saved_at, self.sources = time.perf_counter(), time.monotonic(), SOURCES
        self.interrupted = self.status = self.saved_step = self.best_state = None
        self.seconds, self.waited_before, self.resumed_at, self.best_is_new = 0.0, 0.0, 0, False
        self.paths = {"last": self.folder / "last.pt", "best": self.folder / "ckpt.pt"}
        self.seen = {k: stamp(path) for k, path in self.paths.items()}  # as last read or written
        self.kept_until = int(any(self.seen.values()))  # that step ckpt.pt stays

    @property
    def step(self):
        return len(self.history["step_loss"])

    @property
    def finished(self):
        return self.step == self.config.max_iters

    @property
    def best(self):
        return min(self.history["evals"], key=lambda row: row["val_loss"])

    @property
    def last(self):
        return self.history["evals"][-1]

    @property
    def waited(self):
        return self.waited_before + (time.perf_counter() - self.began if self.began else 0.0)

    def due_for_evaluation(self):
        evaluated = self.history["evals"] and self.last["iter"] == self.step
        return not evaluated and (self.step % self.config.eval_interval == 0 or self.finished)

    def evaluate(self, trainer):
        how, splits = (self.config, trainer.precision), trainer.tokens.items()
        losses = {f"{name}_loss": estimate_loss(trainer.model, s, *how) for name, s in splits}
        if not all(map(math.isfinite, losses.values())):
            raise self._diverged(self.step, f"the estimates are {losses}")
        since = self.last["iter"] if self.history["evals"] else 0
        norms = [n for n in self.history["step_grad_norm"][since:] if math.isfinite(n)]
        row = {"iter": self.step, **losses, "learning_rate": get_lr(self.step, self.config)}
        row["time"] = self.seconds - sum(row["time"] for row in self.history["evals"])
        row |= {"waited": self.waited, "grad_norm": sum(norms) / max(1, len(norms))}
        row["peak_memory"] = torch.cuda.max_memory_allocated() if trainer.lr.is_cuda else 0
        self.history["evals"].append(row)
        if row is self.best and not rank():
            weights = copy.deepcopy(trainer.model.state_dict())
            self.best_state, self.best_is_new = self._checkpoint({"model": weights}, trainer), True

    def extend(self, losses, norms, seconds, scaled):
        """Adds the steps just taken, all finite but for gradients that a scaler skips."""
        for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), self.step):
            if not math.isfinite(loss) or not (scaled or math.isfinite(norm)):
                raise self._diverged(step, f"the loss is {loss} and the gradient norm {norm}")
        self.history["step_loss"] += losses
        self.history["step_grad_norm"] += norms
        self.seconds += seconds

    def _diverged(self, step, what):
        text = f"At step {step} {what}, at rate {get_lr(max(0, step - 1), self.config):.2e}: lower"
        return TrainingError(f"{text} learning_rate or raise warmup_iters; ckpt.pt is kept.")

    def _checkpoint(self, state, trainer):
        facts = VOCABULARY | self.data.tokenizer.vocabulary | {"identity": self.identity}
        facts |= {"sources": self.of_one_code() and SOURCES, "best_val_loss": self.best["val_loss"]}
        return state | facts | {"iter_num": self.step, "model_args": asdict(trainer.model.config)}

    def save(self, trainer, every=0.0):
        """Writes both files, if the last time is `every` seconds ago or there was none."""
        first, recent = self.saved_step is None, time.monotonic() - self.saved_at < every
        if rank() or (self.step < self.kept_until if first else recent):
            return
        self.best_is_new |= stamp(self.paths["best"]) is None  # deleted meanwhile
        if first and self.seen["last"]:  # no ckpt.pt of before may lie beside this run's last.pt
            self.save_best()
        if self.step != self.saved_step or stamp(self.paths["last"]) is None:
            state = {"history": self.history, "seconds": self.seconds, "waited": self.waited}
            state |= {"best": self.best_state}  # whatever comes between, ckpt.pt can be made of it
            if not all(p.isfinite().all() for p in trainer.model.parameters()):
                raise self._diverged(self.step, "weights are not finite")
            self._write("last", self._checkpoint(trainer.state_dict() | state, trainer))
            self.saved_step, self.saved_at = self.step, time.monotonic()
        self.save_best()

    def save_best(self):
        if self.best_is_new and self.step >= self.kept_until:
            self._write("best", self.best_state)
            self.best_is_new = False

    def _write(self, which, checkpoint):
        for key, path in self.paths.items():
            if stamp(path) not in (None, self.seen[key]):
                raise CheckpointError(f"{path} is another process's by now: choose another folder.")
        save_checkpoint(self.paths[which], checkpoint)
        self.seen[which] = stamp(self.paths[which])

    def restore(self, trainer):
        saved, kept = on_main_process(self._saved_state)
        if saved is None:
            return
        try:
            self.history = {key: list(saved["history"][key]) for key in self.history}
            trainer.load_state_dict(saved)
            self.seconds, self.waited_before = float(saved["seconds"]), float(saved["waited"])
            self.began = None if self.finished else self.began  # loading is no training
            self.sources = saved.get("sources")
            self.best_state, self.kept_until = dict(saved["best"]), kept[0]  # may be a later one
            self.best_is_new = not rank() and kept != (self.best["iter"], self.best["val_loss"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            if isinstance(error, RuntimeError) and "loading state_dict" not in str(error):
                raise  # the device's error, not the file's
            raise CheckpointError(f"{self.paths['last']} lacks parts of a run: {FRESH}.") from None
        self.resumed_at = self.saved_step = self.step

    def _saved_state(self):
        found = {k: load_checkpoint(p, self.identity) for k, p in self.paths.items() if stamp(p)}
        kept = found.get("best", {})
        if kept and "last" not in found:
            raise CheckpointError(f"{self.paths['best']} lies there without its last.pt: {FRESH}.")
        return found.get("last"), (kept.get("iter_num", 0), kept.get("best_val_loss"))

    def load(self, which="best", device="cpu"):
        path, early = self.paths[which], self.history["evals"] and self.step < self.kept_until
        if early or not rank() and stamp(path) != self.seen[which]:
            raise CheckpointError(f"{path} is not, or no longer, this run's: train on, or again.")
        return load_model(path, device, self.data, self.identity)

    def of_one_code(self):  # imported, on the disk and before a resume
        return self.sources == SOURCES == [p.exists() and sha256_of(p) for p in CODE]

    def end(self, trainer):
        self.waited_before, self.began, self.best_state = self.waited, None, None
        skipped = sum(not math.isfinite(norm) for norm in self.history["step_grad_norm"])
        text = f"finished in {self.waited:,.0f} s, {self.seconds:,.0f} s of them steps"
        text = "loaded, not trained again" if self.resumed_at == self.step else text
        if not self.finished:
            text = "interrupted and saved: run this again, without fresh, to resume; a notebook"
            text += " goes on with this partial run: restart its kernel to end all"
            text = text if self.saved_step is not None else "interrupted before anything was saved"
        notes = [text, *trainer.obstacles]
        changed = "model.py or helpers.py changed: restart with fresh for a run of the new code"
        notes += [changed] * (not self.of_one_code())
        notes += [f"{skipped} steps left out for overflow in float16"] * bool(skipped)
        notes += ["training tokens on the disk, for want of room"] * trainer.loader.streamed
        self.status = "; ".join(notes)


def train_model(
    model, data, config, out, precision=None, fresh=False, view=None, save_every=30, start_from=None
):
    """Trains a model of this shape from its seed's initial weights; returns the Run.

    Called again it resumes from the folder `out` or loads a finished run; `fresh=True` starts over.
    A signal to end acts between two steps, once all is saved; a crash costs `save_every` seconds.
    Raises CheckpointError, TrainingError and ValueError.
    """
    if start_from is not None and Path(start_from).resolve().parent == Path(out).resolve():
        raise ValueError(f"{start_from} lies in this run's folder: choose another for the run.")
    precision, run = precision or choose_precision(), None
    with Interrupts() as interrupted:
        try:
            made = make_model(config, data)
            kinds = [(each.config, *map(type, each.modules())) for each in (model, made)]
            if kinds[0] != kinds[1]:
                raise ValueError("The model is not make_model's: make it anew, or change model.py.")
            weights, start_id = made.state_dict(), None
            if start_from is not None:
                weights, start_id = on_main_process(lambda: start_weights(start_from, config, data))
            run = Run(config, data, out, start_id)
            trainer = Trainer(model.to(precision.device).train(), data, config, precision)
            trainer.model.load_state_dict(weights)
            torch.manual_seed(config.seed)
            if not fresh:
                run.restore(trainer)
            train_loop(run, trainer, view or (lambda run: None), save_every, interrupted)
        except (RuntimeError, MemoryError) as error:
            short = out_of_memory(error)
            if run and (short or isinstance(error, TrainingError)):
                run.save_best()
            if not short:
                raise
            run = trainer = None
    if run is None:  # here nothing of it is held any more, so the same kernel can try again
        model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
        text = f"No memory for batch_size {config.batch_size} x block_size {config.block_size}"
        raise TrainingError(f"{text}: lower the first and raise gradient_accumulation_steps.")
    run.interrupted = interrupted.received
    return run


def train_loop(run, trainer, view, save_every, interrupted):
    """Steps and evaluations in turn, from where the run stands to its end or to an interrupt."""
    while True:
        if run.due_for_evaluation():
            run.evaluate(trainer)
            run.save(trainer, save_every)
        view(run)
        if run.finished or interrupted():
            break
        run.extend(*trainer.run_steps(run.step), scaled=trainer.scaler.is_enabled())
        if not run.due_for_evaluation():  # which checks the weights, and saves them
            run.save(trainer, save_every)
    run.save(trainer)
    all_reduce(torch.zeros(1))  # nobody leaves before the files are written
    run.end(trainer)
    view(run)


# ----- text and the command line -----
def generate_text(model, data, prompt, precision, new_tokens, temperature=0.8, top_k=40, seed=0):
    """The prompt and its continuation as text; computed with weights of the precision's type."""
    ids = torch.tensor([data.tokenizer.encode(prompt)], dtype=torch.long, device=precision.device)
    generator = torch.Generator(precision.device).manual_seed(seed)
    model = copy.deepcopy(model).to(precision.device, precision.dtype)
    ids = model.generate(ids, new_tokens, temperature, top_k, generator)
    return data.tokenizer.decode(ids[0].tolist())


def out_folder(name, run="test"):
    """The folder of the notebook's and the command's run on the data set of this name."""
    return CODE[0].parent / f"out-{'shakespeare' if name == 'shakespeare_char' else name}-{run}"


def print_progress(run):
    """The view of the command line: a line per evaluation, and how the run ended."""
    losses = f"loss {run.last['train_loss']:.4f}, on validation {run.last['val_loss']:.4f}"
    text = run.status or f"step {run.step:,} of {run.config.max_iters:,}: {losses}"
    try:
        if run.status or run.last["iter"] == run.step:
            print(text, flush=True)
    except OSError:  # from here on nobody reads: a closed terminal or pipe ends no run
        sys.stdout = None


def train_command(options, device):
    """Trains the preset's baseline into the folder of the notebook's cell; returns the Run."""
    if options.fresh and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        raise ValueError("--fresh would start over at each restart: leave out --max-restarts.")
    preset, name = choose_preset(options.preset), str(options.dataset)
    if name in NAMES:  # made by the main process alone; on other hosts the set must be there
        name = on_main_process(lambda: prepare(name, allow_stand_in=not preset.thorough).name)
    data = load(ROOT / name)
    differs = on_main_process(lambda: data.fingerprint) != data.fingerprint
    if all_reduce(torch.tensor(float(differs))):
        raise DataError(f"Hosts hold different sets {name}: copy the main one's folder to all.")
    if name != str(options.dataset) and not rank():
        print(f"{options.dataset} cannot be had (see data/README.md); instead: {data.title}")
    plays = data.name in ("shakespeare_char", STAND_INS["shakespeare_char"])
    config = preset.shakespeare if plays else preset.wikitext2
    config = replace(config, **{k: v for k, v in vars(options).items() if hasattr(config, k)})
    out, view = options.out or out_folder(data.folder.name), None if rank() else print_progress
    how = {"fresh": options.fresh, "start_from": options.start_from, "view": view}
    return train_model(make_model(config, data), data, config, out, choose_precision(device), **how)


def main(arguments=None):
    """`python helpers.py wikitext2`; returns the exit status, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description="Train a preset's baseline, also by torchrun.")
    parser.add_argument("dataset", type=Path, help=f"{', '.join(NAMES)}, or a folder in data/")
    parser.add_argument("--preset", choices=PRESETS, help="default: full with CUDA, else quick")
    parser.add_argument("--fresh", action="store_true", help="start over where a run exists")
    parser.add_argument("--out", type=Path, help="the run's folder (default: the notebook's)")
    parser.add_argument("--start_from", metavar="CKPT", help="a checkpoint's weights to begin with")
    for field in fields(TrainConfig):  # in place of the preset's values
        flag = {"action": argparse.BooleanOptionalAction}
        flag = flag if field.type is bool else {"type": field.type, "metavar": "N"}
        parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, **flag)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    options = parser.parse_args(arguments)
    try:
        with distributed() as device:
            return 130 if train_command(options, device).interrupted else 0
    except (CheckpointError, TrainingError, DataError, ValueError) as error:
        if isinstance(error, TrainingError) or os.environ.get("LOCAL_RANK", "0") == "0":  # once
            print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped: run it again, without --fresh, to resume what was saved.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
