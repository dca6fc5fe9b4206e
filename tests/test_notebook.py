"""The notebook: executed headless under `smoke`, the committed report, and the README against it.

Run: python -m pytest tests/test_notebook.py
"""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from helpers import PRESETS, choose_precision

ROOT = Path(__file__).resolve().parent.parent
MIRROR = os.environ.get("DATA_MIRROR")
REPORT = ROOT / "test.ipynb"
OPTIONS = {"rotary": True, "rms_norm": True, "attn_gate": True, "bias": False}
OPTIONS |= {"pointer": True, "muon_lr_scale": 20.0, "gradient_accumulation_steps": 2}


def outputs(notebook, cell_id=None):
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [out for cell in cells if cell_id in (None, cell.id) for out in cell.outputs]


def shown(notebook, cell_id=None):
    """The tables, Markdown and printed lines of the cells as one text."""
    data = [
        out.get("data", {"text/plain": out.get("text", "")}) for out in outputs(notebook, cell_id)
    ]
    texts = (d.get("text/html", d.get("text/markdown", d.get("text/plain", ""))) for d in data)
    return "\n".join(texts)


def pictures(notebook, cell_id=None):
    return [out for out in outputs(notebook, cell_id) if "image/png" in out.get("data", {})]


def assert_clean(notebook):
    """Nothing that a viewer without JavaScript would stumble over, or that tells of the machine."""
    nbformat.validate(notebook)
    text = json.dumps([out for out in outputs(notebook) if "image/png" not in out.get("data", {})])
    assert notebook.metadata.kernelspec.name == "python3"
    assert "widgets" not in notebook.metadata and "widget-view" not in text
    broken = [
        out
        for out in outputs(notebook)
        if out.output_type == "error" or out.get("name") == "stderr"
    ]
    assert not broken, broken
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "not executed top to bottom in one go"
    assert not re.findall(r"/(?:home|root|tmp|work|Users)/\S+", text), "machine paths"


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """The project without data, network or mirror, and without what a run left behind."""
    for name in ("model.py", "helpers.py", "test.ipynb"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / ".results", tmp_path / ".results")
    (tmp_path / "data").mkdir()
    for path in (ROOT / "data").glob("*.py"):
        shutil.copy(path, tmp_path / "data")
    monkeypatch.setenv("NANOGPT_PRESET", "smoke")
    monkeypatch.setenv("NANOGPT_OFFLINE", "1")
    monkeypatch.setenv("MPLBACKEND", "Agg")  # as on many machines without a screen
    monkeypatch.delenv("DATA_MIRROR", raising=False)
    return tmp_path


