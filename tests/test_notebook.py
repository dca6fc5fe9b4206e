"""The notebook: executed headless under `smoke`, the committed report, and the README's figures against it.

Run: python -m pytest tests/test_notebook.py
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from execute import ROOT, execute

MIRROR = os.environ.get("DATA_MIRROR")
REPORT = ROOT / "test.ipynb"


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def shown(notebook, cell_id=None):
    """The Markdown that the cells show, as one text."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and cell_id in (None, cell.id)]
    return "\n".join(o.data["text/markdown"] for c in cells for o in c.outputs if "text/markdown" in o.get("data", {}))


def pictures(notebook):
    return [output for output in outputs(notebook) if "image/png" in output.get("data", {})]


def assert_clean(notebook):
    """What a viewer without JavaScript would stumble over, or what tells of the machine."""
    nbformat.validate(notebook)
    text = json.dumps([o for o in outputs(notebook) if "image/png" not in o.get("data", {})])
    assert notebook.metadata.kernelspec.name == "python3"
    assert "widgets" not in notebook.metadata and "widget-view" not in text
    assert not [cell.id for cell in notebook.cells if "execution" in cell.metadata], "timing metadata"
    assert not [o for o in outputs(notebook) if o.output_type == "error" or o.get("name") == "stderr"]
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "not executed top to bottom in one go"
    assert not re.findall(r"/(?:home|root|tmp|work|Users)/\S+", text), "machine paths"


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the project without data, network or mirror, and without what a run left behind."""
    for name in ("model.py", "helpers.py", "test.ipynb"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / ".results", tmp_path / ".results")
    shutil.copytree(ROOT / "data", tmp_path / "data", ignore=lambda _, names: {n for n in names if "." not in n or n.endswith("cache")})
    monkeypatch.setenv("NANOGPT_PRESET", "smoke")
    monkeypatch.setenv("NANOGPT_OFFLINE", "1")
    monkeypatch.delenv("DATA_MIRROR", raising=False)
    return tmp_path


def run(folder):
    notebook = nbformat.read(folder / "test.ipynb", as_version=4)
    return notebook, execute(notebook, folder, timeout=300)


def test_smoke_run_without_network_is_a_whole_report_on_the_stand_in(copy):
    notebook, error = run(copy)
    assert error is None, error
    assert_clean(notebook)
    assert len(pictures(notebook)) == 6, "curves at the top, two trainings, three figures"
    headline = shown(notebook, "setup")
    assert "stand-in" in headline and "perplexity a word" in headline, headline
    for title in re.findall(r"^\| (?:\*\*)?([^|*]*(?:WikiText|Shakespeare)[^|*]*)", shown(notebook), re.M):  # the first column
        pytest.fail(f"a table calls the stand-in {title!r}")
    summary = (copy / "training_summary.txt").read_text(encoding="utf-8")
    assert "stand-in" in summary and "WikiText" not in summary and "Shakespeare" not in summary
    for name in ("training_comparison.png", "token_distribution.png", "out-wikitext2-test/ckpt.pt", "out-shakespeare-test/ckpt.pt"):
        assert (copy / name).stat().st_size > 1000, name
    again, error = run(copy)
    assert error is None, error
    rows = [re.findall(r"^\| (?:loss|bits).*", shown(n, "setup"), re.M) for n in (notebook, again)]
    assert rows[0] == rows[1], "a finished run, loaded again, scores otherwise"


def test_the_section_beyond_the_plan_runs_on_the_stand_in(copy):
    notebook = nbformat.read(copy / "test.ipynb", as_version=4)
    (cell,) = [cell for cell in notebook.cells if cell.id == "parameters"]
    cell.source = cell.source.replace(
        "preset = choose_preset(None)",
        "more = dict(rotary=True, qk_norm=True, squared_relu=True, rms_norm=True, pointer=True, muon_factor=20.0, block_size=512, batch_size=1, n_layer=1)\n"
        "preset = choose_preset()\n"
        "preset = replace(preset, seeds=2, beyond=(replace(preset.wikitext2, **more), replace(preset.shakespeare, **more)))",
    )
    error = execute(notebook, copy, timeout=300)
    assert error is None, error
    assert_clean(notebook)
    assert len(pictures(notebook)) == 8, "two trainings more"
    table = shown(notebook, "beyond-score")
    for method in ("one model", "ensemble of 2", "one model that learns as it reads"):
        assert len(re.findall(rf"\| {method} \|", table)) == 3, f"{method}: two splits of the one set, one of the other\n{table}"
    assert "Beyond the plan" in shown(notebook, "setup") and "1338" in shown(notebook, "beyond-seeds")
    assert len(re.findall(r"beyond the plan\*\*$", shown(notebook, "beyond-samples"), re.M)) == 6


@pytest.mark.skipif(not MIRROR, reason="needs the real texts: set DATA_MIRROR")
def test_smoke_run_on_the_real_texts(copy, monkeypatch):
    monkeypatch.setenv("DATA_MIRROR", MIRROR)
    notebook, error = run(copy)
    assert error is None, error
    assert_clean(notebook)
    table = shown(notebook, "load")
    for figure in ("2,448,382", "258,659", "295,877", "2,088,628", "217,646", "245,569", "1,003,854", "111,540", "| 65 |"):
        assert figure in table, f"{figure} is not in the table of the data"
    assert "stand-in" not in shown(notebook)


@pytest.mark.skipif(not MIRROR, reason="needs GPT-2's vocabulary: set DATA_MIRROR")
def test_a_text_of_one_s_own_takes_one_line(copy, monkeypatch):
    monkeypatch.setenv("DATA_MIRROR", MIRROR)
    paragraphs = (f"Paragraph {number} tells of the {'red green blue'.split()[number % 3]} house and its garden." for number in range(900))
    (copy / "my notes.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    notebook = nbformat.read(copy / "test.ipynb", as_version=4)
    (cell,) = [cell for cell in notebook.cells if cell.id == "parameters"]
    assert cell.source.count("own_text = None") == 1
    cell.source = cell.source.replace("own_text = None", 'own_text = "my notes.txt"')
    error = execute(notebook, copy, timeout=300)
    assert error is None, error
    assert_clean(notebook)
    for place in ("setup", "load", "score", "findings"):
        assert "my_notes" in shown(notebook, place), f"{place} is of another text"
    assert "Paragraph" in shown(notebook, "samples-wikitext") and "Rome" not in shown(notebook, "samples-wikitext")
    assert "cannot be compared" in shown(notebook, "literature-read")
    assert (copy / "out-my_notes-test" / "ckpt.pt").exists()


def test_an_error_stops_the_run_and_is_reported(copy):
    notebook = nbformat.read(copy / "test.ipynb", as_version=4)
    notebook.cells = [cell for cell in notebook.cells if cell.id in ("setup", "score")]
    error = execute(notebook, copy, timeout=120)
    assert "section 7" in str(error), f"the error does not say which cells are needed: {error}"


def test_full_preset_refuses_the_stand_in(copy, monkeypatch):
    monkeypatch.setenv("NANOGPT_PRESET", "full")
    _, error = run(copy)
    assert "wikitext-2/train.txt" in str(error), error


def test_committed_report():
    notebook = nbformat.read(REPORT, as_version=4)
    assert_clean(notebook)
    assert REPORT.stat().st_size < 1_500_000
    headline = shown(notebook, "setup")
    assert "Preset record on NVIDIA" in headline and "stand-in" not in shown(notebook), headline
    assert len(pictures(notebook)) == 8
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)


def test_readme_figures_are_the_report_s():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    results = readme.split("<!-- results -->")[1]
    report = shown(nbformat.read(REPORT, as_version=4))
    figures = re.findall(r"\d[\d,]*\.\d+|\d{1,3}(?:,\d{3})+", results)
    assert len(figures) > 10, "the results table is not where this test looks for it"
    missing = [figure for figure in figures if figure not in report]
    assert not missing, f"README figures that the report does not have: {missing}"


def test_execute_does_not_overwrite_the_report():
    command = [sys.executable, str(ROOT / "tests" / "execute.py"), "--output", "test.ipynb"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "--in-place" in result.stderr, result.stderr


def test_top_level_holds_only_what_the_readme_lists():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    top = {Path(name).parts[0] for name in tracked.stdout.splitlines() if not name.startswith(".")}
    assert top == {"LICENSE", "README.md", "data", "helpers.py", "model.py", "requirements.txt", "test.ipynb", "tests"}
