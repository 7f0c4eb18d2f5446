"""Reports of ablations: what is committed is drawn from its records, and says what the figures say."""

import copy
import itertools
import json

import pytest

from experiments.ablations import contexts, curve_report, lengths, pictures, reporting
from experiments.common.reports import EXPERIMENTS, provenance, write_report

RESULTS = EXPERIMENTS / "results/ablations"
RECORDS = sorted(RESULTS.glob("table*.json"))
RENDER = {
    "table": reporting.render,
    "curves": curve_report.render,
    "lengths": lengths.render,
    "contexts": contexts.render,
}


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_reports_are_those_of_their_records(path):
    [render] = [render for kind, render in RENDER.items() if path.name.startswith(kind)]
    assert path.with_suffix(".md").read_text().startswith(render(json.loads(path.read_text())).rstrip())
    assert path.with_suffix(".png").exists()


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_committed_tables_have_all_rows_and_two_seeds_of_the_baseline(path):
    """At `micro`, where a row takes half an hour, a table may be under way, which its page says."""
    record = json.loads(path.read_text())
    [n_baseline] = [len(row["runs"]) for row in record["rows"] if row["name"] == record["baseline"]]
    waiting = [row["name"] for row in record["rows"] if not row["runs"]]
    assert ("Not trained yet" in path.with_suffix(".md").read_text()) == bool(waiting)
    assert record["data"].endswith("-micro") if waiting else n_baseline >= 2
    for row in record["rows"]:
        assert len({run["seed"] for run in row["runs"]}) == len(row["runs"])


def example_record():
    """Three plain transformers and an Hourglass between them, in the reverse of the paper's order."""
    rows = [
        {
            "name": name,
            "hierarchy": name,
            "paper": {"bpc": paper},
            "parameters": 1e6,
            "step_flops": flops,
            "cost": {"step_seconds": flops / 1e9, "memory_bytes": 1e6},
            "runs": [{"seed": 0, "figures": {"bpc": bpc}, "n_predictions": 10}],
        }
        for name, paper, flops, bpc in (("2@1", 1, 1e9, 3.0), ("4@1", 2, 4e9, 2.0), ("1@1 1@2 1@1", 3, 2e9, 1.0))
    ]
    return {"metric": "bpc", "rows": rows, "anchors": {"xz -9": 2.5}, "varied": "hierarchy", "baseline": "2@1"}


def whole_record():
    """`example_record` with what a page says of its table."""
    optimizer = {"schedule": "constant", "learning_rate": 1, "warmup_steps": 0}
    setup = {"model": {}, "optimizer": optimizer, "steps": 1, "n_valid": 0, "data": {"batch_size": 1}}
    texts = {"table": "B1", "data": "text", "title": "", "note": "", "comment": "", "scaled": ""}
    return example_record() | texts | {"setup": setup}


def test_a_page_names_the_optimizers_of_its_setup_and_rows():
    record = whole_record()
    assert "; AdamW, constant" in reporting.render(record)
    record["setup"]["optimizer"]["optimizer"] = "muon"
    assert "; Muon, constant" in reporting.render(record)
    record["rows"][0]["optimizer"] = {"optimizer": "adamw"}
    assert "; AdamW or Muon, constant" in reporting.render(record)


def test_rows_that_are_not_trained_yet_are_named():
    record = whole_record()
    assert "Not trained yet" not in reporting.render(record)
    record["rows"] += [{"name": name, "paper": {"bpc": 4}, "runs": []} for name in ("8@1", "9@1", "theirs")]
    for row in record["rows"][3:5]:
        row["directory"] = row["name"]
    assert "\nNot trained yet: 8@1; 9@1.\n" in reporting.render(record)


def test_what_a_plain_transformer_reaches_at_equal_cost_lies_halfway_in_log_cost():
    record = example_record()
    plain = reporting.plain_rows(record)
    for cost in (reporting.flops, reporting.step_seconds):
        assert reporting.equal_cost(record["rows"][2], plain, cost, "bpc") == pytest.approx(2.5)
        assert reporting.equal_cost(record["rows"][0], plain, cost, "bpc") is None
    dearer = copy.deepcopy(record["rows"][2]) | {"step_flops": 5e9}
    assert reporting.equal_cost(dearer, plain, reporting.flops, "bpc") is None


