"""launch/colab.ipynb, top to bottom on CPU, with sizes of a few seconds (SERA_JAX_QUICK=1); no cell is left out."""

import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed (pip install -e '.[dev]')")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed (pip install -e '.[dev]')")
pytest.importorskip("ipykernel", reason="ipykernel is not installed (pip install -e '.[dev]')")

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOK = ROOT / "launch" / "colab.ipynb"


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_notebook_is_stored_without_outputs(notebook):
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) > 5 and not any(cell.outputs or cell.execution_count for cell in code)


@pytest.mark.parametrize(
    "source, device, asked",
    [
        ("git+https://host/x", "cpu", "sera_jax @ git+https://host/x"),
        ("git+https://host/x", "tpu", "sera_jax[tpu] @ git+https://host/x"),
        ("/content/sera_jax", "cuda", "/content/sera_jax[cuda]"),
        ("", "cpu", None),
    ],
)
def test_where_the_package_is_missing_the_runtime_gets_its_own(source, device, asked, notebook, monkeypatch):
    """The install cell alone; pip is not called but looked at."""
    cell = next(cell for cell in notebook.cells if cell.id == "install")
    called = []
    found = device == "cuda"
    run = lambda words, **_: called.append(words) or subprocess.CompletedProcess(words, 0 if found else 1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(shutil, "which", lambda name: name if found else None)
    monkeypatch.setattr(pathlib.Path, "exists", lambda path: device == "tpu")
    text = cell.source.replace('SOURCE = ""', f"SOURCE = {source!r}")
    if asked is None:
        with pytest.raises(ValueError, match="sera_jax is not installed: set SOURCE above"):
            exec(text, {})
        return
    exec(text, {})
    assert called[-1] == [sys.executable, "-m", "pip", "install", "--quiet", asked]


def client(notebook, folder: pathlib.Path):
    return nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )


def outputs(cell) -> tuple[str, set[str]]:
    """What a cell printed, and the kinds of what it shows."""
    text = "".join(o.text for o in cell.outputs if o.output_type == "stream")
    return text, {kind for o in cell.outputs if "data" in o for kind in o.data}


@pytest.mark.slow
def test_the_notebook_runs_from_install_to_export(notebook, tmp_path):
    environment = {**os.environ, "SERA_JAX_QUICK": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("XLA_FLAGS", None)  # one device, as on a CPU runtime
    client(notebook, tmp_path).execute(env=environment)
    cells = {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}
    assert all(cell.execution_count for cell in cells.values())
    told = {name: outputs(cell) for name, cell in cells.items()}
    assert told["install"][0] == "this runtime has: cpu\n"
    assert "exported iterate 2" in told["train"][0]
    assert not any(mark in told["train"][0] for mark in "\r\x1b")  # no bars, which would be stored stroke by stroke
    rates = re.findall(r"iteration (\d): win rate ([\d.]+) % \[([\d.]+), ([\d.]+)\]", told["wins"][0])
    assert [rate[0] for rate in rates] == ["1", "2"]
    assert all(0 <= float(low) <= float(rate) <= float(high) <= 100 for _, rate, low, high in rates)
    assert {"image/png", "text/html"} <= told["wins"][1]
    right, flipped = map(int, re.findall(r"label \w+: (\d+) pairs", told["dropped"][0]))
    assert right + flipped == 96 and flipped > 0 and {"image/png", "text/html"} <= told["dropped"][1]
    (page,) = cells["report"].outputs
    assert 'srcdoc="&lt;!doctype html' in page.data["text/html"].lower()
    assert "96 pairs of 96 rows" in told["own"][0]
    assert "model.safetensors" in told["take"][0]
    # Only what the install cell may do was left undone.
    assert (tmp_path / "runs" / "toy" / "result.json").exists() and (tmp_path / "sera_jax-export.zip").exists()
