"""The spec of README.md, lab/course.md and lab/own_images.md: what they print can be typed."""
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from PIL import Image

import train
from lab import compare, exercise, methods, recipes
from test_tries import sentence

ROOT = Path(__file__).resolve().parent.parent
FEW = ["--workers", "0", "--threads", "1", "--device", "cpu", "--precision", "float32", "--steps",
       "1", "--set", "body.name=tiny", "body.width=16", "crops.size=(64, 96)", "fit.batch=2"]


def blocks(name, language):
    """The texts of a document's blocks of this language."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(), re.S)


@pytest.mark.parametrize("name", ["lab/course.md", "lab/own_images.md"])
def test_the_commands_of_a_document_name_programs_flags_and_exercises_that_exist(name):
    commands = [line for block in blocks(name, "bash") for line in block.splitlines()]
    commands += re.findall(r"`(python .*?)`", (ROOT / name).read_text())
    assert len(commands) >= 4 and max(map(len, (ROOT / name).read_text().splitlines())) <= 100
    for command in commands:
        start, *words = shlex.split(command, comments=True)
        program = words[words[0] == "-m"].replace(".py", "").replace(".", "/")
        assert start == "python" and (ROOT / f"{program}.py").exists(), command
        text = (ROOT / f"{program}.py").read_text() + (ROOT / "data.py").read_text()
        assert all(f'"{w}"' in text for w in words if w.startswith("--")), command
        if program == "lab/exercise":
            assert exercise.text_of(words[2], int(words[3])) and len(words) == 4


def test_the_course_changes_lines_that_its_files_have_once():
    changes = [block.splitlines() for block in blocks("lab/course.md", "diff")]
    for file, old, new in changes:
        assert file[:4] == "--- " and (old[0], new[0]) == ("-", "+")
        assert (ROOT / file[4:]).read_text().splitlines().count(old[1:]) == 1, old
    assert len(changes) == 5                                   # one in each session


def test_your_own_images_train_score_and_are_segmented_as_printed(tmp_path, monkeypatch, capsys):
    """The program of the document, then its commands, with flags that make the training short."""
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks("lab/own_images.md", "python")[0], "own_images.md", "exec"), {})
    commands = [shlex.split(block)[2:] for block in blocks("lab/own_images.md", "bash")]
    for words in commands:
        learn = [*FEW, "crops.short_side=64", "model.rois=8", "--steps", "2", "--eval-every", "1"]
        train.main([*words, *(learn if "--eval-every" in words else [])])
    run = tmp_path / "runs" / "own"
    assert "step      1: PQ " in capsys.readouterr().out and list(run.parent.glob("index-*"))
    assert all((run / name).exists() for name in ("metrics.json", "eval/metrics.json", "curve.csv"))
    for image in ("predictions/0.png", "predict/0.png", "predict/panoptic/1.png"):
        assert Image.open(run / image).size == (320, 240)      # the native size
    path = tmp_path / "DIR" / "annotations" / "panoptic_val.json"
    path.write_text(path.read_text().replace('"name": "ring"', '"name": "cup"'))
    text = sentence(capsys, *commands[0][:-1], "runs/other")   # before the training, not after it
    assert "category ring (thing) where the evaluation part has cup (thing)" in text


def test_the_readmes_method_trains_as_printed_and_is_compared(tmp_path, monkeypatch, capsys):
    text, words = (ROOT / "README.md").read_text(), ["--images", "4", "--eval-images", "1", *FEW]
    (tmp_path / "mine.py").write_text(blocks("README.md", "python")[0])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(methods, "METHODS", dict(methods.METHODS))
    monkeypatch.setattr(sys, "argv", ["mine.py", *words, "--out", str(tmp_path / "run")])
    try:
        runpy.run_module("mine", run_name="__main__")
        del methods.METHODS["mine"]
        command = re.search(r"`python -m lab.compare (--import .*?)`", text)[1].split()
        compare.main([*command, *words, "--seeds", "1", "--out", str(tmp_path / "c")])
    finally:
        del recipes.RECIPES["mine", "street"], sys.modules["mine"]
    rows = json.loads((tmp_path / "c" / "compare.json").read_text())["equal images"]
    assert list(rows) == ["seamless", "mine"] and "\nmine        " in capsys.readouterr().out
    for method, folder in (("seamless", "c/seamless-1-0"), ("mine", "c/mine-1-0"), ("mine", "run")):
        metrics = json.loads((tmp_path / folder / "metrics.json").read_text())
        found = metrics["PQ"], metrics["run"]["settings"]["method"]
        assert found == (rows[method][0]["PQ"], method) and (tmp_path / "c/compare.png").exists()
