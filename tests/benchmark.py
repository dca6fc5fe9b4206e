"""Measures speed, and the quality that goes with it; asserts nothing.

    python tests/benchmark.py                      steps, generation and, with CUDA, kernels
    python tests/benchmark.py --nanogpt PATH       nanoGPT as well: a checkout, or its model.py
    python tests/benchmark.py --disk               tokens that stay on the disk as well
    python tests/benchmark.py --processes 1 2 4    training on so many GPUs, by torchrun
    python tests/benchmark.py --quality SEED       the losses of whole runs

Sides run in turn in one process, so that ratios hold where times drift, on random tokens. The plain
loop is nanoGPT's around this project's model. Without CUDA, `--preset smoke` takes seconds.
"""

import argparse
import contextlib
import gc
import itertools
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import helpers
from data.prepare import prepare

CUDA = torch.cuda.is_available()
STEPS, ROUNDS = (96 if CUDA else 2), 5
GPT2, CHARS = 50257, 65  # sizes of the vocabularies


def print_table(title, columns):
    """Prints columns by name as a Markdown table."""
    print(f"\n{title}:\n\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for row in zip(*columns.values(), strict=True):
        cells = (x if isinstance(x, str) else f"{x:,.0f}" if x >= 100 else f"{x:.4g}" for x in row)
        print(f"| {' | '.join(cells)} |", flush=True)


def random_data(folder, vocab_size, repeats):
    """A data set as a memory map of a million tokens, whose frequencies fall with their rank."""
    ranks, path = np.random.default_rng(0).random(1_000_000) ** 6, Path(folder, f"{vocab_size}.bin")
    np.tile((ranks * vocab_size).astype(np.uint16), repeats).tofile(path)
    splits = dict.fromkeys(("train", "val"), np.memmap(path, np.uint16, "r"))
    return SimpleNamespace(vocab_size=vocab_size, splits=splits)


def timed(function, *arguments):
    """Seconds of a call, which all processes begin together."""
    helpers.all_reduce(torch.zeros(1))
    wait = torch.cuda.synchronize if CUDA else time.perf_counter
    wait()
    began = time.perf_counter()
    function(*arguments)
    wait()
    return time.perf_counter() - began


def median_time(function, *arguments, rounds=ROUNDS):
    return np.median([timed(function, *arguments) for _ in range(rounds)])


def project_loop(config, data, precision, resident=None):
    """Returns a function that takes so many steps, as `train_model` takes them."""
    config = replace(config, max_iters=10**6, eval_interval=10**6)
    model, done = helpers.make_model(config, data).to(precision.device).train(), 0
    trainer = helpers.Trainer(model, data, config, precision, resident)

    def run(steps):
        nonlocal done
        until = done + steps
        while done < until:
            done += len(trainer.run_steps(done)[0])

    run.trainer = trainer
    return run


def plain_loop(config, data, precision, compiled=False, model=None):
    """The same as nanoGPT's train.py takes them, in each process with its share of the batch."""
    device, done = precision.device, 0
    model = (model or helpers.make_model(config, data)).to(device).train()
    rate, betas = config.learning_rate, (config.beta1, config.beta2)
    with contextlib.redirect_stdout(None):
        optimizer = model.configure_optimizers(config.weight_decay, rate, betas, device.type)
    module = torch.compile(model) if compiled else model
    if helpers.world_size() > 1:
        module = DistributedDataParallel(module, device_ids=[device] if CUDA else None)
    scaler = torch.amp.GradScaler(device.type, enabled=precision.dtype == torch.float16)
    batch, block = len(helpers.shard(torch.empty(1, 1, config.batch_size))[0, 0]), config.block_size
    micro_steps, path = config.gradient_accumulation_steps, data.splits["train"].filename

    def get_batch():
        tokens = np.memmap(path, np.uint16, "r")  # opened each time, against a leak
        starts = torch.randint(len(tokens) - block, (batch,))
        for shift in (0, 1):
            rows = (tokens[i + shift : i + shift + block].astype(np.int64) for i in starts)
            rows = torch.stack([torch.from_numpy(row) for row in rows])
            yield rows.pin_memory().to(device, non_blocking=True) if CUDA else rows

    def run(steps):
        nonlocal done, ahead
        for _ in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = helpers.get_lr(done, config)
            for micro_step in range(micro_steps):
                if helpers.world_size() > 1:
                    module.require_backward_grad_sync = micro_step == micro_steps - 1
                with precision.autocast():
                    loss = module(*ahead)  # with nanoGPT's model after the logits
                    loss = (loss[1] if isinstance(loss, tuple) else loss) / micro_steps
                ahead = tuple(get_batch())
                scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            if done % 10 == 0:
                loss.item()  # for its log
            done += 1

    ahead, run.model = tuple(get_batch()), model
    return run


def nanogpt_loop(path, config, data, precision, compiled=False):
    """That loop around the model of a nanoGPT checkout, with the vocabulary padded as it does."""
    path = Path(path, "model.py") if Path(path).is_dir() else Path(path)
    module = runpy.run_path(str(path), run_name="nanogpt")
    known = module["GPTConfig"].__dataclass_fields__
    shape = {name: value for name, value in asdict(config).items() if name in known}
    shape["vocab_size"] = 50304 if data.vocab_size == GPT2 else data.vocab_size
    torch.manual_seed(config.seed)
    with contextlib.redirect_stdout(None):
        model = module["GPT"](module["GPTConfig"](**shape))
    return plain_loop(config, data, precision, compiled, model)


def measure_ceilings(precision):
    """Rates of the device: FLOP/s of a large matmul, bytes/s of a copy (read and written)."""
    size, length = (8192, 2**29) if CUDA else (2048, 2**26)
    a, b = torch.randn(2, size, size, device=precision.device).to(precision.dtype)
    source, target = torch.ones(2, length, device=precision.device)
    flops = 2 * size**3 / median_time(torch.mm, a, b, rounds=10)
    moved = 8 * length / median_time(target.copy_, source, rounds=10)
    print(f"\nMeasured: {flops / 1e12:.2f} TFLOP/s in matmuls, {moved / 1e12:.3f} TB/s in copies.")
    return flops, moved


def step_work(config, model, precision):
    """Least work of a step: matmul FLOPs, and bytes of optimizer, weights' copies and logits."""
    tokens, width = config.tokens_per_step, precision.dtype.itemsize
    total = model.get_num_params(non_embedding=False)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    matrices -= total - model.get_num_params()  # learned positions multiply nothing
    attention = config.n_layer * config.n_embd * config.block_size  # multiply-adds, causal half
    moved = (28 + (4 + width) * (width < 4)) * total + 4 * width * tokens * model.config.vocab_size
    return 6 * tokens * (matrices + attention), moved


def compare_steps(title, makers, config, precision, ceilings):
    """Prints a row per loop, ratios being to the first, whose Trainer is returned."""
    loops, start_up = [], []
    for make in makers.values():
        began = time.perf_counter()
        loops.append(make())
        timed(loops[-1], STEPS)  # compiles, warms up, captures
        start_up.append(time.perf_counter() - began)
    times = np.array([[timed(loop, STEPS) / STEPS for loop in loops] for _ in range(ROUNDS)])
    median, ratios = np.median(times, axis=0), times / times[:, :1]
    flops, moved = step_work(config, loops[0].trainer.model, precision)
    bound = flops / ceilings[0] + moved / ceilings[1]
    columns = {"loop": makers, "ms per step": 1e3 * median}
    columns |= {"tokens/s": config.tokens_per_step / median, "ratio": median / median[0]}
    columns |= {"least ratio": ratios.min(0), "largest ratio": ratios.max(0)}
    columns |= {"MFU %": 100 * flops / median / ceilings[0], "roofline %": 100 * bound / median}
    columns |= {"start-up s": start_up - STEPS * median}
    print_table(f"{title} (roofline bound {1e3 * bound:.2f} ms)", columns)
    return loops[0].trainer


@torch.no_grad()
def plain_generate(model, tokens, new_tokens, temperature, top_k):
    """As in nanoGPT: every token from the whole context, drawn with torch.multinomial."""
    for _ in range(new_tokens):
        states = model.eval().backbone(tokens[:, -model.config.block_size :])[:, -1:]
        logits = model.logits(states)[:, -1] / temperature
        least = logits.topk(top_k).values[:, -1:]
        probs = logits.masked_fill(logits < least, -torch.inf).softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(probs, 1)], dim=1)


