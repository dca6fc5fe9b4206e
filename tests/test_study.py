"""The study behind the report's cached results, in small sizes.

python -m pytest tests/test_study.py
"""

import json
from dataclasses import asdict

import pandas as pd
import pytest
import study

import helpers

COLUMNS = {
    "ladder": ["data", "step", "loss", "word_perplexity", "seconds", "seed"],
    "sensitivity": ["data", "parameter", "value", "seed", "steps", "tokens", "loss", "seconds"],
}


@pytest.mark.parametrize("name", COLUMNS)
def test_both_studies_run_and_write_flat_rows(name, tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_MIRROR", str(tmp_path / "none"))
    monkeypatch.setenv("NANOGPT_OFFLINE", "1")
    prepare = study.prepare
    monkeypatch.setattr(study, "prepare", lambda name, **how: prepare(name, root=tmp_path, **how))
    monkeypatch.setattr(study, "STUDIED", {"dropout": (0.0, 0.1), "learning_rate": (3e-3,)})
    study.main(["--preset", "smoke", "--only", name, "--out", str(tmp_path)])
    results = json.loads((tmp_path / f"{name}.json").read_text())
    table = pd.DataFrame(results["rows"])
    assert results["environment"].keys() >= {"device", "precision", "PyTorch"}
    assert set(COLUMNS[name]) <= set(table) and not table["loss"].isna().any()
    assert len(table) == (2 * 8 + 2 * 10 if name == "ladder" else 2 * 2 * 3), table


@pytest.mark.parametrize("name", COLUMNS)
def test_the_cached_results_are_of_this_form(name):
    results = json.loads((study.RESULTS / f"{name}.json").read_text())
    assert set(COLUMNS[name]) <= set(pd.DataFrame(results["rows"])) and results["environment"]


def test_the_ladder_leads_from_the_baseline_to_the_improved_model():
    preset = helpers.PRESETS["record"]
    for steps, improved in zip(study.ladder_configs(preset), preset.improved, strict=True):
        names, sets, configs = zip(*steps, strict=True)
        assert names[0] == "baseline" and configs[-1] == improved
        assert len(set(names)) == len(set(zip(sets, configs, strict=True))) == len(steps)


def test_the_cached_ladder_is_of_the_steps_of_today():
    steps = [step for rows in study.ladder_configs(helpers.PRESETS["record"]) for step, *_ in rows]
    cached = json.loads((study.RESULTS / "ladder.json").read_text())["rows"]
    seeds = {step: study.SEEDS for step in steps} | {"baseline": study.BASELINE_SEEDS}
    wanted = [(step, seed) for step in steps for seed in seeds[step]]
    assert [(row["step"], row["seed"]) for row in cached] == wanted


def test_every_run_of_the_sensitivity_study_sees_the_same_number_of_tokens():
    baseline = helpers.PRESETS["full"].wikitext2
    for parameter, value, config in study.one_away(baseline):
        tokens = config.max_iters * config.tokens_per_step
        assert tokens == 0.2 * baseline.max_iters * baseline.tokens_per_step, (parameter, value)
        assert asdict(config)[parameter] == value