def test_rows_that_were_not_timed_are_drawn_against_flops(tmp_path):
    record = example_record() | {"table": "1", "data": "text"}
    for row in record["rows"]:
        row["cost"] = None
    pictures.draw(record, tmp_path / "table.png")
    assert (tmp_path / "table.png").exists()


def test_agreement_counts_pairs_in_the_other_order():
    record = example_record()
    assert "correlation with the paper -1.00; 3 of 3 pairs" in reporting.agreement(record, "bpc")
    for row, bpc in zip(record["rows"], (1, 2, 3), strict=True):
        row["runs"][0]["figures"]["bpc"] = bpc
    assert "correlation with the paper 1.00; 0 of 3 pairs" in reporting.agreement(record, "bpc")
    for row in record["rows"]:
        row["runs"][0]["figures"]["bpc"] = 1
    assert "all figures are equal" in reporting.agreement(record, "bpc")


def test_what_others_report_has_columns_of_its_own(tmp_path):
    record = whole_record()
    record["varied"] = "boundaries"
    record["published"] = {"they, text8": {"2@1": 3.0, "4@1": 2.0, "1@1 1@2 1@1": 1.0, "theirs": 1.5}}
    for row in record["rows"]:
        row["paper"] = {}
    groups = ({"length": 5.0, "suppressed": 0.0}, {"length": 6.0, "suppressed": 0.001})
    [run] = record["rows"][2]["runs"]
    record["rows"][2]["runs"] = [run | {"groups": counts} for counts in groups]
    text = reporting.render(record)
    assert "| theirs | 1.500 |" in text and "correlation with they, text8 1.00; 0 of 3 pairs" in text
    assert "| 5.50 | 0.05% |" in text and "| paper |" not in text
    pictures.draw(record, tmp_path / "table.png")
    assert (tmp_path / "table.png").exists()


def test_a_row_beats_a_compressor_with_all_its_figures_or_not():
    record = example_record()
    record["rows"][1]["runs"][0]["figures"]["bpc at k=3"] = 2.6
    assert "xz -9 2.50 (beaten by 1 of 3 rows)" in reporting.anchor_line(record)


def names_in_panels():
    """Of each panel of the committed Table 1: its frame, and the boxes of the names, all in pixels."""
    record = json.loads((RESULTS / "table1-gutenberg8-tiny.json").read_text())
    figure = pictures.draw_costs(record, [row for row in record["rows"] if row["runs"]])
    figure.canvas.draw()
    for axes in figure.axes:
        for name in axes.texts:
            name.arrowprops = name.arrow_patch = None  # the line to the point is no part of the name
        yield axes.get_window_extent(), [name.get_window_extent() for name in axes.texts]


@pytest.mark.parametrize("size", [5, 6.5, 8])
def test_names_of_points_lie_in_the_frame_and_never_on_one_another(monkeypatch, size):
    monkeypatch.setattr(pictures, "NAME_SIZE", size)
    for frame, boxes in names_in_panels():
        assert len(boxes) > 10
        assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)
        assert all(frame.y0 <= box.y0 and box.y1 <= frame.y1 for box in boxes)
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_names_would_overlap_at_the_first_place(monkeypatch):
    monkeypatch.setattr(pictures, "overlap", lambda a, b: False)
    assert any(a.overlaps(b) for _, boxes in names_in_panels() for a, b in itertools.combinations(boxes, 2))


def test_a_dot_in_a_report_s_name_ends_nothing(tmp_path):
    for scale in ("tiny", "micro"):
        write_report(tmp_path / f"table1-book.txt-{scale}", provenance(), scale)
    names = [f"table1-book.txt-{scale}.{ending}" for scale in ("micro", "tiny") for ending in ("json", "md")]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
