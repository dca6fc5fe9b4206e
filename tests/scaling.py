"""Measures training on one card and on several: `python tests/scaling.py --processes 1 2 4`.

Starts itself under torchrun for each number of processes and prints Markdown tables: tokens/s of the project and of a
plain loop as nanoGPT has it (host batch, eager step, DistributedDataParallel), each with its own fixed batch a card;
tokens/s at the same whole batch on more cards; and the step with tokens in memory against tokens on the disk. On
random tokens. `--disk` measures the last of these alone. `--smoke` takes sizes for a CPU, where only the mechanism is
tried. Not a test: nothing is asserted.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
from benchmark import host_batch, random_data, timed

from helpers import (
    Settings, StopRequests, Trainer, choose_precision, describe_machine, get_lr, join_processes, make_model, markdown_table,
    rank, summed, world_size,
)  # fmt: skip

PLAN = Settings(dropout=0.0, eval_interval=64)
LARGE = replace(PLAN, n_layer=12, n_head=12, n_embd=768, block_size=1024)  # 124M parameters
SMALL = replace(PLAN, n_layer=2, n_head=2, n_embd=32, block_size=32, eval_interval=8)


def plans(smoke):
    """What is measured: models with their batch a card, whole batches shared out, and the setting of the disk's row."""
    if smoke:
        return {"small model": (SMALL, 4)}, (SMALL, (2, 4)), replace(SMALL, batch_size=4), 1000
    return {"the plan's model": (PLAN, 192), "124M parameters": (LARGE, 16)}, (PLAN, (12, 24, 48, 96, 192, 384)), PLAN, 50257


def project_step(settings, data, precision, resident=None):
    """Steps by the project's own loop; `settings.batch_size` is that of all processes together."""
    trainer = Trainer(make_model(settings, data).to(precision.device).train(), data, settings, precision, resident)
    return lambda steps: trainer.advance(0, steps, StopRequests(), lambda step: None)


def plain_step(settings, data, precision):
    """Steps as nanoGPT takes them, each process with its share of the batch."""
    model = make_model(settings, data).to(precision.device).train()
    betas = (settings.beta1, settings.beta2)
    optimizer = model.configure_optimizers(settings.weight_decay, settings.learning_rate, betas, precision.device.type)
    module = torch.compile(model) if settings.compile else model
    if world_size() > 1:
        module = DistributedDataParallel(module, device_ids=[precision.device] if precision.device.type == "cuda" else None)
    tokens, block, batch = data.splits["train"], settings.block_size, settings.batch_size // world_size()
    cuda = precision.device.type == "cuda"

    def get_batch():
        windows = host_batch(tokens, batch, block)
        return (part.pin_memory().to(precision.device, non_blocking=True) if cuda else part for part in windows)

    def run(steps):
        x, y = get_batch()
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = get_lr(step, settings)
            for index in range(settings.gradient_accumulation_steps):
                module.require_backward_grad_sync = index == settings.gradient_accumulation_steps - 1
                with precision.autocast():
                    loss = module(x, y)[1] / settings.gradient_accumulation_steps
                x, y = get_batch()
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def tokens_per_second(make, settings, data, precision, rounds=3, **options):
    """The median rate of all processes together, or None where the memory does not suffice."""
    try:
        run, steps = make(settings, data, precision, **options), settings.eval_interval
        run(steps)  # compiles, warms up, captures
        return settings.tokens_per_step * steps / statistics.median(round_seconds(run, steps, precision) for _ in range(rounds))
    except torch.OutOfMemoryError:  # of every process alike: they do the same
        return None
    finally:
        run = None
        gc.collect()
        if precision.device.type == "cuda":
            torch.cuda.empty_cache()


def round_seconds(run, steps, precision):
    summed(torch.zeros(1))  # all begin together
    return timed(lambda: run(steps), precision)


