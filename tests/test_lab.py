"""The spec of what surrounds the ideas: comparisons, the report, settings, the README's example."""
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import train
from data import DataError
from lab import compare, report, runs, shapes, versus

ROOT = Path(__file__).resolve().parent.parent
QUICK = ["--images", "4", "--eval-images", "1", "--workers", "0", "--threads", "1", "--device",
         "cpu", "--precision", "float32", "--steps", "1", "--set", "body.name=tiny",
         "body.width=16", "crops.size=(64, 96)", "fit.batch=2"]


def test_results_md_is_what_the_files_in_lab_results_say():
    assert (ROOT / "RESULTS.md").read_text() == report.report()


def test_every_table_names_its_command_or_says_that_it_is_older():
    for path in sorted((ROOT / "lab" / "results").glob("*.json")):
        table = json.loads(path.read_text())
        measured = [row for row in table["rows"] if "seeds" in row]
        if measured:
            assert table["command"] and table["hardware"] and table["split"] == "test", path.name
            assert not table.get("older"), path.name
        for row in table["rows"]:
            assert "seeds" in row or len(row["cells"]) == len(table["columns"]), (path.name, row)


def test_the_report_averages_seeds_and_pairs_differences(tmp_path, monkeypatch):
    table = {"order": 1, "title": "T", "columns": ["PQ"], "differences": [["a", "b"]], "rows": [
        {"name": "a", "seeds": {"0": {"PQ": 10.0}, "1": {"PQ": 14.0}}},
        {"name": "b", "seeds": {"0": {"PQ": 9.0}, "1": {"PQ": 11.0}}}]}
    text = report.section(table)
    assert "| a | 12.0 | 0, 1 |" in text and "| b | 10.0 | 0, 1 |" in text
    # Differences 1 and 3: mean 2, deviation sqrt 2, t = 12.706 with one degree of freedom.
    assert "| **a - b** | +2.0 [-10.7, +14.7] |" in text


def fake_run(folder, seed, pq):
    folder.mkdir(parents=True)
    ap = {k: 1.0 for k in ("AP", "AP_small", "AP_medium", "AP_large")}
    metrics = {k: pq for k in ("PQ", "PQ_th", "PQ_st", "Acc_th", "Prec_th", "mIoU")}
    metrics |= {"confusion": {"25": 5.0}, "AP_mask": ap, "AP_box": {**ap, "AP_large": None},
                "run": {"seed": seed, "minutes": 2.0, "hardware": "a CPU"}}
    runs.write_json(folder / "metrics.json", metrics)


def test_two_recipes_are_compared_seed_by_seed(tmp_path, capsys):
    for seed, (a, b) in enumerate([(50.0, 48.0), (54.0, 50.0), (52.0, 49.0)]):
        fake_run(tmp_path / f"a-{seed}", seed, a)
        fake_run(tmp_path / f"b-{seed}", seed, b)
    result = versus.versus(str(tmp_path / "a-*"), str(tmp_path / "b-*"))
    # Differences 2, 4, 3: mean 3, deviation 1, t = 4.303 with two degrees of freedom.
    assert result["PQ"] == pytest.approx((52, 49, 3, 3 - 4.303 / 3 ** .5, 3 + 4.303 / 3 ** .5),
                                         abs=1e-3)
    assert "box AP_large" not in result and "PQ" in capsys.readouterr().out


def test_recipes_with_other_seeds_or_unfinished_runs_are_not_compared(tmp_path):
    for name, seed in (("a-0", 0), ("b-1", 1), ("twice-0", 0), ("twice-9", 0)):
        fake_run(tmp_path / name, seed, 50.0)
    (tmp_path / "begun-0").mkdir()
    for first, words in (("a", "seeds must be the same"), ("twice", "two runs of seed 0"),
                         ("begun", "has not ended")):
        with pytest.raises(DataError, match=words):
            versus.versus(str(tmp_path / f"{first}-*"), str(tmp_path / "b-*"))


def test_compare_trains_methods_and_prints_one_table(tmp_path, capsys):
    words = ["--methods", "seamless", "maskrcnn", "--out", str(tmp_path / "c"), *QUICK,
             "model.rois=8", "model.proposals=10"]
    compare.main(words)
    rows = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert list(rows) == ["seamless", "maskrcnn"]
    for method in rows:
        metrics = json.loads((tmp_path / "c" / method / "metrics.json").read_text())
        assert rows[method]["PQ"] == pytest.approx(metrics["PQ"])
        assert f"{method:12s}" in capsys.readouterr().out or method == "maskrcnn"
    assert (tmp_path / "c" / "compare.png").stat().st_size > 0


STRIDES = {"seamless": {"body.stages.4": 32, "body[8]": 8, "semantic_head": 4, "fuse: segments": 1},
           "adaptis": {"encoder: features": 2, "encoder.down.2": 16, "predict: segments": 1},
           "affinity_head": {"features[32]": 32, "head: P": 4}, "ibs": {"mask_logits EA FB": 4},
           "kernels": {"family.heat 2": 16}, "queries": {"mask_logits: E F": 4}}


def test_each_network_draws_its_shapes_in_the_one_size_of_letters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)                                # no weights of an earlier demo
    for name, draw in shapes.NETWORKS.items():
        drawn = draw(tmp_path)
        height, width = drawn.get("image", (3, 32, 32))[1:]    # ibs has two, of 32x32
        for box, stride in STRIDES[name].items():
            assert drawn[box][-2:] == (height // stride, width // stride), box
        assert Image.open(tmp_path / f"{name}_shapes.png").width == 1000
    lab = "".join(p.read_text() for p in (ROOT / "lab").rglob("*.py"))
    assert not re.search("(font|label)size=", lab)


def test_the_readmes_method_trains_as_printed(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    words = [*QUICK, "--out", str(tmp_path / "run")]
    main = train.main
    monkeypatch.setattr(train, "main", lambda argv: main([*argv, *words]))
    from lab import methods, recipes
    monkeypatch.setattr(methods, "METHODS", dict(methods.METHODS))
    monkeypatch.setattr(recipes, "RECIPES", recipes.RECIPES)
    try:
        exec(compile(code, "README.md", "exec"), {})
    finally:
        recipes.RECIPES.pop(("mine", "street"), None)
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert state["settings"]["method"] == "mine"
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["PQ"] >= 0


def test_the_readme_names_files_that_exist():
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"\]\(([\w./]+)\)|`(lab/[\w/]+\.py)`", text):
        assert (ROOT / (name[0] or name[1])).exists(), name
