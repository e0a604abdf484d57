"""The tutorial: what is committed is a whole run of it, and it still runs."""

import base64
import io
import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

NOTEBOOK = Path(__file__).parent.parent / "examples" / "salient_parameter_prioritization.ipynb"
# What a run prints, whatever the machine.
PRINTED = (
    "undone bit for bit: True",
    "the slice from above: True",
    "the same outputs: True",
    "the same orders: True",
)


def read():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(cells):
    """Everything that cells printed or showed as text."""
    outputs = [output for cell in cells for output in cell.outputs]
    return "\n".join(
        output.get("text") or output.data.get("text/markdown") or output.data.get("text/plain", "")
        for output in outputs
        if output.output_type != "error"
    )


def tables(cells):
    """Rows of the tables that were shown, by their first cell."""
    lines = re.findall(r"^\|(.*)\|$", texts(cells), flags=re.MULTILINE)
    return {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.split("|")] for line in lines)}


def check_run(cells):
    shown = texts(cells)
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(line in shown for line in PRINTED)
    assert "Warning" not in shown
    share = float(re.search(r"\(([\d.]+) times its size\)", shown)[1])
    assert 1 <= share <= 1.25
    found = tables(cells)
    assert found["Original"][-1] != found["Pruning-Rank"][-1]
    return found


def test_the_committed_run_is_whole():
    cells = code_cells(read())
    found = check_run(cells)
    accuracy = {method: float(found[method][-1].split("/")[0]) for method in ("Original", "Pruning-Rank", "SPP")}
    assert accuracy["Pruning-Rank"] < accuracy["Original"] - 3
    assert abs(accuracy["SPP"] - accuracy["Original"]) < 1
    assert "/home/" not in texts(cells)
    assert NOTEBOOK.stat().st_size < 1_500_000


def test_pictures_fit_a_page():
    outputs = [output for cell in code_cells(read()) for output in cell.outputs]
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 4
    for picture in pictures:
        assert 800 <= Image.open(io.BytesIO(base64.b64decode(picture))).width <= 2000


@pytest.mark.slow
def test_it_runs_on_few_examples(monkeypatch):
    notebook = read()
    monkeypatch.setenv("SPP_FAST", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    check_run(code_cells(notebook))
