"""The notebooks run from top to bottom, and what is committed of them is whole, clean and small."""

import re
import runpy

import pytest
from launching import ROOT

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ABLATIONS = ROOT / "experiments" / "results" / "ablations"
MAX_BYTES = 600_000
PRIVATE = re.compile(r"/(root|home|Users|work|tmp|usr|opt)/")


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def text_of(output):
    data = output.get("data", {})
    return "".join([output.get("text", ""), data.get("text/plain", ""), data.get("text/markdown", "")])


def check_outputs(notebook):
    """Every code cell ran once, in order, without errors, warnings or what belongs to one machine."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for output in outputs(notebook):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text
        assert not PRIVATE.search(text_of(output)), text_of(output)


def has_pictures(notebook):
    return any("image/png" in output.get("data", {}) for output in outputs(notebook))


def test_the_repository_has_six_notebooks():
    assert len(NOTEBOOKS) == 6


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebooks_are_executed_and_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    check_outputs(notebook)
    assert has_pictures(notebook) or (path.stem == "04_ablations" and not any(ABLATIONS.glob("table*.json")))
    assert path.stat().st_size < MAX_BYTES
    assert set(notebook.metadata) == {"kernelspec"}
    assert not any(cell.metadata for cell in notebook.cells)
    assert not PRIVATE.search("".join(cell.source for cell in notebook.cells))


LONG = ("01_quickstart", "02_anatomy", "03_generation", "05_images", "06_boundaries")


@pytest.mark.parametrize(
    "path", [pytest.param(p, marks=[pytest.mark.slow] * (p.stem in LONG), id=p.stem) for p in NOTEBOOKS]
)
def test_every_notebook_runs_from_top_to_bottom(path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the kernel starts in an empty directory
    check_outputs(runpy.run_path(str(ROOT / "notebooks" / "execute.py"))["execute"](path))
