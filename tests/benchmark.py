"""Measures a plain training loop against the project's, and generation: `python tests/benchmark.py`.

Both sides run in one process and in turn, on random tokens, so that the ratio holds where absolute times drift.
With CUDA it takes the full preset's sizes, else those of quick. Not a test: nothing is asserted.
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.dataset import load
from data.prepare import prepare
from helpers import (
    Trainer, choose_precision, choose_preset, describe_machine, estimate_loss, get_lr, make_model, markdown_table,
    tokens_on, train_model,
)  # fmt: skip

ROUNDS = 3


def random_data(vocab_size, n_tokens=1_000_000):
    """Tokens whose frequencies fall with their rank, as in text."""
    ranks = np.random.default_rng(0).random(n_tokens) ** 6
    tokens = (ranks * vocab_size).astype(np.uint16)
    return SimpleNamespace(vocab_size=vocab_size, splits={"train": tokens, "val": tokens})


def host_batch(tokens, batch, block):
    """Random windows as tutorials cut them, on the host: inputs and targets (B, T)."""
    starts = torch.randint(len(tokens) - block, (batch,)).tolist()
    return (
        torch.stack([torch.from_numpy(tokens[i + shift : i + shift + block].astype(np.int64)) for i in starts])
        for shift in (0, 1)
    )


def plain_loop(settings, data, precision):
    """The loop that tutorials write: batch from the host, eager step, PyTorch's own loss. Returns its step.

    It uses this project's model, whose aligned output layer and fused AdamW favour it over most such loops.
    """
    model = make_model(settings, data).to(precision.device)
    betas = (settings.beta1, settings.beta2)
    optimizer = model.configure_optimizers(settings.weight_decay, settings.learning_rate, betas, precision.device.type)
    tokens, block = data.splits["train"], settings.block_size
    done = 0

    def step():
        nonlocal done
        for group in optimizer.param_groups:
            group["lr"] = get_lr(done, settings)
        x, y = (part.to(precision.device) for part in host_batch(tokens, settings.batch_size, block))
        with precision.autocast():
            loss = model(x, y)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done += 1

    step.model = model
    return step


def project_loop(settings, data, precision):
    """The project's step, and the seconds until the fifth had run: compiling, warming up, capturing."""
    started = time.perf_counter()
    trainer = Trainer(make_model(settings, data).to(precision.device).train(), data, settings, precision)
    trainer.fill_tables(0, settings.eval_interval)

    def step():
        trainer.graphed_step()

    for _ in range(5):
        step()
    wait(precision)

    def rewind():
        trainer.row.zero_()

    return step, rewind, time.perf_counter() - started, trainer


def wait(precision):
    if precision.device.type == "cuda":
        torch.cuda.synchronize()


def timed(function, precision):
    wait(precision)
    started = time.perf_counter()
    function()
    wait(precision)
    return time.perf_counter() - started


def ceilings(precision):
    """Measured rates of the device: FLOP/s of a large matrix product, bytes/s of a copy (read plus written)."""
    cuda = precision.device.type == "cuda"
    size, length = (8192, 2**29) if cuda else (2048, 2**26)
    a, b = (torch.randn(size, size, device=precision.device).to(precision.dtype) for _ in range(2))
    source = torch.ones(length, device=precision.device)
    target = torch.empty_like(source)
    product = statistics.median(timed(lambda: a @ b, precision) for _ in range(10))
    copy = statistics.median(timed(lambda: target.copy_(source), precision) for _ in range(10))
    return 2 * size**3 / product, 2 * 4 * length / copy


def step_work(settings, model, precision):
    """Least work of one step: matrix FLOPs, and bytes of optimizer, weights' copies and logits."""
    tokens, config = settings.tokens_per_step, model.config
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2) - model.transformer.wpe.weight.numel()
    attention = 2 * config.n_layer * config.n_embd * config.block_size / 2  # multiply-adds a token, causal half
    flops = 6 * tokens * (matrices + attention)
    parameters = model.get_num_params(non_embedding=False)
    width = precision.dtype.itemsize
    copies = (4 + width) * parameters if width < 4 else 0
    return flops, 28 * parameters + copies + 4 * width * tokens * config.vocab_size