def execute(folder):
    """Runs the notebook as the README does; returns the executed one, or None, and stderr."""
    command = [sys.executable, "-m", "jupyter", "execute", "--output=report", "test.ipynb"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    report = folder / "report.ipynb"
    notebook = nbformat.read(report, as_version=4) if not result.returncode else None
    return notebook, result.stderr


def edit(folder, cell_id, old, new):
    notebook = nbformat.read(folder / "test.ipynb", as_version=4)
    (cell,) = [cell for cell in notebook.cells if cell.id == cell_id]
    assert cell.source.count(old) == 1, cell.source
    cell.source = cell.source.replace(old, new)
    nbformat.write(notebook, folder / "test.ipynb")


def test_smoke_run_without_network_is_a_whole_report_on_the_stand_in(copy):
    notebook, error = execute(copy)
    assert notebook, error
    assert_clean(notebook)
    assert sum("image/png" in out.get("data", {}) for out in outputs(notebook)) > 15, "no figures"
    assert "stand-in" in shown(notebook, "setup"), "the headline is silent about the stand-in"
    for cell in ("setup", "score-table", "improved-scores", "findings"):
        assert not re.search("WikiText|Shakespeare", shown(notebook, cell)), f"{cell} is untrue"
    for model in ("improved", "ensemble", "dynamic evaluation"):
        assert model in shown(notebook, "improved-scores")
    assert "1338" in shown(notebook, "improved-times")
    summary = (copy / "training_summary.txt").read_text(encoding="utf-8")
    assert "stand-in" in summary and "WikiText" not in summary and "Shakespeare" not in summary
    files = ["training_comparison.png", "token_distribution.png"]
    files += [f"out-stand_in_{name}-test/ckpt.pt" for name in ("gpt2", "char")]
    assert all((copy / name).stat().st_size > 1000 for name in files)
    again, error = execute(copy)
    assert again, error
    for cell in ("score-table", "improved-scores"):
        assert shown(again, cell) == shown(notebook, cell), "a loaded run scores otherwise"


def test_every_option_and_no_improved_model_is_a_whole_report(copy):
    changes = f"more = {OPTIONS!r}\nchanged = replace(preset.wikitext2, **more)\n"
    changes += "preset = replace(preset, wikitext2=changed, improved=())\n"
    edit(copy, "parameters", "configs =", changes + "configs =")
    notebook, error = execute(copy)
    assert notebook, error
    assert_clean(notebook)
    assert "ensemble" not in shown(notebook), "a table has models that were not trained"


@pytest.mark.skipif(not MIRROR, reason="needs the real texts: set DATA_MIRROR")
def test_smoke_run_on_the_real_texts(copy, monkeypatch):
    monkeypatch.setenv("DATA_MIRROR", MIRROR)
    notebook, error = execute(copy)
    assert notebook, error
    assert_clean(notebook)
    sizes = 2448382, 258659, 295877, 2088628, 217646, 245569, 1003854, 111540, 65, 33278
    missing = [size for size in sizes if f"{size}" not in shown(notebook, "load")]
    assert not missing, f"the table of the data lacks {missing}"
    assert "stand-in" not in shown(notebook)


@pytest.mark.skipif(not MIRROR, reason="needs GPT-2's vocabulary: set DATA_MIRROR")
def test_your_own_text_takes_one_line(copy, monkeypatch):
    monkeypatch.setenv("DATA_MIRROR", MIRROR)
    colours = ["red", "green", "blue"]
    line = "Paragraph {} tells of the {} house and its garden."
    lines = (line.format(n, colours[n % 3]) for n in range(900))
    (copy / "my notes.txt").write_text("\n\n".join(lines), encoding="utf-8")
    edit(copy, "parameters", "own_text = None", 'own_text = "my notes.txt"')
    notebook, error = execute(copy)
    assert notebook, error
    assert_clean(notebook)
    for place in ("setup", "load", "score-table", "findings"):
        assert "my_notes" in shown(notebook, place), f"{place} is of another text"
    assert "Quantum" not in shown(notebook, "samples")
    assert "AWD-LSTM" not in shown(notebook, "literature"), "compared with what it cannot be"
    assert (copy / "out-my_notes-test" / "ckpt.pt").exists()


@pytest.fixture
def cells(monkeypatch):
    """Runs cells of these ids, given the other names that they need; returns all names."""

    def run(*ids, **given):
        plt.close("all")
        sources = {cell.id: cell.source for cell in nbformat.read(REPORT, as_version=4).cells}
        for cell_id in ("libraries", "imports", "look", "panels", *ids):
            exec(sources[cell_id].removeprefix("%matplotlib inline\n"), given)
        return given

    monkeypatch.chdir(ROOT)
    return run


def test_learning_at_rate_0_saves_nothing(cells, corpus, lively):
    """The nats saved by dynamic evaluation are those of learning, not of how the text is read."""
    model = lively(corpus.vocab_size, block_size=16, scale=0.2)
    given = {"improved": [[SimpleNamespace(load=lambda *_: model)] * 2], "better_sets": [corpus]}
    given |= {"names": ["tiny"], "excerpt": None, "precision": choose_precision("cpu")}
    given["preset"] = SimpleNamespace(thorough=True, improved=())
    ids = "losses", "figures", "dynamic-losses", "improved-losses", "label", "dynamic-curve"
    rates = (lambda *_: 0), (lambda *_: 0.003)
    none, some = (cells(*ids, **given, choose_rate=rate)["rows"][0] for rate in rates)
    assert not none["nats saved"].any() and some["nats saved"].max() > 10


def test_figures_name_the_unit_the_split_and_words_that_never_occur(cells, corpus):
    train, ids = np.asarray(corpus.splits["train"]), corpus.splits["test"].astype(int)
    own = replace(corpus, splits={"train": np.where(train == ids[3], ids[4], train)})
    given = {"word_losses": {"baseline": np.ones(len(ids))}, "ids": ids}
    given |= {"spelling": dict.fromkeys(ids, "x\t"), "gains": [np.ones(len(ids) // 2)]}
    assert cells("frequency", words=corpus, **given)["often"].categories[0] != "never"
    axes = cells("frequency", "pointer-frequency", words=own, **given)["axes"]
    assert axes.get_ylabel() == "gain (nats per character)"
    assert axes.get_xticklabels()[0].get_text() == "never"
    axes = cells("shade", "shaded", words=own, **given)["axes"]
    assert axes.get_title("left") == "baseline: 1.00 nats per character"
    assert {text.get_text() for text in axes.texts} == {"x "}, "a tab has no glyph"
    given = {"ranked": pd.DataFrame({"model": ["here"], "x": [3.0]})}
    given |= {"bars": {"x": "x", "hue": "model"}}
    given |= {"names": ["My text"], "last_split": {"My text": "val"}, "overview": Mock()}
    axes = cells("draw-overview", **given)["axes"]
    assert axes.get_xlabel() == "My text, perplexity per word, val split"


def test_rows_of_this_run_use_the_pointer_if_their_configuration_has_one(cells):
    results = pd.DataFrame({"model": ["baseline", "improved"], "word perplexity": [60, 50]})
    results = results.assign(split="test", tokens=9, **{"data set": "a"})
    runs = [SimpleNamespace(config=SimpleNamespace(pointer=pointer)) for pointer in (True, False)]
    given = {"on_whole": results, "results": results, "names": ["a", "b"]}
    given |= {"every": [("a", "baseline", runs[0]), ("a", "improved", runs[1])]}
    given |= {"text": SimpleNamespace(meta={"variant": "own"})}
    used = cells("published", "literature", **given)["literature"]["at test time"]
    assert used.tolist() == ["pointer in its window", "nothing"]


def test_the_place_shown_is_copied_from_the_words_shown(cells):
    """Not from further back, and not another word, though their gains are larger."""
    ids = np.array([7, 7, 2, 8, 3, 8, 7, 3, 9])
    copied = {6: [0.9, 0, 0.02, 0, 0.02, 0], 5: [0, 0, 0.5, 0.4, 0], 7: [0, 0, 0, 0.1, 0.6, 0, 0]}
    given = {"occurrences": np.full(9, 5), "ids": ids}
    find = cells("pointer-place", **given, copying=lambda _, p: (np.array(copied[p]), 0.9))
    place, probs, _ = find["telling_place"](None, np.array([0, 0, 0, 0, 0, 3, 4, 2, 0]), window=5)
    assert place == 7 and probs.tolist() == copied[7][2:]


def test_a_part_of_a_split_has_a_loss_alone(cells, corpus):
    """Perplexity per word and bits per byte would take the whole split's words and bytes."""
    made = cells("figures", "improved-rows", score_rows=[])
    made["add"]("tiny", corpus, "test", "dynamic", made["torch"].ones(5))
    assert made["score_rows"][0][3:5] == [5, 1] and np.isnan(made["score_rows"][0][5:]).all()


def test_a_shared_run_begins_after_the_prompt_s_words(cells):
    """Whose spelling may be another: a word that is unknown is shorter, or a last one goes on."""
    share = cells("longest-run")["longest_shared_run"]
    assert share("The <unk> sat on a mat", "The encyclopaedist", " he sat on a mat ") == 4
    assert share("We saw <unk> articles to-day", "We saw it art", " saw <unk> articles to ") == 0
    assert share('He saw cats " , and " dogs', "He", " saw cats, and dogs ") == 4, "quotes differ"


def test_figures_of_other_values_or_data_are_refused(cells):
    """As after a training cell that failed, with the run of before."""
    check, smoke = cells("trained")["check_trained"], PRESETS["smoke"].wikitext2
    data = SimpleNamespace(fingerprint="a", title="Text")
    check(SimpleNamespace(data=data, config=smoke), data, smoke)
    other = SimpleNamespace(fingerprint="b", title="Text")
    for run_data, config in ((data, replace(smoke, dropout=0.5)), (other, smoke)):
        with pytest.raises(ValueError, match="run its training again"):
            check(SimpleNamespace(data=run_data, config=config), data, smoke)


OF_BASELINES = "runs histories baselines losses scores samples by_position by_model"
OF_BOTH = "every waits curves score_rows results on_whole word_losses by_place sure"
MADE = dict.fromkeys(["train-wikitext", "train-shakespeare"], OF_BASELINES)
MADE |= {"improved": "better firsts static dynamic saved gains by_model"}


@pytest.mark.parametrize("cell", MADE)
def test_training_anew_forgets_what_was_made_of_other_models(cells, monkeypatch, cell):
    """A section that is left out then is an error, not a figure of the models before."""
    monkeypatch.setattr("helpers.train_model", Mock())
    made = dict.fromkeys([*MADE[cell].split(), *OF_BOTH.split()], "old")
    given = dict.fromkeys(("text", "plays"), SimpleNamespace(name="a")) | {"precision": None}
    given |= dict.fromkeys(("names", "models", "configs"), "ab") | {"fresh": False}
    given |= {"better_sets": "ab", "preset": SimpleNamespace(improved="ab")}
    given |= dict.fromkeys(("live_curve", "lap"), Mock()) | {"train_seeds": lambda *each: each}
    after = cells(cell, **given, **made)
    assert [after[name] for name in made] == [None] * len(made)


def test_learning_is_fastest_where_the_intervals_say(cells):
    """Also where the rate rises past half its peak after the first sixth: a long warm-up."""
    rates = [0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1, 0.8, 0.4, 0.1]
    rows = pd.DataFrame({"step": range(0, 1100, 100), "learning_rate": rates, "data": "a"})
    falls = np.where(rows["learning_rate"].rolling(2).mean() > 0.5, 0.3, 0.1)
    given = {"names": ["a"], "configs": [SimpleNamespace(learning_rate=1)]}
    histories = rows.assign(validation=9 - falls.cumsum())
    slope = cells("analysis-lr", histories=histories, **given)["slope"]
    assert slope["a"].to_dict() == pytest.approx({"above half the peak": 3, "below": 1})


def test_gradient_norms_have_a_line_for_each_norm_that_clips(cells):
    runs = [SimpleNamespace(history={"step_grad_norm": [1.0] * 50})] * 3
    given = {"runs": runs, "names": ["a", "b", "c"]}
    given["configs"] = [SimpleNamespace(grad_clip=clip) for clip in (0.5, 0.0, 2.0)]
    lines = cells("analysis-batch", **given)["axes"].lines
    assert {line.get_ydata()[0] for line in lines if line.get_color() == "grey"} == {0.5, 2.0}


def test_line_under_the_cell_says_what_a_stop_means(copy):
    """A stop ends the cell only: what is queued goes on, with the partial run."""
    stopping = "def stopping(run):\n    view(run)\n"
    stopping += "    if run.step == 7 and not run.status:\n"
    stopping += "        signal.raise_signal(signal.SIGINT)\n"
    edit(copy, "train-wikitext", "run_text =", f"import signal\n{stopping}run_text =")
    edit(copy, "train-wikitext", "fresh, view)", "fresh, stopping)")
    notebook = nbformat.read(copy / "test.ipynb", as_version=4)
    (last,) = [n for n, cell in enumerate(notebook.cells) if cell.id == "score-table"]
    notebook.cells = notebook.cells[: last + 1]
    nbformat.write(notebook, copy / "test.ipynb")
    notebook, error = execute(copy)
    assert notebook, error
    line = shown(notebook, "train-wikitext")
    assert all(part in line for part in ("step 7 of", "run this again", "partial run", "kernel"))
    rows = shown(notebook, "history-wikitext")
    assert "<th>5</th>" in rows and "<th>10</th>" not in rows, "went on, or without its rows"
    assert "last" in shown(notebook, "score-table"), "step 7 is not step 5, the best"


def test_started_elsewhere_it_names_its_folder(copy, tmp_path_factory):
    notebook = nbformat.read(copy / "test.ipynb", as_version=4)
    (last,) = [n for n, cell in enumerate(notebook.cells) if cell.id == "libraries"]
    notebook.cells = notebook.cells[: last + 1]
    elsewhere = {"metadata": {"path": str(tmp_path_factory.mktemp("elsewhere"))}}
    with pytest.raises(CellExecutionError, match="in its own folder"):
        NotebookClient(notebook, kernel_name="python3", resources=elsewhere).execute()


def test_full_preset_refuses_the_stand_in(copy, monkeypatch):
    monkeypatch.setenv("NANOGPT_PRESET", "full")
    notebook, error = execute(copy)
    assert notebook is None and "wikitext-2/train.txt" in error, error


def test_committed_report():
    notebook = nbformat.read(REPORT, as_version=4)
    assert_clean(notebook)
    assert REPORT.stat().st_size < 1_500_000 and "stand-in" not in shown(notebook, "load")
    assert "NVIDIA" in shown(notebook, "setup"), "not from a GPU"
    assert len(pictures(notebook)) >= 8, len(pictures(notebook))
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)


def test_cells_are_short():
    cells = [c for c in nbformat.read(REPORT, as_version=4).cells if c.cell_type == "code"]
    lengths = sorted(len([line for line in c.source.splitlines() if line]) for c in cells)
    assert lengths[-1] <= 25 and lengths[len(lengths) // 2] <= 6, lengths
    assert max(len(line) for c in cells for line in c.source.splitlines()) <= 100


def test_readme_fits_a_page_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 120
    missing = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not (ROOT / link).exists()]
    assert not missing, missing


def test_readme_figures_are_the_report_s():
    results = (ROOT / "README.md").read_text(encoding="utf-8").split("<!-- results -->")[1]
    report = shown(nbformat.read(REPORT, as_version=4))
    figures = re.findall(r"(?<![\w.])\d[\d,]*\.\d+", results)
    assert len(figures) >= 6, "the results table is not where this test looks for it"
    missing = [figure for figure in figures if figure not in report]
    assert not missing, f"README figures that the report does not have: {missing}"


def test_top_level_holds_only_what_the_readme_lists():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    top = {Path(name).parts[0] for name in tracked.stdout.splitlines() if not name.startswith(".")}
    files = {"LICENSE", "README.md", "data", "helpers.py", "model.py", "requirements.txt"}
    assert top == files | {"test.ipynb", "tests"}
