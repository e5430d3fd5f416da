"""The spec of train.py: it resumes bit for bit, shares its work among processes, loses nothing, and
says how to go on. Networks have a few thousand weights; what they learn is in the slow tests."""
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from data import DataError
from lab import folders, recipes, runs, settings, worlds
from lab.bench.common import write_cityscapes
from test_tries import sentence

ROOT = Path(__file__).resolve().parent.parent
FAST = ["--workers", "0", "--threads", "1", "--device", "cpu", "--precision", "float32"]
QUICK = ["--images", "6", "--eval-images", "2", *FAST]
BODY = ["--set", "body.name=tiny", "body.width=16", "crops.size=(64, 96)", "fit.batch=2",
        "fit.interval=2", "fit.warmup=4"]
HEADS = ["model.rois=16", "model.proposals=20"]
SMALL = [*QUICK, *BODY, *HEADS]
REAL = [*FAST, *BODY, *HEADS, "body.weights=none", "--dataset", "cityscapes"]
CELLS = [*QUICK, "--dataset", "cells", "--set", "fit.batch=2", "fit.interval=2"]
PAIRS = [*QUICK, "--method", "queries", *BODY]


def call(*words):
    """train.py in this process."""
    train.main([str(w) for w in words])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of four steps."""
    out = tmp_path_factory.mktemp("runs") / "run"
    call(*SMALL, "--steps", 4, "--out", out)
    return out


@pytest.fixture
def cityscapes(tmp_path):
    """Two street scenes in the official layout: 8-bit images, 16-bit instance ids."""
    scenes = worlds.world("street", "test", 2)
    for split in ("train", "val"):
        write_cityscapes(tmp_path / "city", scenes, split)
    return tmp_path / "city"


# --- What a run leaves behind -----------------------------------------------------------------
def test_a_run_leaves_checkpoint_log_curves_images_metrics_and_predictions(trained):
    for name in ("last.pt", "log.csv", "curves.png", "predictions.png", "predictions.json"):
        assert (trained / name).stat().st_size > 0, name
    metrics = json.loads((trained / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert {"PQ", "SQ", "RQ", "PQ_dagger", "Acc_th", "Prec_th", "mIoU", "AP_mask"} <= metrics.keys()
    assert metrics["run"]["seed"] == 0 and metrics["run"]["split"] == "test"
    with open(trained / "log.csv") as f:
        assert [int(row["step"]) for row in csv.DictReader(f)] == [2, 4]
    state = torch.load(trained / "last.pt", weights_only=True)
    assert state["step"] == 4 and state["settings"]["method"] == "seamless"


# --- Resuming, processes, crashes -------------------------------------------------------------
@pytest.mark.parametrize("words", [SMALL, CELLS, PAIRS], ids=["seamless", "adaptis", "queries"])
def test_20_steps_equal_a_resume_after_step_10(words, tmp_path, monkeypatch):
    """Bit for bit: weights, state of the optimiser, and the log."""
    kept = tmp_path / "parts"
    kept.mkdir()
    save = runs.save_checkpoint

    def keep_the_tenth(path, state):
        save(path, state)
        if state["step"] == 10 and path.parent.name == "whole":
            save(kept / "last.pt", state)
            (kept / "log.csv").write_bytes((path.parent / "log.csv").read_bytes())
    monkeypatch.setattr(runs, "save_checkpoint", keep_the_tenth)
    monkeypatch.setattr(runs, "MINUTE", -1)                           # a checkpoint every step
    call(*words, "fit.interval=3", "--steps", 20, "--eval-images", 1, "--out", tmp_path / "whole")
    call("--resume", kept, "--workers", 0, "--threads", 1, "--device", "cpu", "--precision",
         "float32")
    a, b = (torch.load(tmp_path / run / "last.pt", weights_only=True) for run in ("whole", "parts"))
    assert a["step"] == b["step"] == 20
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    for k, state in a["optimiser"]["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value),
                               torch.as_tensor(b["optimiser"]["state"][k][name]))
    logs = []
    for run in ("whole", "parts"):
        with open(tmp_path / run / "log.csv") as f:
            logs.append([{k: v for k, v in row.items() if k != "images_per_second"}
                         for row in csv.DictReader(f)])
    assert logs[0] == logs[1]
    end = ["19"] if words is CELLS else []                     # of AdaptIS's first stage
    assert [row["step"] for row in logs[0]] == ["3", "6", "9", "12", "15", "18", *end, "20"]


def test_two_processes_train_and_print_the_metrics_of_one(tmp_path):
    """torchrun with gloo: training works, and two ranks evaluate as one does."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = str(ROOT / "train.py")

    def go(*command):
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
    go(*torchrun, script, *SMALL, "--steps", "2", "--eval-images", "3", "--out", "two")
    assert torch.load(tmp_path / "two" / "last.pt", weights_only=True)["step"] == 2
    call("--eval", tmp_path / "two" / "last.pt", "--out", tmp_path / "one", "--workers", 0,
         "--precision", "float32")
    a, b = (json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("two", "one"))
    for key in ("per_category", "AP_mask", "AP_box", "confusion"):
        assert a[key] == b[key], key