def compare_steps(name, settings, data, precision, rates):
    """A row of the table: the plain step, the project's, and what they are worth."""
    cuda = precision.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step, rewind, setup, trainer = project_loop(settings, data, precision)
    memory = f"{torch.cuda.max_memory_allocated() / 2**30:.2f}" if cuda else "not measured"
    plain = plain_loop(settings, data, precision)
    steps = min(100 if cuda else 5, settings.eval_interval)
    for _ in range(3):
        plain()
    times = {"plain": [], "ours": []}
    for _ in range(ROUNDS):
        for side, one in (("plain", plain), ("ours", step)):
            rewind()
            times[side].append(timed(lambda one=one: [one() for _ in range(steps)], precision) / steps)
    slow, fast = (statistics.median(times[side]) for side in ("plain", "ours"))
    flops, moved = step_work(settings, trainer.model, precision)
    floor = flops / rates[0] + moved / rates[1]
    ratios = [a / b for a, b in zip(times["plain"], times["ours"], strict=True)]
    return (
        name, f"{slow * 1e3:.2f}", f"{fast * 1e3:.2f}", f"{min(fast for fast in times['ours']) * 1e3:.2f} to {max(times['ours']) * 1e3:.2f}",
        f"{settings.tokens_per_step / fast:,.0f}", f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        f"{flops / fast / rates[0]:.0%}", f"{floor * 1e3:.2f}", f"{floor / fast:.0%}", memory, f"{setup:.1f}",
    ), trainer  # fmt: skip


def compare_generation(settings, data, precision, sequences, new_tokens):
    """A row: sampled tokens a second without and with cache and graph, in the run's type."""
    model = make_model(settings, data).to(precision.device, precision.dtype)
    prompt = torch.randint(data.vocab_size, (sequences, 8), device=precision.device)
    seconds = {}
    for cache in (False, True):
        new = new_tokens if cache else min(new_tokens, 32)

        def generate(cache=cache, new=new):
            if cache:
                return model.generate(prompt, new, 0.8, 40)
            return plain_generate(model, prompt, new)

        generate()
        seconds[cache] = statistics.median(timed(generate, precision) for _ in range(3)) / new / sequences
    return sequences, f"{1 / seconds[False]:,.0f}", f"{1 / seconds[True]:,.0f}", f"{seconds[False] / seconds[True]:.1f}"


@torch.no_grad()
def plain_generate(model, tokens, new_tokens):
    """Every token from the whole context, drawn with torch.multinomial."""
    model.eval()
    for _ in range(new_tokens):
        logits = model(tokens[:, -model.config.block_size :])[0][:, -1].float() / 0.8
        kth = logits.topk(min(40, logits.size(-1))).values[:, -1:]
        probabilities = logits.masked_fill(logits < kth, float("-inf")).softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(probabilities, 1)], dim=1)
    return tokens


KINDS = {
    "matrix products": ("nvjet", "gemm", "cutlass", "cublas"),
    "attention": ("sdpa", "fmha", "flash", "cudnn"),
    "loss over the vocabulary": ("_row_loss", "_row_gradient", "nll_loss", "softmax"),
    "AdamW and clipping": ("multi_tensor", "Fused", "lpnorm"),
}


def kind_of(kernel):
    kinds = (kind for kind, marks in KINDS.items() if any(mark in kernel for mark in marks))
    return next(kinds, "all else: norms, GELU, dropout, sums, casts")


