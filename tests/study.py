"""Measures what the report shows as kept results, and writes them to .results: `python tests/study.py`.

The steps from the plan's models to those beyond it, one after the other, and the sensitivity study; on a GPU, in
minutes. Everything is scored on validation splits alone.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.dataset import load
from data.prepare import NAMES, prepare
from helpers import (
    Run, choose_precision, choose_preset, made_by, make_model, read_results, score_split, sensitivity_study, train_model,
    write_results,
)  # fmt: skip


def ladder(start, end, changes):
    """(what was changed, Settings) from `start` on, each step keeping the ones before; checks that it comes to `end`."""
    settings = start
    for change, fields in changes:
        settings = replace(settings, **fields)
        yield change, settings
    rest = {f for f in vars(end) if getattr(settings, f) != getattr(end, f)} - {"compile", "eval_interval", "eval_iters"}
    assert not rest, f"the steps leave out {rest}"


def measure(data, settings, precision, change):
    """One step's row: validation loss of the best checkpoint by sliding windows, and the seconds of its training."""
    with tempfile.TemporaryDirectory() as folder:
        history = train_model(make_model(settings, data), data, settings, folder, precision=precision)
        run = Run(data, settings, history, folder, "black")
        score = score_split(run.load("best", precision.device), data, "val", settings.sliding_stride)
    words = score.word_perplexity if data.tokenizer.name != "char" else None
    row = dict(data=data.title, change=change, loss=score.loss, word_perplexity=words, seconds=run.last["seconds"], seed=settings.seed)
    print(row, flush=True)
    return row


def steps(preset, datasets, precision):
    """Rows of every step but each text's first and last, which the report itself measures."""
    (text, play), (end_text, end_play) = datasets, preset.beyond
    switches = [
        ("rotary positions, no biases", dict(rotary=True, bias=False)),
        ("normalised queries and keys", dict(qk_norm=True)),
        ("squared ReLU", dict(squared_relu=True)),
        ("RMSNorm", dict(rms_norm=True)),
        (f"Muon for the blocks' matrices, last rate {end_text.min_lr:g}", dict(muon_factor=20.0, min_lr=end_text.min_lr)),
    ]
    tuned = ("batch_size", "block_size", "dropout", "learning_rate", "muon_factor", "warmup_iters", "max_iters", "compile", "eval_iters")
    nano = dict(batch_size=end_play.batch_size, learning_rate=1e-3, min_lr=1e-4, dropout=0.2, max_iters=min(2500, end_play.max_iters),
                warmup_iters=100, bias=False)  # fmt: skip
    rest = {f: getattr(end_play, f) for f in vars(end_play)}
    longer = (f"{end_text.batch_size} sequences of {end_text.block_size:,} tokens a batch, dropout {end_text.dropout:g}, "
              f"rate {end_text.learning_rate:g}, {end_text.max_iters:,} steps")  # fmt: skip
    text_changes = [*switches, (longer, {f: getattr(end_text, f) for f in tuned}), ("pointer", dict(pointer=end_text.pointer))]
    play_changes = [(f"{end_play.batch_size} sequences a batch, rate 1e-3, dropout 0.2, no biases", nano), ("", rest)]
    quick = dict(eval_interval=max(1, preset.wikitext2.max_iters // 5), eval_iters=min(50, preset.wikitext2.eval_iters))
    often = dict(eval_interval=max(1, end_play.max_iters // 12), eval_iters=min(50, preset.shakespeare.eval_iters))
    for data, start, end, changes, pace in ((text, preset.wikitext2, end_text, text_changes, quick), (play, preset.shakespeare, end_play, play_changes, often)):
        for change, settings in list(ladder(start, end, changes))[:-1]:
            yield measure(data, replace(settings, **pace), precision, change)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="record")
    parser.add_argument("--only", choices=("steps", "sensitivity"))
    arguments = parser.parse_args()
    precision, preset, began = choose_precision(), choose_preset(arguments.preset), time.time()
    datasets = [load(prepare(name, allow_stand_in=not preset.needs_real_data)) for name in NAMES]
    if arguments.only != "sensitivity":
        end = preset.beyond[1]
        last = {"WikiText-2": "a pointer;", "Tiny Shakespeare": f"the switches above and Muon, dropout {end.dropout:g}, "
                f"decay {end.weight_decay:g}, {end.max_iters:,} steps;"}  # fmt: skip
        results = {"made by": made_by(precision), "last": last, "steps": []}
        for row in steps(preset, datasets, precision):
            results["steps"].append(row)
            write_results("steps.json", results)
    if arguments.only != "steps":
        write_results("sensitivity.json", sensitivity_study(datasets, (preset.wikitext2, preset.shakespeare), precision))
        print(len(read_results("sensitivity.json")["rows"]), "results of the sensitivity study")
    print(f"{time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