# --- Stopping, branching, full disks, losses that are no numbers ----------------------------------
def read(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def stop_after(monkeypatch, step, number):
    """Sends the signal to this process while that step is computed."""
    clip = torch.nn.utils.clip_grad_norm_
    steps = []

    def count(*a):
        steps.append(1)
        if len(steps) == step:
            os.kill(os.getpid(), number)
        return clip(*a)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", count)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_saves_says_how_to_go_on_and_a_branch_leaves_the_run_alone(
        number, code, tmp_path, monkeypatch, capsys):
    stop_after(monkeypatch, 3, number)
    out, other = tmp_path / "run", tmp_path / "other"
    with pytest.raises(SystemExit) as stop:
        call(*SMALL, "--steps", 9, "--out", out)
    assert stop.value.code == code and f"go on with --resume {out}" in capsys.readouterr().err
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 3
    before = read(out)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "has done 3" in sentence(capsys, "--resume", out, "--steps", 2)
    call("--resume", out / "last.pt", "--out", other, "--steps", 4, *FAST)
    assert read(out) == before and (other / "metrics.json").exists()
    assert torch.load(other / "last.pt", weights_only=True)["step"] == 4
    with open(other / "log.csv") as f:
        assert [row["step"] for row in csv.DictReader(f)] == ["2", "4"]