def print_kernels(run, units, name, shown=16):
    """Where the card's time goes in `run()`, a unit of work (a step, a token): by kind, then the longest kernels."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    kernels = sorted(recorded.key_averages(), key=lambda kernel: -kernel.device_time_total)
    kinds = {}
    for kernel in kernels:
        time_and_count = kinds.setdefault(kind_of(kernel.key), [0.0, 0.0])
        time_and_count[0] += kernel.device_time_total / units
        time_and_count[1] += kernel.count / units
    rows = sorted(((kind, *values) for kind, values in kinds.items()), key=lambda row: -row[1])
    rows.append(("all kernels", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    print(f"\n{name}:\n")
    print(markdown_table(("kernels", "microseconds", "launches"), [(kind, f"{us:.0f}", f"{n:.0f}") for kind, us, n in rows]))
    rows = [(f"{k.device_time_total / units:.1f}", f"{k.count / units:.0f}", k.key[:90]) for k in kernels[:shown]]
    print("\n" + markdown_table(("microseconds", "launches", "kernel"), rows))


def compare_quality(precision, settings, data):
    """Lowest validation estimates, nats a token, of a whole run by the plain loop and by the project."""
    torch.manual_seed(settings.seed)
    tokens, estimates = tokens_on(precision.device, data.splits["val"]), []
    step = plain_loop(settings, data, precision)
    for done in range(1, settings.max_iters + 1):
        step()
        if done % settings.eval_interval == 0 and done > 0.8 * settings.max_iters:
            estimates.append(estimate_loss(step.model, tokens, settings, precision))
    with tempfile.TemporaryDirectory() as folder:
        history = train_model(make_model(settings, data), data, settings, folder, precision=precision)
    return min(estimates), min(history["val_loss"])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quality", type=int, metavar="SEED", help="instead, train WikiText-2 whole, both ways, from this seed")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    precision = choose_precision()
    cuda = precision.device.type == "cuda"
    preset = choose_preset("full" if cuda else "quick")
    print(markdown_table(("", ""), describe_machine(precision).items()))
    if arguments.quality is not None:
        settings = replace(preset.wikitext2, seed=arguments.quality)
        plain, ours = compare_quality(precision, settings, load(prepare("wikitext2")))
        return print(f"\nSeed {settings.seed}, lowest validation estimate: plain loop {plain:.4f}, this project {ours:.4f}.")
    rates = ceilings(precision)
    print(f"\nMeasured: {rates[0] / 1e12:.2f} TFLOP/s in a matrix product, {rates[1] / 1e12:.3f} TB/s in a copy.\n")
    runs = [("WikiText-2", preset.wikitext2, 50257), ("Shakespeare", preset.shakespeare, 65)]
    if cuda:
        runs += [(f"{name}, compiled", replace(settings, compile=True), size) for name, settings, size in runs]
    rows, trainers = [], []
    for name, settings, vocab_size in runs:
        row, trainer = compare_steps(name, settings, random_data(vocab_size), precision, rates)
        rows.append(row)
        trainers.append(trainer)
    header = ("step of", "plain ms", "ours ms", "spread", "tokens/s", "ratio", "of the matrix rate", "floor ms",
              "share of the floor", "peak GiB", "set-up s")  # fmt: skip
    print(markdown_table(header, rows))
    print("\nGeneration, tokens a second:\n")
    counts = (1, 64) if cuda else (1,)
    data = random_data(50257)
    new_tokens = min(240, preset.wikitext2.block_size - 8)
    table = [compare_generation(preset.wikitext2, data, precision, count, new_tokens) for count in counts]
    print(markdown_table(("sequences", "plain", "ours", "ratio"), table))
    if cuda:
        for (name, _, _), trainer in zip(runs, trainers, strict=True):
            trainer.row.zero_()
            print_kernels(lambda trainer=trainer: [trainer.graphed_step() for _ in range(5)], 5, f"One step of {name}")
        model = make_model(preset.wikitext2, data).to(precision.device, precision.dtype)
        prompt = torch.zeros(1, 8, dtype=torch.long, device=precision.device)
        print_kernels(lambda: model.generate(prompt, new_tokens, 0.8, 40), new_tokens, "One generated token, one sequence")


if __name__ == "__main__":
    main()