def compare_generation(model, device):
    """Prints sampled tokens/s within the first context."""
    counts, new = (1, 64) if CUDA else (1,), model.config.block_size - 8
    columns = {"sequences": counts, "plain": [], "this project": []}
    for count in counts:
        sample = torch.zeros(count, 8, dtype=torch.int64, device=device), new, 0.8, 40
        columns["plain"].append(count * new / median_time(plain_generate, model, *sample))
        columns["this project"].append(count * new / median_time(model.generate, *sample))
    print_table("Generation, tokens/s", columns)


KINDS = {
    "matmuls": ("nvjet", "gemm", "cutlass", "cublas"),
    "attention": ("sdpa", "fmha", "flash", "cudnn"),
    "loss over the vocabulary": ("_row_loss", "nll_loss", "softmax"),
    "AdamW and clipping": ("multi_tensor", "Fused", "lpnorm"),
    "all else: norms, GELU, dropout, sums, casts": ("",),
}


def print_kernels(title, function, units):
    """Where the GPU's time goes in a call, by kind, per unit of work (a step, a token)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        timed(function)
    found = {kind: np.zeros(2) for kind in KINDS}
    for kernel in recorded.key_averages():
        kind = next(kind for kind, marks in KINDS.items() if any(m in kernel.key for m in marks))
        found[kind] += np.array([kernel.device_time_total, kernel.count]) / units
    found["all kernels"] = sum(found.values())
    microseconds, launches = zip(*found.values(), strict=True)
    columns = {"kernels": found, "microseconds": microseconds, "launches": launches}
    print_table(f"Kernels of {title}", columns)


def measure_speed(options, preset, precision, folder):
    ceilings, trainers = measure_ceilings(precision), {}
    runs = {"WikiText-2": (preset.wikitext2, GPT2), "Shakespeare": (preset.shakespeare, CHARS)}
    modes = (False, True) if CUDA or options.compile else (False,)
    for compiled, (name, (config, vocab_size)) in itertools.product(modes, runs.items()):
        data = random_data(folder, vocab_size, 100 if options.disk else 1)
        sides = replace(config, compile=compiled), data, precision
        makers = {"this project": partial(project_loop, *sides)}
        if options.disk:
            makers["this project, from the disk"] = partial(project_loop, *sides, False)
        makers["plain loop"] = partial(plain_loop, *sides, compiled)
        if options.nanogpt:
            makers["nanoGPT"] = partial(nanogpt_loop, options.nanogpt, *sides, compiled)
        title = f"Steps of {name}{', compiled' * compiled}"
        trainers[title] = compare_steps(title, makers, config, precision, ceilings)
    model = helpers.make_model(preset.wikitext2, SimpleNamespace(vocab_size=GPT2))
    compare_generation(model.to(precision.device, precision.dtype), precision.device)
    if CUDA:
        prompt = torch.zeros(1, 8, dtype=torch.int64, device=precision.device)
        print_kernels("one generated token", lambda: model.generate(prompt, 240, 0.8, 40), 240)
        for title, trainer in trainers.items():
            trainer.load(0)
            print_kernels(title, lambda t=trainer: [t.graphed_step() for _ in range(5)], 5)


def measure_quality(config, data, precision, folder):
    """Prints the lowest validation estimates of whole runs."""
    loop, estimates = plain_loop(config, data, precision), []
    tokens = helpers.load_tokens(data.splits["val"], precision.device)
    for _ in range(0, config.max_iters, config.eval_interval):
        loop(config.eval_interval)
        estimates.append(helpers.estimate_loss(loop.model, tokens, config, precision))
    model = helpers.make_model(config, data)
    run = helpers.train_model(model, data, config, folder, precision=precision)
    if run.interrupted:
        raise KeyboardInterrupt
    plain, ours = f"{min(estimates):.4f}", f"{run.best['val_loss']:.4f}"
    columns = {"seed": [str(config.seed)], "plain loop": [plain], "this project": [ours]}
    print_table(f"Lowest validation estimate on {data.title}", columns)


def measure_rates(base, compiled, precision, folder):
    """Tokens/s of all processes together, by what is trained; None for want of memory."""
    n, data = helpers.world_size(), random_data(folder, GPT2 if CUDA else CHARS, 1)
    base, rates = replace(base, dropout=0.0, compile=compiled), {}
    large = replace(base, n_layer=12, n_head=12, n_embd=768, block_size=1024)
    cases = {"192 sequences per GPU": (base, 192 * n), "124M, 16 per GPU": (large, 16 * n)}
    cases |= {f"{batch} sequences in all": (base, batch) for batch in (12, 24, 48, 96, 192, 384)}
    if not CUDA:
        cases = {"4 sequences per process": (base, 4 * n), "4 sequences in all": (base, 4)}
    loops = {"this project": project_loop, "plain loop": partial(plain_loop, compiled=compiled)}
    for (case, (config, batch)), (name, make) in itertools.product(cases.items(), loops.items()):
        loop = rates[f"{case}, {name}"] = None
        gc.collect()
        torch.cuda.empty_cache()
        with contextlib.suppress(torch.OutOfMemoryError, ValueError):  # in all processes alike
            loop = make(replace(config, batch_size=batch), data, precision)
            tokens = STEPS * batch * config.block_size
            rates[f"{case}, {name}"] = tokens / median_time(loop, STEPS)
    return rates


def measure_scaling(options, preset, folder):
    """Starts this file under torchrun for each number of processes; prints what they measured."""
    file, found = Path(folder, "rates.json"), {}
    for n in options.processes:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={n}", __file__, "--preset", preset.name, "--rates", file]
        command += ["--compile"] * options.compile
        subprocess.run(command, check=True, env={"OMP_NUM_THREADS": "1", **os.environ})
        found[n] = json.loads(file.read_text())
    columns = {"training": found[options.processes[0]]}
    columns |= {f"{n}": [rate or "-" for rate in rates.values()] for n, rates in found.items()}
    print_table("Tokens/s by the number of processes", columns)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=helpers.PRESETS)
    parser.add_argument("--compile", action="store_true", help="both sides")
    parser.add_argument("--nanogpt", metavar="PATH")
    parser.add_argument("--processes", type=int, nargs="+", metavar="N")
    parser.add_argument("--disk", action="store_true")
    parser.add_argument("--quality", type=int, metavar="SEED")
    parser.add_argument("--rates", help=argparse.SUPPRESS)  # what measure_scaling starts
    options = parser.parse_args()
    with helpers.distributed() as device, tempfile.TemporaryDirectory() as folder:
        precision, preset = helpers.choose_precision(device), helpers.choose_preset(options.preset)
        if options.rates:
            rates = measure_rates(preset.wikitext2, options.compile, precision, folder)
            return helpers.rank() or Path(options.rates).write_text(json.dumps(rates))
        machine = helpers.describe_machine(precision)
        print_table("Machine", {name: [machine[name]] for name in machine})
        if options.processes:
            measure_scaling(options, preset, folder)
        elif options.quality is not None:
            data = prepare("wikitext2", allow_stand_in=not preset.thorough)
            config = replace(preset.wikitext2, seed=options.quality)
            measure_quality(config, data, precision, folder)
        else:
            measure_speed(options, preset, precision, folder)


if __name__ == "__main__":
    main()
