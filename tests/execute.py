"""Executes the notebook headless, as CI and the committed report do: `python tests/execute.py --help`.

The kernel inherits this process's environment, so NANOGPT_PRESET and DATA_MIRROR reach it.
"""

import argparse
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

ROOT = Path(__file__).resolve().parent.parent


def execute(notebook, folder, timeout=None):
    """Runs the cells top to bottom in `folder`, in place; returns the first error, or None.

    What a viewer would stumble over is left out: no timestamps, no widget state, one piece of text a stream.
    """
    for cell in notebook.cells:  # what an earlier run showed must not stay behind an error
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = NotebookClient(
        notebook, kernel_name="python3", resources={"metadata": {"path": str(folder)}}, timeout=timeout,
        record_timing=False, store_widget_state=False, coalesce_streams=True,
    )  # fmt: skip
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        return error
    finally:
        notebook.metadata.pop("widgets", None)
        language = notebook.metadata["language_info"]
        notebook.metadata["language_info"] = {"name": language["name"]}  # the version says nothing about the report
    return None


def main():
    parser = argparse.ArgumentParser(description="Execute test.ipynb headless into a new file beside it.")
    parser.add_argument("--output", default="report.ipynb", help="file to write (default: %(default)s)")
    parser.add_argument("--in-place", action="store_true", help="overwrite the report in test.ipynb itself")
    arguments = parser.parse_args()
    output = ROOT / ("test.ipynb" if arguments.in_place else arguments.output)
    if output == ROOT / "test.ipynb" and not arguments.in_place:
        parser.error("test.ipynb holds the committed report: give --in-place to overwrite it.")
    notebook = nbformat.read(ROOT / "test.ipynb", as_version=4)
    started = time.time()
    error = execute(notebook, ROOT)
    if error is not None and arguments.in_place:
        output = ROOT / "report-broken-off.ipynb"  # the report stays as it was
    nbformat.write(notebook, output)
    print(f"{output.name} written after {time.time() - started:.0f} s.")
    if error is not None:
        sys.exit(f"The notebook stopped at an error: {str(error).strip().splitlines()[-1]}")


if __name__ == "__main__":
    main()