def measure(path, smoke, disk, compile):
    """Under torchrun: measures, and the first process writes what came out as JSON."""
    precision = choose_precision(join_processes())
    torch.manual_seed(rank())
    models, (shared, batches), single, vocab_size = plans(smoke)
    data, ranks = random_data(vocab_size), world_size()
    found = {"machine": describe_machine(precision), "models": {}, "shared": {}, "disk": {}}
    if disk:
        models, batches = {}, ()
    for name, (settings, batch) in models.items():
        settings = replace(settings, batch_size=batch * ranks, compile=compile)
        rates = [tokens_per_second(make, settings, data, precision) for make in (project_step, plain_step)]
        found["models"][f"{name}, {batch} x {settings.block_size} tokens a card"] = rates
    for batch in batches:
        if batch % ranks == 0:
            settings = replace(shared, batch_size=batch, compile=compile)
            found["shared"][str(batch)] = tokens_per_second(project_step, settings, data, precision)
    if ranks == 1:
        with tempfile.TemporaryDirectory() as folder:
            data.splits["train"] = mapped(np.tile(data.splits["train"], 100), Path(folder, "tokens.bin"))
            for resident in (True, False):
                rate = tokens_per_second(project_step, single, data, precision, resident=resident)
                found["disk"]["in memory" if resident else "on the disk"] = 1e3 * single.tokens_per_step / rate
    if rank() == 0:
        Path(path).write_text(json.dumps(found))
    if dist.is_initialized():
        dist.destroy_process_group()


def mapped(tokens, path):
    tokens.tofile(path)
    return np.memmap(path, tokens.dtype, "r")


def cards(count):
    return f"{count} card{'s' * (count > 1)}"


def shown(rate):
    return "out of memory" if rate is None else f"{rate:,.0f}"


def tables(found):
    """Markdown of what was measured: a dict from the number of processes to what `measure` wrote."""
    counts = sorted(found)
    first = found[counts[0]]
    yield markdown_table(("", cards(counts[-1])), first["machine"].items())
    rows = []
    for name in first["models"]:
        for index, loop in enumerate(("this project", "plain DDP loop")):
            rates = [found[count]["models"][name][index] for count in counts]
            share = rates[-1] * counts[0] / rates[0] / counts[-1] if rates[0] and rates[-1] else None
            rows.append((name, loop, *map(shown, rates), "" if share is None else f"{share:.0%}"))
    if rows:
        yield "Tokens/s, the same batch on each card:"
        yield markdown_table(("model", "loop", *map(cards, counts), f"efficiency at {counts[-1]}"), rows)
    rows = [(batch, *(shown(found[c]["shared"][batch]) if batch in found[c]["shared"] else "" for c in counts)) for batch in first["shared"]]
    if rows:
        yield "Tokens/s of the plan's model, the whole batch shared out:"
        yield markdown_table(("sequences in all", *map(cards, counts)), rows)
    if counts[0] == 1 and len(counts) > 1:
        one, more = first["shared"], found[counts[1]]["shared"]
        paying = [int(batch) for batch in more if more[batch] and (one[batch] or 0) < more[batch]]
        yield f"{cards(counts[1])} first pay at {min(paying)} sequences." if paying else f"{cards(counts[1])} pay at none of these batches."
    if first["disk"]:
        places = ", ".join(f"{place} {ms:.3f}" for place, ms in first["disk"].items())
        yield f"Milliseconds a step of the plan's batch on one card, with tokens {places}."


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--disk", action="store_true", help="tokens on the disk against tokens in memory, on one card, and no more")
    parser.add_argument("--smoke", action="store_true", help="sizes for a CPU")
    parser.add_argument("--compile", action="store_true", help="torch.compile, for both loops")
    parser.add_argument("--measure", metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(options.measure, options.smoke, options.disk, options.compile)
    found = {}
    for count in [1] if options.disk else options.processes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "found.json")
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", __file__, "--measure", path]
            command += ["--smoke"] * options.smoke + ["--disk"] * options.disk + ["--compile"] * options.compile
            subprocess.run(command, check=True, env={"OMP_NUM_THREADS": "1", **os.environ})
            found[count] = json.loads(path.read_text())
            print("\n\n".join(tables(found)), flush=True)


if __name__ == "__main__":
    main()
