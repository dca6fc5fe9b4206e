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
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import helpers
from data.fetch import atomic_write
from data.prepare import prepare

RESULTS = Path(__file__).resolve().parent.parent / ".results"
SHARE = 0.2  # of the baseline's tokens, for each run of the sensitivity study
SEEDS = (1337, 1338)
STUDIED = {
    "learning_rate": (3e-4, 1e-3, 3e-3),
    "batch_size": (6, 12, 24),
    "n_embd": (192, 384, 576),
    "block_size": (128, 256, 512),
    "dropout": (0.0, 0.1, 0.3),
}


def score(data, config, precision, which, stride=None):
    """The Score of a run's `best` or `last` weights, and the seconds of its steps."""
    with tempfile.TemporaryDirectory() as folder:
        model = helpers.make_model(config, data)
        run = helpers.train_model(model, data, config, folder, precision=precision)
        if run.interrupted:
            raise KeyboardInterrupt
        model = run.load(which, precision.device)
        return helpers.evaluate(model, data, "val", stride), run.seconds


# ----- the ladder -----


def improved_configs(preset):
    """The preset's improved models; without any, those of `record` in its baseline's sizes."""
    sizes = ("batch_size", "block_size", "n_layer", "n_head", "n_embd", "max_iters")
    sizes += ("warmup_iters", "eval_interval", "eval_iters", "compile")
    small = {name: getattr(preset.wikitext2, name) for name in sizes}
    return preset.improved or [replace(c, **small) for c in helpers.PRESETS["record"].improved]


def ladder_configs(preset):
    """Per data set (step, config) from the baseline to the improved model, each on the last's."""
    text, play = improved_configs(preset)
    steps = {"rotary position embedding, no biases": {"rotary": True, "bias": False}}
    steps |= {"QK-norm": {"qk_norm": True}, "squared ReLU": {"squared_relu": True}}
    steps |= {"RMSNorm without gain": {"rms_norm": True}}
    muon = f"Muon for the hidden matrices, final learning rate {text.min_lr:g}"
    steps |= {muon: {"muon_lr_scale": 20.0, "min_lr": text.min_lr}}
    texts = [("baseline", preset.wikitext2)]
    for step, changes in steps.items():
        texts.append((step, replace(texts[-1][1], **changes)))
    longer = f"batch size {text.batch_size}, context {text.block_size:,}, dropout {text.dropout:g}"
    longer += f", learning rate {text.learning_rate:g}, {text.max_iters:,} steps"
    texts.append((longer, replace(text, pointer=False)))
    texts.append(("pointer-sentinel mixture", text))
    own = {"batch_size": play.batch_size, "max_iters": play.max_iters, "bias": False}
    own |= {"learning_rate": 1e-3, "min_lr": 1e-4, "dropout": 0.2}
    plays = [("baseline", preset.shakespeare)]
    first = f"batch size {play.batch_size}, learning rate 0.001, dropout 0.2, no biases"
    plays.append((first, replace(plays[0][1], **own, warmup_iters=play.warmup_iters)))
    last = f"the options above and Muon, dropout {play.dropout:g}, weight decay"
    plays.append((f"{last} {play.weight_decay:g}, {play.max_iters:,} steps", play))
    return texts, plays


def ladder(datasets, preset, precision):
    """Yields a row per step."""
    for data, configs in zip(datasets, ladder_configs(preset), strict=True):
        for step, config in configs:
            stride = max(1, config.block_size // 4)
            found, seconds = score(data, config, precision, "best", stride)
            row = {"data": data.title, "step": step, "loss": found.loss, "word_perplexity": None}
            if data.unit == "token":
                row["word_perplexity"] = found.word_perplexity
            yield row | {"seconds": seconds, "seed": config.seed}


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


def sensitivity(datasets, preset, precision):
    """Yields a row per value and seed; what stands in the middle is trained once."""
    for data, baseline in zip(datasets, (preset.wikitext2, preset.shakespeare), strict=True):
        known = {}
        for parameter, value, changed in one_away(baseline):
            for config in (replace(changed, seed=seed) for seed in SEEDS):
                if config not in known:
                    known[config] = score(data, config, precision, "last")
                found, seconds = known[config]
                row = {"data": data.title, "unit": data.unit, "parameter": parameter}
                row |= {"value": value, "seed": config.seed, "steps": config.max_iters}
                row["tokens"] = config.max_iters * config.tokens_per_step
                yield row | {"loss": found.loss, "seconds": seconds}


STUDIES = {"ladder": ladder, "sensitivity": sensitivity}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=helpers.PRESETS, default="record")
    parser.add_argument("--only", choices=STUDIES, help="default: both")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    precision, preset = helpers.choose_precision(), helpers.choose_preset(options.preset)
    stand_in = {"allow_stand_in": not preset.needs_real_data}
    datasets = [prepare(name, **stand_in) for name in ("wikitext2", "shakespeare_char")]
    for name in [options.only] if options.only else STUDIES:
        results = {"environment": helpers.describe_machine(precision), "rows": []}
        for row in STUDIES[name](datasets, preset, precision):
            results["rows"].append(row)
            print(row, flush=True)
            with atomic_write(options.out / f"{name}.json") as file:
                file.write((json.dumps(results, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