def test_a_folder_belongs_to_one_run(trained, tmp_path, capsys, monkeypatch):
    """Finished, running, ended before its first checkpoint, or asked for twice at once."""
    before = read(trained)
    assert "--resume" in sentence(capsys, *SMALL, "--steps", 2, "--out", trained)
    assert read(trained) == before
    with folders.taken(tmp_path / "run"):
        for words in (QUICK, ["--resume", trained]):
            assert "another process" in sentence(capsys, *words, "--out", tmp_path / "run")
        (tmp_path / "run" / "log.csv").write_text("step")
    assert "before its first" in sentence(capsys, *QUICK, "--out", tmp_path / "run")
    assert "before its first" in sentence(capsys, "--resume", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert [folders.new_folder("a").name for _ in range(3)] == ["a-1", "a-2", "a-3"]
    assert "sampler" in sentence(capsys, *QUICK, "--set", "crops.scale=(2,1)")
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["a-1", "a-2", "a-3"]


def test_a_kill_or_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    """torch's writer, a text and a table alike. Then a row that was cut is dropped."""
    runs.save_checkpoint(tmp_path / "last.pt", {"step": 1})
    runs.write_json(tmp_path / "metrics.json", {"PQ": 1.0})
    before = read(tmp_path)

    def full(handle):
        raise OSError(28, "No space left on device")

    def killed(handle):
        raise KeyboardInterrupt
    monkeypatch.setattr(os, "fsync", killed)                          # in the middle of writing
    with pytest.raises(KeyboardInterrupt):
        runs.save_checkpoint(tmp_path / "last.pt", {"step": 2})
    assert read(tmp_path) == before
    monkeypatch.setattr(os, "fsync", full)
    for write, path in ((runs.save_checkpoint, "last.pt"), (runs.write_json, "metrics.json")):
        with pytest.raises(DataError, match=f"{path}.*No space left.*is kept.*make room"):
            write(tmp_path / path, {"step": 2})
    assert read(tmp_path) == before
    (tmp_path / "log.csv").write_text("step,total,lr,images_per_second\n1,2,3,4\n2,2\n")
    assert [row["step"] for row in runs.Log(tmp_path / "log.csv", 5).rows] == ["1"]


def test_a_checkpoint_is_written_every_minute(tmp_path, monkeypatch):
    """Time goes on by 25 seconds at each step: steps 3, 6, 9, then the last."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    world, saved = runs.World("cpu"), []

    def batches():
        while True:
            now[0] += 25
            yield torch.zeros(1, 3, 2, 2), []

    def save(optimiser, step, seconds, interval):
        saved.append((step, interval[1]))
        world.saved = now[0]
    how = dict(steps=10, lr=0.1, interval=4)
    train.fit(Line(share=1), batches(), world, tmp_path, save, **how)
    assert saved == [(3, 3), (6, 2), (9, 1), (10, 0)]                 # and steps in the interval


# --- The loop ---------------------------------------------------------------------------------
class Line(torch.nn.Module):
    """The smallest method: w x = 1. Two stages, of which each trains its own weight."""

    def __init__(self, share=0.5):
        super().__init__()
        self.first, self.second = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
        self.share, self.trained = share, []

    def losses(self, images, targets):
        self.trained.append((self.first.requires_grad, self.second.requires_grad))
        return {"error": (self.first + self.second - 1).square().sum()}

    def stages(self, fit):
        first = round(self.share * fit["steps"])
        return [("first", torch.optim.SGD([self.first], fit["lr"]), first),
                ("second", torch.optim.SGD([self.second], fit["lr"]), fit["steps"] - first)]


def fit_line(tmp_path, model, **how):
    def batches():
        while True:
            yield torch.zeros(1, 3, 2, 2), []
    saved = []
    train.fit(model, batches(), runs.World("cpu"), tmp_path, lambda *a: saved.append(a), **how)
    return saved


def test_a_training_that_diverges_ends_in_one_sentence(tmp_path, capsys):
    assert "diverges: lower fit.lr" in sentence(
        capsys, *SMALL, "fit.lr=100", "fit.clip=1e9", "--steps", 40, "--out", tmp_path / "run")


def test_stages_train_one_after_the_other_and_fill_the_run(tmp_path):
    model = Line(share=1 / 3)
    saved = fit_line(tmp_path, model, steps=10, lr=0.1, interval=4)
    assert model.trained == [(True, False)] * 3 + [(False, True)] * 7
    assert [step for _, step, *_ in saved] == [10]
    assert model.first.item() == pytest.approx(1 - 0.8 ** 3)          # each step leaves 0.8
    assert model.second.item() == pytest.approx((1 - model.first.item()) * (1 - 0.8 ** 7))
    with open(tmp_path / "log.csv") as f:                             # also where a stage ends
        assert [row["step"] for row in csv.DictReader(f)] == ["3", "4", "8", "10"]


def test_a_step_that_logs_nothing_reads_no_loss(tmp_path, monkeypatch):
    """Reading a number waits for the GPU. So losses are read once an interval."""
    reads = []
    item = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda t: reads.append(1) or item(t))
    fit_line(tmp_path, Line(), steps=20, lr=0.1, interval=10)
    assert len(reads) == 2 * 2                                        # two losses, two intervals


def test_the_learning_rate_warms_up_and_falls():
    """Porzi 2019, section 5: from a third in 200 steps, a tenth after 36k and 44k of 48k."""
    fit = recipes.RECIPES["seamless", "cityscapes"]["fit"]
    factors = [train.rate(k, fit["steps"], fit["warmup"], fit["drops"], poly=0)
               for k in (0, 100, 200, 35999, 36000, 43999, 44000)]
    assert factors == pytest.approx([1 / 3, 2 / 3, 1, 1, 0.1, 0.1, 0.01])
    assert train.rate(75, 100, 0, (), poly=0.9) == pytest.approx(0.25 ** 0.9)
    assert train.rate(75, 100, 0, (), poly=0, cosine=True) == pytest.approx(0.5 - 0.125 ** 0.5)


def test_the_splits_of_a_toy_world_share_no_image():
    args = {**train.arguments(train.parse(QUICK))[0]}
    first = [train.open_dataset(args, split)[0].image for split in ("train", "val", "test")]
    assert not any(torch.equal(a, b) for a, b in ((first[0], first[1]), (first[0], first[2]),
                                                  (first[1], first[2])))


# --- Settings and recipes ---------------------------------------------------------------------
@pytest.mark.parametrize("method, dataset", sorted(recipes.RECIPES))
def test_every_recipe_names_settings_that_exist(method, dataset):
    values, origin = settings.resolve(dataset, method, train.fit, {})
    assert set(values) == {"body", "model", "crops", "fit"} and values["fit"]["steps"] > 0
    assert origin["fit", "steps"] == "recipe" and origin["fit", "poly"] in ("signature", "recipe")


PAPERS = [  # method, data set, {setting: value}, where the paper says so
    ("seamless", "cityscapes", {"fit.lr": 0.01, "fit.steps": 48000,
                                "crops.scale": (0.5, 2.0)}, "5"),
    ("seamless", "mapillary", {"model.ratios": (0.2, 0.5, 1, 2, 5), "model.anchor_scale": 2,
                               "crops.short_side": 1920, "fit.steps": 192000}, "5.3"),
    ("affinity", "cityscapes", {"fit.steps": 65000, "fit.batch": 32, "model.variant": "B",
                                "model.loss_weights": (0.25, 1.0, 1.0)}, "4 and B"),
    ("affinity", "coco", {"fit.steps": 200000, "fit.lr": 0.02, "model.variant": "C",
                          "model.score_threshold": 0.75, "crops.short_side": 800}, "B"),
    ("adaptis", "cityscapes", {"fit.lr": 1e-4, "fit.lr_body": 5e-5, "model.radius": 280.0,
                               "model.points": 6, "model.threshold": 0.4}, "7"),
    ("adaptis", "coco", {"model.points": 8, "fit.batch": 16, "crops.short_side": 600}, "7"),
    ("ibs", "cityscapes", {"fit.steps": 65000, "fit.batch": 32, "crops.size": (512, 1024)}, "5.2"),
    ("ibs", "mapillary", {"fit.steps": 150000, "crops.size": (1024, 1024)}, "5.2"),
    ("queries", "cityscapes", {"fit.steps": 90000, "fit.batch": 16}, "5.2"),
    ("queries", "mapillary", {"fit.steps": 300000}, "5.2")]


@pytest.mark.parametrize("method, dataset, numbers, where", PAPERS)
def test_a_recipe_has_the_papers_numbers(method, dataset, numbers, where):
    values, _ = settings.resolve(dataset, method, train.fit, {})
    for name, number in numbers.items():
        section, key = name.split(".")
        assert values[section][key] == number, (name, f"section {where}")


def test_set_wins_over_recipe_and_signature_and_show_says_so(capsys):
    call("--set", "fit.lr=0.5", "model.window=8", "--show")
    text = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "0.5" in text["fit.lr"] and "command line" in text["fit.lr"]
    assert "950" in text["fit.steps"] and "recipe" in text["fit.steps"]
    assert "signature" in text["fit.clip"]


def test_weights_that_cannot_be_had_are_named(capsys, tmp_path, cityscapes, monkeypatch):
    def offline(*a, **k):
        raise OSError("no network")
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    real = ["--dataset", "cityscapes", "--root", cityscapes, "--workers", 0]
    text = sentence(capsys, *real, "--out", tmp_path / "r")
    assert "body.weights=FILE" in text and "body.weights=none" in text
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "w.pt")
    text = sentence(capsys, *real, "--out", tmp_path / "r", "--set",
                    f"body.weights={tmp_path / 'w.pt'}")
    assert "not the weights of resnet50" in text


# --- Real layouts -----------------------------------------------------------------------------
@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_is_named_from_any_process(cityscapes, tmp_path, capsys, workers):
    for path in (cityscapes / "leftImg8bit" / "train" / "town").iterdir():
        path.write_bytes(path.read_bytes()[:300])
    text = sentence(capsys, *REAL, "--root", cityscapes, "--steps", 1, "--out", tmp_path / "r",
                    "--workers", workers)
    assert "leftImg8bit" in text
