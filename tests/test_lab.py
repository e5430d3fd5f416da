"""The spec of what surrounds the ideas: comparisons, the report, settings, the README's example."""
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from data import DataError
from lab import changes, compare, leaderboard, methods, recipes, report, runs, shapes, versus
from test_documents import FEW

ROOT = Path(__file__).resolve().parent.parent


def test_results_md_is_what_the_files_in_lab_results_say():
    assert (ROOT / "RESULTS.md").read_text() == report.report()


def test_every_table_names_its_command_or_says_that_it_is_older():
    for path in sorted((ROOT / "lab" / "results").glob("*.json")):
        table = json.loads(path.read_text())
        measured = [row for row in table["rows"] if "seeds" in row]
        if measured:
            assert table["command"] and table["hardware"], path.name
            assert table["split"] in ("test", "val"), path.name
            assert not table.get("older"), path.name
        for row in table["rows"]:
            assert "seeds" in row or len(row["cells"]) == len(table["columns"]), (path.name, row)


def fake_run(folder, seed, pq, **facts):
    folder.mkdir(parents=True)
    ap = {k: 1.0 for k in ("AP", "AP_small", "AP_medium", "AP_large")}
    metrics = {k: pq for k in ("PQ", "PQ_th", "PQ_st", "Acc_th", "Prec_th", "mIoU")}
    metrics |= {"confusion": {"25": 5.0}, "AP_mask": ap, "AP_box": {**ap, "AP_large": None},
                "images": 50, "run": {"seed": seed, "minutes": 2.0, "hardware": "a CPU", **facts}}
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


def test_equal_minutes_count_all_stages_of_a_method(tmp_path):
    """35 steps of 4 at 10 images a second, 5 at 20, are 15 s; the first 20 warmed up."""
    fake_run(tmp_path / "timed-adaptis", 0, 50.0, batch=4)
    (tmp_path / "timed-adaptis/log.csv").write_text("step,images_per_second\n20,1\n35,10\n40,20")
    assert compare.steps_in(5, "adaptis", [], tmp_path) == 5 * 60 / 15 * 40


def test_a_change_of_predictions_alone_reads_the_weights_of_the_recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(changes, "IMAGES", 2)
    monkeypatch.setitem(methods.METHODS, "changed", None)      # both are taken away afterwards
    monkeypatch.setitem(recipes.RECIPES, ("changed", "street"), None)
    changes.main(["--only", "fusion without void", "--out", str(tmp_path), "--seeds", "1",
                  "--images", "4", *FEW])
    recipe, changed = (tmp_path / name for name in ("the-recipe-0", "fusion-without-void-0"))
    assert (recipe / "last.pt").exists() and not (changed / "last.pt").exists()
    found = [json.loads((p / "val/metrics.json").read_text())["mIoU"] for p in (recipe, changed)]
    assert found[0] != found[1] and (tmp_path / "changes.png").exists()


BOARD = dict(split="test", hardware="1 x 2 threads of a x86_64 CPU, bf16, torch 2.14", minutes=5.5,
             settings={"dataset": "street", "seed": 0, "fit": {"lr": 0.1}})
ENTRIES = [  # how many of three runs are different, in what, and words of the refusal
    (0, {}, ""), (1, dict(minutes=6.2), "took 6.2 minutes"), (1, dict(seed=1), "runs of seed 1"),
    (1, dict(hardware="an H100"), "hardware differs"), (1, dict(split="val"), "split differs"),
    (1, dict(settings={"dataset": "street", "fit": {"lr": 0.2}}), "settings differs"),
    (1, dict(command="python train.py --steps 9"), "command differs"),
    (3, dict(split="val"), "needs test"), (3, dict(settings={"dataset": "cells"}), "50 of street"),
    (3, dict(hardware="1 x 8 threads of a CPU"), "--threads 2")]


@pytest.mark.parametrize("count, change, words", ENTRIES)
def test_the_leaderboard_takes_three_runs_that_keep_its_rules(
        count, change, words, tmp_path, monkeypatch, capsys):
    for s in range(3):
        facts = {"seed": s, **BOARD, "command": f"python /x/train.py --seed {s} --out /y"}
        facts |= change if s >= 3 - count else {}
        fake_run(tmp_path / f"a-{s}", pq=60.0 + s, **facts)
    old = {"name": "old", "seeds": {"0": {"PQ": 50.0}}}
    runs.write_json(tmp_path / "leaderboard.json", {"title": "L", "columns": ["PQ"], "rows": [old]})
    monkeypatch.setattr(leaderboard, "committed", lambda: "abc1234")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    folders = [str(tmp_path / f"a-{s}") for s in range(3)]
    if words:
        with pytest.raises(DataError, match=words):
            leaderboard.main([*folders, "--name", "mine"])
        return
    with pytest.raises(DataError, match="2 seeds and needs 3"):
        leaderboard.main([*folders[:2], "--name", "mine"])
    leaderboard.main([*folders, "--name", "mine"])
    assert "mine: PQ 61.0, place 1 of 2" in capsys.readouterr().out
    row = "| mine | 61.0 | 0, 1, 2 | `python train.py --seed S` | abc1234 | 1 x 2 threads"
    assert row in (tmp_path / "RESULTS.md").read_text()


def test_every_row_of_the_leaderboard_keeps_its_rules_or_says_that_it_is_no_entry():
    rows = json.loads((ROOT / "lab/results/leaderboard.json").read_text())["rows"]
    assert all(("no entry" in row["name"]) == bool(leaderboard.why_not(row)) for row in rows)


STRIDES = {"seamless": {"body.stages.4": 32, "body[8]": 8, "semantic_head": 4, "fuse: segments": 1},
           "adaptis": {"encoder: features": 2, "encoder.down.2": 16, "predict: segments": 1},
           "affinity_head": {"features[32]": 32, "head: P": 4}, "ibs": {"mask_logits EA FB": 4},
           "kernels": {"family.heat 2": 8}, "queries": {"mask_logits: E F": 4}}


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


def test_the_readme_says_what_became_of_each_main_claim():
    """The word in the map is the verdict of the row of RESULTS.md that is the file's headline."""
    rows = json.loads((report.RESULTS / "claims.json").read_text())["rows"]
    main = {row["file"]: row["cells"][-1] for row in rows if row.get("headline")}
    assert len(main) == 7 and {row["cells"][-1] for row in rows} == {
        "reproduced", "in part", "not reproduced", "not testable here"}
    readme = (report.ROOT / "README.md").read_text().splitlines()
    for file, word in main.items():
        assert any(line.startswith(f"| [`{file}`]") and f"| [{word}](RESULTS.md#the-claims" in line
                   for line in readme), file


def test_the_readme_names_files_that_exist():
    text = (ROOT / "README.md").read_text()
    for file, anchor, module in re.findall(r"\]\(([\w./]+)#?([\w-]*)\)|`(lab/[\w/]+\.py)`", text):
        assert (ROOT / (file or module)).exists(), file or module
        heads = re.findall(r"^## (.*)$", (ROOT / file).read_text() if anchor else "", re.M)
        slugs = [re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads]
        assert not anchor or anchor in slugs, anchor
    named = re.findall(r"`(\w+)`[^`|]*", text[text.index("## The map"):text.index("Each idea's")])
    code = "".join(p.read_text() for p in ROOT.glob("*.py"))
    assert all(re.search(rf"(def|class) {name}\b", code) for name in named) and len(named) > 12
