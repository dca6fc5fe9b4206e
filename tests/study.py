"""Measures what the report shows as cached results, and writes them to .results.

    python tests/study.py                              both, on a GPU in some minutes
    python tests/study.py --only ladder                from the baselines to the improved models
    python tests/study.py --only sensitivity           one hyperparameter changed at a time
    python tests/study.py --preset smoke --out FOLDER  to try it; on a CPU minutes per row

Losses are of the whole validation split: in the ladder the best checkpoint's in sliding windows, in
the sensitivity study the last step's in non-overlapping ones. A file is {"environment": {...},
"rows": [...]}, and `pd.DataFrame(rows)` its table.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import helpers
from data.fetch import atomic_write
from data.prepare import prepare

RESULTS = Path(__file__).resolve().parent.parent / ".results"
SHARE = 0.2  # of the baseline's tokens, for each run of the sensitivity study
SEEDS = (1337, 1338)
BASELINE_SEEDS = range(1337, 1345)  # of the ladder: Shakespeare's scatters most
STUDIED = {
    "learning_rate": (3e-4, 1e-3, 3e-3),
    "batch_size": (6, 12, 24),
    "n_embd": (192, 384, 576),
    "block_size": (128, 256, 512),
    "dropout": (0.0, 0.1, 0.3),
}


def prepared(name, preset):
    return prepare(name, allow_stand_in=not preset.thorough)


def score(data, config, precision, which, stride=None):
    """The Score of a run's `best` or `last` weights, and the seconds of its steps."""
    with tempfile.TemporaryDirectory() as folder:
        model = helpers.make_model(config, data)
        run = helpers.train_model(model, data, config, folder, precision=precision)
        if run.interrupted:
            raise KeyboardInterrupt
        model = run.load(which, precision.device)
        losses = helpers.token_losses(model, data, "val", stride)
        return helpers.score_of(losses, data, "val"), run.seconds


# ----- the ladder -----


def cumulative(baseline, steps, improved):
    """(step, data set, config) per step, whose changes come on top of those before it."""
    rows, changes = [], {}
    for step, name, more in steps:
        changes |= more
        rows.append((step, name, replace(baseline, **changes)))
    return [*rows, improved]


def ladder_configs(preset):
    """Per text (step, data set, config) from the baseline to the improved model."""
    text, play = preset.improved
    pieces, words, chars = "wikitext2", "wikitext2_words", "shakespeare_char"
    muon = {"muon_lr_scale": 20.0, "min_lr": text.min_lr}
    size = f"{text.n_layer} layers, {text.batch_size} x {text.block_size:,} tokens, dropout"
    size += f" {text.dropout:g}, learning rate {text.learning_rate:g}, {text.max_iters:,} steps"
    texts = [
        ("baseline", pieces, {}),
        ("by word instead of GPT-2's subwords", words, {}),
        ("rotary position embedding, no biases", words, {"rotary": True, "bias": False}),
        ("RMSNorm without gain", words, {"rms_norm": True}),
        (f"Muon for the hidden matrices, minimum rate {text.min_lr:g}", words, muon),
        ("gated attention", words, {"attn_gate": True}),
        (size, words, asdict(replace(text, pointer=False))),
    ]
    own = {"batch_size": play.batch_size, "warmup_iters": play.warmup_iters, "bias": False}
    own |= {"learning_rate": 1e-3, "min_lr": 1e-4, "dropout": 0.2, "max_iters": play.max_iters}
    first = f"batch size {play.batch_size}, learning rate 0.001, dropout 0.2, no biases"
    first += f", {play.max_iters:,} steps"
    options = {"rotary": True, "rms_norm": True, "attn_gate": True}
    plays = [
        ("baseline", chars, {}),
        (first, chars, own),
        ("rotary position embedding, RMSNorm, gated attention", chars, options),
    ]
    last = f"Muon, learning rate {play.learning_rate:g}, dropout {play.dropout:g}"
    last += f", weight decay {play.weight_decay:g}, minimum rate {play.min_lr:g}"
    return [
        cumulative(preset.wikitext2, texts, ("pointer-sentinel mixture", words, text)),
        cumulative(preset.shakespeare, plays, (last, chars, play)),
    ]


def ladder(preset, precision):
    """Yields a row per step and seed."""
    for configs in ladder_configs(preset):
        title = prepared(configs[0][1], preset).title
        for step, name, config in configs:
            data, stride = prepared(name, preset), max(1, config.block_size // 4)
            for seed in BASELINE_SEEDS if step == "baseline" else SEEDS:
                config = replace(config, seed=seed)
                found, seconds = score(data, config, precision, "best", stride)
                row = {"data": title, "step": step, "loss": found.loss, "word_perplexity": None}
                if data.tokenizer.unit != "character":
                    row["word_perplexity"] = found.word_perplexity
                yield row | {"seconds": seconds, "seed": seed}


# ----- sensitivity -----


def one_away(config):
    """Yields (parameter, value, config) for each studied value, at the same number of tokens."""
    budget = SHARE * config.max_iters * config.tokens_per_step
    for parameter, value in ((name, value) for name in STUDIED for value in STUDIED[name]):
        changes = {parameter: value}
        if parameter == "learning_rate":
            changes["min_lr"] = value * config.min_lr / config.learning_rate
        if parameter == "n_embd":  # heads keep their width
            changes["n_head"] = max(1, round(value * config.n_head / config.n_embd))
        changed = replace(config, **changes)
        steps = max(1, round(budget / changed.tokens_per_step))
        schedule = {"max_iters": steps, "eval_interval": steps, "eval_iters": 2}
        schedule["warmup_iters"] = round(steps * config.warmup_iters / config.max_iters)
        yield parameter, value, replace(changed, **schedule)


def sensitivity(preset, precision):
    """Yields a row per value and seed; what stands in the middle is trained once."""
    baselines = {"wikitext2": preset.wikitext2, "shakespeare_char": preset.shakespeare}
    for name, baseline in baselines.items():
        data, known = prepared(name, preset), {}
        for parameter, value, changed in one_away(baseline):
            for config in (replace(changed, seed=seed) for seed in SEEDS):
                if config not in known:
                    known[config] = score(data, config, precision, "last")
                found, seconds = known[config]
                row = {"data": data.title, "unit": data.tokenizer.unit, "parameter": parameter}
                row |= {"value": value, "seed": config.seed, "steps": config.max_iters}
                row["tokens"] = config.max_iters * config.tokens_per_step
                yield row | {"loss": found.loss, "seconds": seconds}


STUDIES = {"ladder": ladder, "sensitivity": sensitivity}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=helpers.PRESETS, default="record")
    parser.add_argument("--only", choices=STUDIES, help="default: both")
    parser.add_argument("--out", type=Path, help="default: .results, for the preset record alone")
    options = parser.parse_args(arguments)
    if not options.out and options.preset != "record":
        parser.error("the report draws what is in .results: give --out for another preset.")
    out = options.out or RESULTS
    precision, preset = helpers.choose_precision(), helpers.choose_preset(options.preset)
    for name in [options.only] if options.only else STUDIES:
        results = {"environment": helpers.describe_machine(precision), "rows": []}
        for row in STUDIES[name](preset, precision):
            results["rows"].append(row)
            print(row, flush=True)
            with atomic_write(out / f"{name}.partial.json") as file:
                file.write((json.dumps(results, indent=1) + "\n").encode())
        (out / f"{name}.partial.json").replace(out / f"{name}.json")  # once it is whole


if __name__ == "__main__":
    main()
