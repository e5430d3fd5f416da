"""The trainer's promises: it resumes bit for bit, shares its work among processes, loses nothing, and says what is wrong.

Everything runs on pictures made here, with a network of a few thousand weights; what it learns is in the slow tests."""
import csv
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import adaptis
import cabb_loss
import data
import isus
import seamless
import train
from pq import PanopticQuality, confusion_ratio, instance_pixels

ROOT = Path(__file__).parent.parent
SMALL = ("--width 16 --body tiny --crop 64 96 --batch 2 --rois 16 --proposals 20 --scenes 6 --eval-count 3 --interval 2 --workers 0 --threads 1 "
         "--precision float32 --warmup 4 --device cpu").split()


def call(*words):
    """train.py in this process."""
    train.main([str(w) for w in words])


def sentence(capsys, *words):
    """What train.py says about bad input: exit code 2 and one sentence, no traceback."""
    with pytest.raises(SystemExit) as stop:
        call(*words)
    assert stop.value.code == 2
    err = capsys.readouterr().err.strip()
    assert "Traceback" not in err and len(err.splitlines()) == 1, err
    return err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of four steps."""
    out = tmp_path_factory.mktemp("runs") / "run"
    call(*SMALL, "--steps", 4, "--out", out)
    return out


@pytest.fixture
def cityscapes(tmp_path):
    """Two street scenes in the official layout of Cityscapes: 8-bit pictures, 16-bit instance ids."""
    official = {"road": 7, "sidewalk": 8, "building": 11, "vegetation": 21, "sky": 23, "person": 24, "car": 26, "truck": 27, "sign": 20}
    write_cityscapes(tmp_path / "city", data.StreetScenes(2, size=(64, 128), seed=5), official)
    return tmp_path / "city"


def write_cityscapes(root, scenes, official, splits=("train", "val")):
    for split in splits:
        for kind in ("leftImg8bit", "gtFine"):
            (root / kind / split / "town").mkdir(parents=True)
        for i, s in enumerate(scenes):
            ids = np.zeros(s.segments.shape, np.uint16)
            for k, c in enumerate(s.categories.tolist(), 1):
                thing = scenes.categories[c].isthing and scenes.categories[c].name != "sign"
                ids[s.segments.numpy() == k] = official[scenes.categories[c].name] * 1000 + k if thing else official[scenes.categories[c].name]
            name = f"town_{i:06d}_000000"
            Image.fromarray((s.image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)).save(root / "leftImg8bit" / split / "town" / f"{name}_leftImg8bit.png")
            Image.fromarray(ids).save(root / "gtFine" / split / "town" / f"{name}_gtFine_instanceIds.png")


# --- What a run leaves behind ---------------------------------------------------------------------------------------------

def test_a_run_leaves_checkpoint_log_curves_pictures_metrics_and_predictions(trained):
    for name in ("last.pt", "log.csv", "curves.png", "predictions.png", "metrics.json", "predictions.json"):
        assert (trained / name).stat().st_size > 0, name
    metrics = json.loads((trained / "metrics.json").read_text())
    assert {"PQ", "SQ", "RQ", "PQ_dagger", "Acc_th", "Prec_th", "mIoU", "ceiling", "baseline"} <= metrics.keys()
    steps = [int(line.split(",")[0]) for line in (trained / "log.csv").read_text().splitlines()[1:]]
    assert steps == [2, 4]


def test_the_checkpoint_opens_with_weights_only(trained):
    state = torch.load(trained / "last.pt", weights_only=True)
    assert state["step"] == 4 and state["args"]["method"] == "seamless"


def test_written_predictions_give_the_printed_pq_when_read_back(trained):
    """The PNGs are decoded here by the format's definition, id = R + 256 G + 65536 B, and scored anew."""
    panoptic = json.loads((trained / "predictions.json").read_text())
    scenes = data.StreetScenes(3, seed=0)
    pq = PanopticQuality([c.isthing for c in scenes.categories])
    for i, a in enumerate(panoptic["annotations"]):
        rgb = np.array(Image.open(trained / "predictions" / a["file_name"])).astype(np.int64)
        ids = rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]
        segments = np.zeros_like(ids)
        for k, s in enumerate(a["segments_info"], 1):
            segments[ids == s["id"]] = k
            assert s["area"] == (ids == s["id"]).sum()
        truth = scenes[i]
        pq.update(torch.from_numpy(segments), torch.tensor([s["category_id"] for s in a["segments_info"]], dtype=torch.long),
                  truth.segments, truth.categories, truth.crowd)
    assert pq.compute()["PQ"] == pytest.approx(json.loads((trained / "metrics.json").read_text())["PQ"], abs=1e-9)


def test_eval_of_a_checkpoint_repeats_the_metrics_of_the_run(trained, tmp_path):
    call("--eval", trained / "last.pt", "--out", tmp_path)
    a, b = (json.loads((f / "metrics.json").read_text()) for f in (trained, tmp_path))
    assert a["per_category"] == b["per_category"] and a["AP_mask"] == b["AP_mask"]


def test_predict_colours_anybodys_picture(trained, tmp_path, capsys):
    grey = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70), np.uint8))          # no RGB, odd size
    grey.save(tmp_path / "mine.png")
    call("--predict", trained / "last.pt", tmp_path / "mine.png", "--out", tmp_path)
    assert Image.open(tmp_path / "predict" / "mine.png").size == (70, 50)
    assert Image.open(tmp_path / "predict" / "panoptic" / "mine.png").size == (70, 50)
    assert "mine.png" in capsys.readouterr().out


# --- Resuming, processes, crashes -----------------------------------------------------------------------------------------

def test_20_steps_equal_10_steps_and_a_resume_of_10(tmp_path):
    """Bit for bit: weights, momentum, and what was logged."""
    quick = [*SMALL, "--steps", 20, "--eval-count", 1]
    call(*quick, "--out", tmp_path / "whole")
    call(*quick, "--out", tmp_path / "parts", "--stop-at", 10)
    assert torch.load(tmp_path / "parts" / "last.pt", weights_only=True)["step"] == 10
    call("--resume", tmp_path / "parts")
    a, b = (torch.load(tmp_path / run / "last.pt", weights_only=True) for run in ("whole", "parts"))
    assert a["step"] == b["step"] == 20
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    for k, state in a["optimiser"]["state"].items():
        assert torch.equal(state["momentum_buffer"], b["optimiser"]["state"][k]["momentum_buffer"])
    def losses(run):
        return [line.split(",")[:-1] for line in (tmp_path / run / "log.csv").read_text().splitlines()]
    assert losses("whole") == losses("parts")


def test_another_seed_gives_other_weights(tmp_path, trained):
    call(*SMALL, "--steps", 4, "--out", tmp_path / "b", "--seed", 1)
    a, b = (torch.load(f / "last.pt", weights_only=True)["model"] for f in (trained, tmp_path / "b"))
    assert any(not torch.equal(a[k], b[k]) for k in a if a[k].dtype.is_floating_point)


def test_the_sampler_serves_the_networks_levels_from_crop_number_start_on(tmp_path):
    """Crop size, ranges, the network's canonical size and the seed reach it; a resumed run goes on where it stopped."""
    args = train.settings({"dataset": "street", "crop": [32, 48], "scenes": 3, "seed": 3, "canonical": 40, "scale": [0.9, 1.1], "scale_things": [0.5, 4.0]})
    dataset, world = train.open_dataset(args, True), train.World(args)
    sampler = train.build_sampler(dataset, args, world, tmp_path, 4)
    assert sampler.mode == "isus" and sampler.canonical == 40 and tuple(sampler.r_st) == (0.9, 1.1) and tuple(sampler.r_th) == (0.5, 4.0)
    image, target = next(iter(sampler))
    again, same = train.build_sampler(dataset, args, world, tmp_path, 0).crop(4)
    assert image.shape == (3, 32, 48) and torch.equal(image, again) and torch.equal(target.segments, same.segments)


def test_labels_on_disk_are_indexed_once_and_the_index_lies_beside_the_runs(cityscapes, tmp_path, monkeypatch):
    words = ("--dataset", "cityscapes", "--root", cityscapes, *SMALL, "--weights", "none", "--short-side", 96, "--steps", 2)
    call(*words, "--out", tmp_path / "runs" / "a")
    assert (tmp_path / "runs" / "index-cityscapes-train.pt").is_file()
    def again(*_):
        raise AssertionError("a label was read again for the index")
    monkeypatch.setattr(isus._Rows, "__getitem__", again)
    call(*words, "--out", tmp_path / "runs" / "b")
    call(*words, "--out", tmp_path / "runs" / "c", "--stop-at", 1)
    call("--resume", tmp_path / "runs" / "c")


@pytest.mark.parametrize("loss", ["cabb", "standard"])
def test_the_box_loss_reaches_both_heads(loss):
    """CABB lets a box that goes on beyond the crop be as large as it likes, in proposals and in detections."""
    args = train.settings({"body": "tiny", "width": 16, "frozen": 0, "box_loss": loss})
    net = train.build_seamless(data.StreetScenes(1).categories, args)
    gt, cut = torch.tensor([[0.0, 10, 20, 30]]), torch.tensor([[True, False, False, False]])
    beyond = cabb_loss.encode(torch.tensor([[-50.0, 10, 20, 30]]), gt)
    for head in (net.proposal_head, net.region_head):
        assert (head.box_loss(beyond, gt, gt, 0.1, (64, 64), cut) < 1e-6) == (loss == "cabb")


def test_two_processes_train_and_print_the_table_of_one(tmp_path, trained):
    """torchrun with gloo: training works, and evaluation on two ranks prints the very table that one rank prints."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "train.py")]
    run = subprocess.run([*torchrun, *SMALL, "--steps", "2", "--out", str(tmp_path / "two")], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    assert torch.load(tmp_path / "two" / "last.pt", weights_only=True)["step"] == 2
    single = [sys.executable, str(ROOT / "train.py")]
    tables = []
    for i, command in enumerate((single, torchrun)):
        out = subprocess.run([*command, "--eval", str(tmp_path / "two" / "last.pt"), "--out", str(tmp_path / f"e{i}")], capture_output=True, text=True, env=env, cwd=tmp_path)
        assert out.returncode == 0, out.stderr[-2000:]
        tables.append([line for line in out.stdout.splitlines() if "a second" not in line])
    assert len(tables[0]) > 9 and tables[0] == tables[1]
    a, b = (json.loads((tmp_path / f"e{i}" / "metrics.json").read_text()) for i in range(2))
    assert a["AP_mask"] == b["AP_mask"] and a["AP_box"] == b["AP_box"]


def test_kill_9_while_a_checkpoint_is_written_keeps_the_previous_one(tmp_path):
    """A process writes checkpoints for ever and is killed at random moments; what lies there is always whole."""
    code = ("import sys, torch; sys.path.insert(0, sys.argv[1]); import train; from pathlib import Path; k = 0\n"
            "while True:\n    k += 1; train.save_checkpoint(Path('last.pt'), {'step': k, 'w': torch.full((500_000,), float(k))})\n"
            "    print(k, flush=True)")
    for moment in range(2):
        p = subprocess.Popen([sys.executable, "-c", code, str(ROOT)], cwd=tmp_path, stdout=subprocess.PIPE)
        p.stdout.readline()
        time.sleep(0.05 + 0.013 * moment)
        p.send_signal(signal.SIGKILL)
        p.wait()
        state = torch.load(tmp_path / "last.pt", weights_only=True)
        assert (state["w"] == state["step"]).all()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path, capsys, monkeypatch):
    def broken(deltas, gt_boxes, anchors, beta, crop_size=None, truncated=None):
        return deltas.sum(1) * float("nan")
    monkeypatch.setitem(train.BOX_LOSSES, "cabb", broken)
    said = sentence(capsys, *SMALL, "--steps", 4, "--out", tmp_path / "run")
    assert "not finite" in said and "rph_box" in said and "--lr" in said


# --- Recipes and schedules ------------------------------------------------------------------------------------------------

def test_the_cityscapes_recipe_is_the_papers():
    """Section 5: 48k steps, 1e-2, a tenth after 36k and 44k, warm-up from a third in 200 steps; 5.3 for Vistas."""
    a = train.RECIPES["cityscapes"]
    assert (a["steps"], a["lr"], a["warmup"], a["short_side"], a["scale"]) == (48000, 0.01, 200, 1024, [0.5, 2.0])
    factor = [train.rate(k, 48000, a) for k in (0, 100, 200, 35999, 36000, 43999, 44000)]
    assert factor == pytest.approx([1 / 3, 2 / 3, 1, 1, 0.1, 0.1, 0.01])
    v = train.RECIPES["mapillary"]
    assert (v["ratios"], v["anchor_scale"], v["short_side"], v["steps"]) == ([0.2, 0.5, 1, 2, 5], 2, 1920, 192000)
    assert [round(d * v["steps"]) for d in v["drops"]] == [144000, 176000]


def test_without_freezing_norms_and_biases_do_not_decay():
    """Table 1, last row."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    all_decay = train.parameter_groups(model, {"no_freeze": False})
    assert len(all_decay) == 1 and len(all_decay[0]["params"]) == 4
    some, none = train.parameter_groups(model, {"no_freeze": True})
    assert [p.ndim for p in some["params"]] == [4] and len(none["params"]) == 3 and none["weight_decay"] == 0


def test_a_method_with_stages_trains_one_after_the_other(tmp_path, monkeypatch):
    """The protocol's third method: parameters, optimiser and share of the steps of each stage; the rest stands still."""
    class Staged(seamless.Seamless):
        def stages(self):
            sgd = lambda p: torch.optim.SGD(p, 0.01)                                           # noqa: E731
            rest = [p for n, p in self.named_parameters() if not n.startswith("semantic_head")]
            return [("rest", rest, sgd, 0.5), ("semantic", list(self.semantic_head.parameters()), sgd, 0.5)]
    def build(categories, args):
        return Staged([k.isthing for k in categories], train.build_body(args), canonical=56, anchor_scale=4, hidden=16, box_channels=16,
                      mask_channels=16, semantic_channels=8, window=8, samples=(16, 16), after=(20, 20))
    monkeypatch.setitem(train.METHODS, "seamless", build)
    quick = [*SMALL, "--steps", 4, "--eval-count", 1]
    call(*quick, "--out", tmp_path / "half", "--stop-at", 2)
    half = torch.load(tmp_path / "half" / "last.pt", weights_only=True)["model"]
    torch.manual_seed(0)
    start = build(data.StreetScenes(1).categories, train.settings({"body": "tiny", "width": 16})).state_dict()
    call("--resume", tmp_path / "half")
    end = torch.load(tmp_path / "half" / "last.pt", weights_only=True)["model"]
    def moved(a, b, part):
        return any(not torch.equal(a[k], b[k]) for k in a if k.startswith(part) and k.endswith("weight"))
    assert moved(start, half, "body") and not moved(start, half, "semantic_head")
    assert moved(half, end, "semantic_head") and not moved(half, end, "body")


def test_compare_trains_every_method_and_writes_one_table_and_one_figure(tmp_path, capsys):
    """torchvision's Mask R-CNN, the peer, keeps the same protocol as Seamless."""
    call("--compare", *SMALL, "--steps", 2, "--eval-count", 1, "--out", tmp_path)
    table = (tmp_path / "compare.txt").read_text()
    assert table in capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines()}
    assert set(rows) == {"method", *train.METHODS} and all(len(r) == len(rows["method"]) for r in rows.values())
    assert (tmp_path / "compare.png").stat().st_size > 0
    for method in train.METHODS:
        metrics = json.loads((tmp_path / method / "metrics.json").read_text())
        assert float(rows[method][0]) == pytest.approx(metrics["PQ"], abs=0.051)
    assert "--out" in sentence(capsys, "--compare", *SMALL, "--steps", 2, "--eval-count", 1, "--out", tmp_path)   # and is not trained over


def test_every_method_gives_zero_losses_with_gradients_on_pictures_without_things(tmp_path):
    """So that DistributedDataParallel never waits for a gradient."""
    categories = data.StreetScenes(1).categories
    nothing = data.Sample(torch.rand(3, 64, 96), torch.zeros(64, 96, dtype=torch.long), torch.zeros(0).long(), torch.zeros(0).bool(), "")
    for method, build in train.METHODS.items():
        torch.manual_seed(0)
        model = build(categories, train.settings({"method": method, "width": 16, "body": "tiny", "rois": 16, "proposals": 20}))
        images, targets = train.collate([data.crop(nothing, 0, 0, (64, 96))] * 2)
        losses = model.losses(images, targets)
        sum(losses.values()).backward()
        assert losses["mask" if method == "ibs" else "semantic"] == 0 and all(torch.isfinite(v) for v in losses.values())
        head = {"adaptis": lambda: model.semantic, "ibs": lambda: model.encoder}.get(method, lambda: getattr(model, "base", model).semantic_head)()
        assert all(p.grad is not None for p in head.parameters())


# --- The affinity head ----------------------------------------------------------------------------------------------------

AFFINITY = ("--method", "affinity", "--affinity-channels", 16, *SMALL)


def affinity_model(**flags):
    torch.manual_seed(0)
    small = dict(method="affinity", width=16, body="tiny", rois=16, proposals=20, affinity_channels=16, window=8)
    return train.Affinity(data.StreetScenes(1).categories, train.settings({**small, **flags}))


def street_crops(count=2):
    scenes = data.StreetScenes(count, seed=7)
    return train.collate([data.crop(scenes[i], 60, 100, (128, 192), image_id=i) for i in range(count)])


@pytest.mark.parametrize("words", [(), ("--no-masks",), ("--no-affinity",), ("--no-affinity", "--end-to-end", "none"), ("--end-to-end", "head"),
                                   ("--true-boxes",), ("--true-boxes", "--no-masks"), ("--variant", "A"), ("--variant", "C"),
                                   ("--reading", "heuristic"), ("--semantic-loss", "lovasz", "--roi-mask-loss", "lovasz")], ids=" ".join)
def test_every_row_of_the_affinity_papers_tables_trains_and_predicts(words, tmp_path):
    call(*AFFINITY, *words, "--steps", 2, "--eval-count", 1, "--out", tmp_path / "run")
    columns = (tmp_path / "run" / "log.csv").read_text().splitlines()[0].split(",")
    assert ("panoptic" in columns) == ("none" not in words) and ("rsh_mask" in columns) == ("--no-masks" not in words)


def test_the_panoptic_loss_reaches_detector_scores_semantics_and_masks_or_the_head_alone():
    """Li et al. 2020, A.4: "gradients from the panoptic segmentation submodule flow to the object detection submodule"."""
    for end_to_end, everywhere in (("all", True), ("head", False)):
        model = affinity_model(end_to_end=end_to_end, score_threshold=0.0)      # untrained scores are low: let all through
        model.losses(*street_crops())["panoptic"].backward()
        region = model.base.region_head
        parts = {"scores": region.out, "masks": region.mask, "semantics": model.base.semantic_head, "backbone": model.base.body.stages[-1]}
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.head.phi1.parameters())
        for name, part in parts.items():
            moved = sum(p.grad.abs().sum().item() for p in part.parameters() if p.grad is not None) > 0
            assert moved == everywhere, (end_to_end, name)


def test_the_panoptic_loss_trains_on_the_detections_that_inference_would_take():
    """Section 3.5 and B: predicted detections, above the cut-off of inference; true boxes have a score of 1 and stay."""
    counts = {}
    for cut_off, true_boxes in ((0.0, False), (0.21, False), (1.0, False), (1.0, True)):
        model, seen = affinity_model(score_threshold=cut_off, true_boxes=true_boxes), []
        potential = model.potential
        model.potential = lambda found, *rest: (seen.append(found), potential(found, *rest))[1]
        model.losses(*street_crops())["panoptic"].backward()
        assert true_boxes or all((f["scores"] > cut_off).all() for f in seen)
        counts[cut_off, true_boxes] = sum(len(f["scores"]) for f in seen)
    assert counts[0.0, False] > counts[0.21, False] > counts[1.0, False] == 0 < counts[1.0, True]


@pytest.mark.parametrize("size", [(128, 192), (125, 190), (126, 193)])
def test_a_box_as_large_as_the_picture_owns_every_cell_whatever_the_sides(size):
    """Sides that are no multiple of 4: the cells share the side evenly, and so do boxes and masks."""
    model = affinity_model(score_threshold=0.0).eval()
    h, w = (-(-n // 4) for n in size)
    found = {"boxes": torch.tensor([[0., 0., size[1], size[0]], [size[1] / 2, 0, size[1], size[0]]]), "scores": torch.ones(2),
             "categories": torch.where(model.base.isthing)[0][:2], "masks": torch.full((2, 28, 28), 3.)}
    psi, _ = model.potential(found, torch.zeros(len(model.base.isthing), h, w), size)
    assert (psi[0] > 0).all() and (psi[1] > 0).sum(1).eq(w - w // 2 if w % 2 == 0 else (w + 1) // 2).all() and (psi[1][:, -1] > 0).all()


def test_logits_of_variant_a_are_not_scaled_again():
    """Choice: softmax(10 P) is for potentials in [0, 1]; those of variant A are logits."""
    seen = []
    for variant in "ABC":
        model = affinity_model(variant=variant)
        loss = train.affinity_head.panoptic_matching_loss
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train.affinity_head, "panoptic_matching_loss", lambda *a: (seen.append((variant, *a[5:])), loss(*a))[1])
            model.losses(*street_crops())
    assert set(seen) == {("A", 1.0), ("B", 10.0), ("C", 10.0)}


def test_the_affinity_papers_loss_weights_multiply_their_losses():
    """Section 4: detection, semantic segmentation, panoptic segmentation."""
    results = {}
    for weights in ((1.0, 1.0, 1.0), (0.25, 0.5, 2.0)):
        model = affinity_model(loss_weights=list(weights))
        images, targets = street_crops()
        torch.manual_seed(1)
        results[weights] = {k: v.item() for k, v in model.losses(images, targets).items()}
    for name, value in results[1.0, 1.0, 1.0].items():
        factor = {"semantic": 0.5, "panoptic": 2.0}.get(name, 0.25)
        assert results[0.25, 0.5, 2.0][name] == pytest.approx(factor * value, rel=1e-4), name


def test_the_affinity_recipes_are_the_papers():
    """Section 4 and appendix B."""
    def recipe(dataset, *keys):
        args = train.settings({"dataset": dataset, "method": "affinity"})
        return [args[k] for k in keys]
    keys = ("loss_weights", "score_threshold", "variant", "semantic_loss", "roi_mask_loss", "lr", "steps", "batch", "crop", "scale", "excitation")
    assert recipe("cityscapes", *keys) == [[.25, 1, 1], .5, "B", "lovasz", "lovasz", .01, 65000, 32, [512, 1024], [.5, 2], True]
    assert [d * 65 for d in recipe("cityscapes", "drops")[0]] == pytest.approx([40, 55]) and recipe("cityscapes", "warmup", "decay") == [500, 1e-4]
    keys = ("loss_weights", "score_threshold", "variant", "semantic_loss", "roi_mask_loss", "lr", "steps", "short_side", "sampler", "affinity_channels")
    assert recipe("coco", *keys) == [[1, .2, .1], .75, "C", "cross-entropy", "lovasz", .02, 200000, 800, "full", 128]
    assert [d * 200 for d in recipe("coco", "drops")[0]] == pytest.approx([150, 190]) and recipe("coco", "frozen")[0] > 0


@torch.no_grad()
@pytest.mark.parametrize("masks", [True, False])
def test_the_readings_share_their_instances_and_only_the_head_may_leave_a_box(masks):
    model = affinity_model(masks=masks, score_threshold=0.0).eval()
    model.base.region_head.score_threshold = 0.08
    image = data.StreetScenes(1, seed=7)[0].image
    found = model.readings(image, (200, 400))
    assert set(found) == {"heuristic", "filled", "argmax", "affinity"}
    boxes = found["argmax"].instances["boxes"]
    assert len(boxes) > 2 and found["argmax"].instances["masks"].shape[1:] == (200, 400)
    for name, p in found.items():
        assert p.segments.shape == (200, 400) and p.segments.max() <= len(p.categories) == len(p.scores)
        assert p.instances["boxes"] is boxes or torch.equal(p.instances["boxes"], boxes)
    # The rules without their void: the same things, the same stuff, and what was void (a thing that nobody detected) is stuff too.
    rules, filled = (torch.cat([torch.tensor([-1]), found[k].categories])[found[k].segments] for k in ("heuristic", "filled"))
    assert ((rules < 0).any() or not masks) and (filled >= 0).all() and torch.equal(filled[rules >= 0], rules[rules >= 0])
    assert not model.base.isthing[filled[rules < 0]].any()
    # Pixels of a thing lie in a box of its category, but for the width of an interpolated cell (4 pixels of 256 are 3.1 of 200).
    p = found["argmax"]
    for k in torch.where(model.base.isthing[p.categories])[0].tolist():
        y, x = torch.where(p.segments == k + 1)
        b = boxes[p.instances["categories"] == p.categories[k]]
        near = (x + .5 > b[:, :1] - 4) & (x + .5 < b[:, 2:3] + 4) & (y + .5 > b[:, 1:2] - 4) & (y + .5 < b[:, 3:] + 4)
        assert near.any(0).all()
    trimmed = model.trim(p)
    area = model.base.stuff_area * 200 * 400 / (1024 * 2048)
    count = torch.bincount(p.segments.flatten(), minlength=len(p.categories) + 1)[1:]
    assert len(trimmed.categories) == int((model.base.isthing[p.categories] | (count >= area)).sum())


def test_readings_of_a_checkpoint_are_a_table_with_paired_intervals(tmp_path, capsys):
    call(*AFFINITY, "--steps", 2, "--out", tmp_path / "run")
    call("--eval", tmp_path / "run" / "last.pt", "--readings", "--out", tmp_path)
    text = capsys.readouterr().out
    rows = json.loads((tmp_path / "readings.json").read_text())
    assert {f"{name} {how}" for name in ("heuristic", "filled", "argmax", "affinity") for how in ("trimmed", "kept")} < rows.keys()
    assert "affinity - heuristic" in text and "IoU of stuff" in text
    call("--eval", tmp_path / "run" / "last.pt", "--out", tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert rows["affinity trimmed"]["PQ"] == pytest.approx(metrics["PQ"], abs=1e-9)


def test_the_paired_interval_knows_an_equal_from_a_better_reading():
    """Of 40 pictures: a reading against itself differs by exactly 0; one that is wrong on every second picture is surely worse."""
    isthing, sums = torch.tensor([False, True]), {"right": [], "half": []}
    truth = torch.tensor([[1, 1, 2, 2]] * 4)
    for i in range(40):
        for name, wrong in (("right", False), ("half", i % 2 == 0)):
            score = PanopticQuality(isthing)
            score.update(torch.ones_like(truth) if wrong else truth, torch.tensor([0]) if wrong else torch.tensor([0, 1]), truth, torch.tensor([0, 1]))
            sums[name].append(score.sums)
    assert train.paired_interval(sums["right"], sums["right"], isthing, draws=50) == (0, 0, 0)
    difference, low, high = train.paired_interval(sums["right"], sums["half"], isthing, draws=400)
    # Things: recall 1/2 without a false one, PQ 100 * 20 / (20 + 10).  Stuff: IoU of 8/16 is no match, so 20 of 40 right, 20 wrong twice.
    assert difference == pytest.approx(100 - (100 * 20 / 30 + 100 * 20 / 40) / 2) and 0 < low < difference < high
    again = train.paired_interval(sums["right"], sums["half"], isthing, draws=400)
    assert again == (difference, low, high)


def test_affinity_flags_that_contradict_each_other_end_in_a_sentence(capsys, trained, tmp_path):
    assert "--no-affinity" in sentence(capsys, *AFFINITY, "--end-to-end", "none", "--steps", 1, "--out", tmp_path / "a")
    assert "--variant B" in sentence(capsys, *AFFINITY, "--no-masks", "--variant", "A", "--steps", 1, "--out", tmp_path / "b")
    assert "no head" in sentence(capsys, *AFFINITY, "--no-affinity", "--end-to-end", "head", "--steps", 1, "--out", tmp_path / "c")
    assert "another network" in sentence(capsys, "--eval", trained / "last.pt", "--width", 8)
    assert "seamless" in sentence(capsys, "--eval", trained / "last.pt", "--readings")
    assert "--eval" in sentence(capsys, "--readings")


# --- Intra-batch supervision ----------------------------------------------------------------------------------------------

IBS = ("--method", "ibs", "--embedding-channels", 16, "--queries", 24, *SMALL)


@pytest.mark.parametrize("weight, words", [(0, ("--sampler", "isus")), (0, ("--embeddings", "queries")), (1, ()), (1, ("--sampler", "full")),
                                           (1, ("--embeddings", "queries", "--sampler", "uniform"))])
def test_both_families_train_with_and_without_intra_batch_supervision(words, weight, tmp_path):
    call(*IBS, *words, "--ibs-weight", weight, "--steps", 2, "--eval-count", 1, "--out", tmp_path / "run")
    columns = (tmp_path / "run" / "log.csv").read_text().splitlines()[0].split(",")
    assert ("ibs" in columns) == bool(weight) and {"mask"} < set(columns) and ("dice" in columns) == ("queries" in words)
    call("--eval", tmp_path / "run" / "last.pt", "--eval-count", 1, "--out", tmp_path)


def test_a_run_of_pairs_goes_on_as_if_it_had_not_stopped(tmp_path):
    """4.2: the sampler counts pairs, the run counts crops."""
    for flags in (["--steps", 4, "--out", tmp_path / "whole"], ["--steps", 4, "--stop-at", 2, "--out", tmp_path / "parts"]):
        call(*IBS, "--embeddings", "queries", "--eval-count", 1, *flags)
    call("--resume", tmp_path / "parts")
    a, b = (torch.load(tmp_path / p / "last.pt", weights_only=True)["model"] for p in ("whole", "parts"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_crops_of_a_pair_are_neighbours_in_the_batch():
    """4.2: "we then make sure that IBS is applied between the crops that contain different segments of the same class"."""
    args = train.settings({"method": "ibs", "scenes": 8, "batch": 6, "workers": 0, "device": "cpu"})
    sampler = train.build_sampler(train.open_dataset(args, True), args, train.World(args), Path("nowhere"), 0)
    for _, targets in [train.collate(train.draw_crops(iter(sampler), 6)) for _ in range(2)]:
        kinds = [int(t.categories[t.instance - 1]) for t in targets]
        assert len(targets) == 6 and kinds[::2] == kinds[1::2] and all(a.image_id != b.image_id for a, b in zip(targets[::2], targets[1::2]))


def test_the_recipes_of_both_families_are_the_papers():
    """Section 5.2."""
    def recipe(dataset, *keys, **flags):
        args = train.settings({"dataset": dataset, "method": "ibs", **flags})
        return [args[k] for k in keys]
    assert recipe("cityscapes", "steps", "batch", "crop", "scale", "sampler") == [65000, 32, [512, 1024], [.5, 2.], "paired"]
    assert recipe("mapillary", "steps", "batch", "crop", "scale", "short_side") == [150000, 32, [1024, 1024], [.5, 1.], 2048]
    assert recipe("cityscapes", "steps", "batch", "crop", embeddings="queries") == [90000, 16, [512, 1024]]
    assert recipe("mapillary", "steps", "batch", "crop", embeddings="queries") == [300000, 16, [1024, 1024]]
    assert recipe("cityscapes", "poly", "frozen", "lr", "lr_body", embeddings="queries") == [.9, 0, 1e-4, 1e-5]


def test_a_polynomial_decay_takes_the_place_of_the_drops():
    """rate: (what is left of the run) ** poly after the warm-up."""
    args = {"warmup": 10, "poly": .9, "drops": [.1]}
    assert train.rate(0, 100, args) == pytest.approx(1 / 3) and train.rate(50, 100, args) == pytest.approx(.5 ** .9)
    assert train.rate(99, 100, args) == pytest.approx(.01 ** .9) and train.rate(50, 100, {**args, "poly": 0.}) == pytest.approx(.1)


def test_the_backbone_of_queries_learns_at_a_rate_of_its_own():
    args = train.settings({"dataset": "parking", "method": "ibs", "embeddings": "queries", "lr": .5, "lr_body": .25})
    model = train.Unified(train.ibs.Parking.categories, args)
    (_, groups, make, _), = model.stages()
    rate = {id(p): g["lr"] for g in make(groups).param_groups for p in g["params"]}
    assert len(rate) == len(list(model.parameters()))
    assert all(rate[id(p)] == (.25 if name.startswith("body.stages") else .5) for name, p in model.named_parameters())


def test_pairs_can_be_drawn_by_processes_that_are_spawned():
    """PairedCropSampler travels to a process that shares nothing with this one."""
    args = train.settings({"dataset": "parking", "scenes": 6, "workers": 0, "device": "cpu"})
    sampler = train.build_sampler(train.open_dataset(args, True), args, train.World(args), Path("nowhere"), 0)
    again = pickle.loads(pickle.dumps(sampler))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(sampler.pair(3), again.pair(3)))


PARKING = ("--dataset parking --width 16 --crop 48 64 --batch 2 --scenes 6 --eval-count 2 --interval 2 --workers 0 --threads 1 --precision float32 "
           "--warmup 1 --steps 2 --embedding-channels 16 --queries 40 --device cpu").split()


def test_a_run_on_the_parking_lot_counts_who_is_confused(tmp_path, capsys):
    """Figure 5 at T = 5 ... 95 and section 6.4 on overlapping masks, from the segments that were written and the model's own masks."""
    call(*PARKING, "--embeddings", "queries", "--score-threshold", 0.1, "--lr", 1e-5, "--out", tmp_path / "run")
    m = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert list(m["confusion"]) == [str(t) for t in range(5, 96, 5)] and list(m["instances"]) == ["Acc_th", "Prec_th", "confusion", "things a picture", "empty ones"]
    curve = list(m["confusion"].values())
    assert curve == sorted(curve, reverse=True) and 0 <= curve[-1] <= curve[0] <= 100 and curve[0] > 0
    said = capsys.readouterr().out
    assert "confused things, %" in said and "masks before merging: Acc_th" in said
    state, args = train.load_checkpoint(tmp_path / "run" / "last.pt", {})
    scenes = train.open_dataset(args, False)
    model, isthing = train.restore_model(state, args, scenes.categories, "").eval(), [k.isthing for k in scenes.categories]
    counts, pixels, masks_confused, named, empty = 0, 0, 0, 0, 0
    for s in (scenes[0], scenes[1]):
        p = model.predict(s.image)
        sure = p.instances["scores"] > 0.1
        counts = counts + torch.stack(confusion_ratio(p.segments, p.categories, s.segments, s.categories, isthing, [5, 95]))
        masks, kinds = p.instances["masks"][sure], p.instances["categories"][sure]
        pixels = pixels + instance_pixels(masks, p.instances["scores"][sure], kinds, s.segments, s.categories, isthing)
        masks_confused = masks_confused + torch.stack(confusion_ratio(masks, kinds, s.segments, s.categories, isthing, [25]))
        named, empty = named + len(masks) / 2, empty + (~masks.flatten(1).any(1)).sum() / 2
    share = 100 * counts[0] / counts[1].clamp(min=1)
    assert [curve[0], curve[-1]] == pytest.approx(share.tolist(), abs=1e-4) and masks_confused[1] > 0
    got = list(m["instances"].values())
    assert got[3:] == [named, empty] and named > 1
    right, true, predicted = pixels.tolist()
    assert got[:3] == pytest.approx([100 * right / true, 100 * right / max(predicted, 1), 100 * (masks_confused[0, 0] / masks_confused[1, 0]).item()], abs=1e-4)


@pytest.mark.parametrize("flag", ["--outside", "--things-only"])
def test_queries_can_be_asked_for_what_is_outside_or_for_things_only(tmp_path, capsys, flag):
    """Sections 5.2 and 6.4.  Kernels are made where something is, so neither is a question for them."""
    call(*PARKING, "--embeddings", "queries", flag, "--out", tmp_path / "run")
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert state["args"]["outside"] == (flag == "--outside") and state["args"]["things_only"] == (flag == "--things-only")
    assert "--embeddings queries" in sentence(capsys, *PARKING, flag, "--out", tmp_path / "kernels")
    assert "--embeddings queries" in sentence(capsys, *SMALL, "--method", "seamless", flag, "--steps", 1, "--out", tmp_path / "other")


def test_targets_of_a_run_that_asks_for_outside_have_a_row_for_every_segment_of_the_picture(tmp_path, monkeypatch):
    """5.2 undone: as many rows as the picture has segments."""
    seen = []
    def losses(self, images, targets):
        seen.extend((t.image_id, sorted(t.categories.tolist()), len(t.segments.unique())) for t in targets)
        return {"all": sum(p.sum() for p in self.parameters()) * 0}
    monkeypatch.setattr(train.Unified, "losses", losses)
    call(*PARKING, "--embeddings", "queries", "--outside", "--out", tmp_path / "run")
    lot = train.ibs.Parking(6, seed=1)
    assert len(seen) == 4 and all(kinds == sorted(lot[i].categories.tolist()) and shown < len(kinds) for i, kinds, shown in seen)


def fake_run(folder, seed, **metrics):
    folder.mkdir()
    torch.save({"args": {"seed": seed}}, folder / "last.pt")
    m = dict.fromkeys(("PQ", "PQ_th", "PQ_st", "Acc_th", "Prec_th"), 50.) | {"confusion": {"25": 10.}, "AP_mask": {"AP": 1., "AP_large": math.nan}} | metrics
    (folder / "metrics.json").write_text(json.dumps(m))


def test_two_recipes_are_compared_seed_by_seed(tmp_path, capsys):
    """Student's t on paired differences: 1, 2, 3 of three seeds are 2 +- 4.303 * 1 / sqrt(3), by hand."""
    for seed in (0, 1, 2):
        fake_run(tmp_path / f"a{seed}", seed, PQ_th=40. + seed, confusion={"25": 5.})
        fake_run(tmp_path / f"b{2 - seed}", seed, PQ_th=39.)                             # folders in another order than seeds
    table = train.versus(str(tmp_path / "a*"), str(tmp_path / "b*"))
    assert table["PQ_th"] == pytest.approx((41., 39., 2., 4.303 / 3 ** .5)) and table["confused, T = 25"] == pytest.approx((5., 10., -5., 0.))
    assert "mask AP_large" not in table and "mask AP" in table
    said = capsys.readouterr().out
    fake_run(tmp_path / "c0", 0, instances={"Acc_th": 3.}), fake_run(tmp_path / "c1", 1), fake_run(tmp_path / "c2", 2)
    assert not any("merging" in k for k in train.versus(str(tmp_path / "c*"), str(tmp_path / "b*")))         # what only some runs know
    capsys.readouterr()
    assert "+2.0  [-0.5, +4.5]" in said and "3 paired seeds" in said
    call("--versus", tmp_path / "a*", tmp_path / "b*")
    assert capsys.readouterr().out == said


def test_recipes_with_other_seeds_or_unfinished_runs_are_not_compared(tmp_path, capsys):
    fake_run(tmp_path / "a0", 0), fake_run(tmp_path / "b1", 1)
    assert "[0]" in sentence(capsys, "--versus", tmp_path / "a*", tmp_path / "b*") and "seeds" in sentence(capsys, "--versus", tmp_path / "c*", tmp_path / "c*")
    fake_run(tmp_path / "a2", 0)
    assert "two runs of seed 0" in sentence(capsys, "--versus", tmp_path / "a*", tmp_path / "b*")
    (tmp_path / "a2" / "metrics.json").unlink()
    assert "has not ended" in sentence(capsys, "--versus", tmp_path / "a*", tmp_path / "b*")


def test_the_recipes_of_the_parking_lot_give_every_method_the_same_pixels():
    """What is compared is compared at equal cost: six crops of 80x160 a step, 1280 steps; whole pictures, two a step, take 1500."""
    for method in train.METHODS:
        args = train.settings({"dataset": "parking", "method": method})
        assert (args["crop"], args["batch"], args["steps"], args["scale"]) == ([80, 160], 6, 1280, [.8, 1.25])
    assert train.settings({"dataset": "parking"})["method"] == "ibs" and 1280 * 6 * 80 * 160 == 1500 * 2 * 128 * 256


def test_an_odd_number_of_crops_is_not_made_of_pairs(capsys, tmp_path):
    assert "even" in sentence(capsys, *IBS, "--batch", 3, "--steps", 1, "--out", tmp_path / "a")


def test_a_checkpoint_from_before_a_flag_existed_still_opens(trained, tmp_path):
    """Its run's arguments are laid over the recipe of today."""
    state = torch.load(trained / "last.pt", weights_only=True)
    for flag in ("semantic_loss", "roi_mask_loss", "excitation", "score_threshold"):
        del state["args"][flag]
    torch.save(state, tmp_path / "old.pt")
    call("--eval", tmp_path / "old.pt", "--eval-count", 1, "--out", tmp_path)
    assert (tmp_path / "metrics.json").exists()


def test_stages_whose_shares_do_not_round_still_fill_the_run(tmp_path, monkeypatch):
    """Three stages of 1.4, 1.4 and 1.2 steps make 4 steps, and the last one is saved."""
    class Staged(seamless.Seamless):
        def stages(self):
            def sgd(parameters):
                return torch.optim.SGD(parameters, 0.01)
            parts = (self.body, self.region_head, self.semantic_head)
            return [(str(i), list(part.parameters()), sgd, share) for i, (part, share) in enumerate(zip(parts, (0.35, 0.35, 0.3)))]
    def build(categories, args):
        return Staged([k.isthing for k in categories], train.build_body(args), canonical=56, anchor_scale=4, hidden=16, box_channels=16,
                      mask_channels=16, semantic_channels=8, window=8, samples=(16, 16), after=(20, 20))
    monkeypatch.setitem(train.METHODS, "seamless", build)
    call(*SMALL, "--steps", 4, "--eval-count", 1, "--out", tmp_path / "run")
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == 4


CELLS = "--dataset cells --batch 2 --scenes 6 --eval-count 2 --interval 2 --workers 0 --threads 1 --precision float32 --device cpu".split()


def test_cells_resume_bit_for_bit_and_keep_one_curve(tmp_path):
    """6 steps are 3 and a resume of 3; curve.csv has Table 1's columns and each step once; evaluation on the way changes nothing."""
    call(*CELLS, "--steps", 6, "--eval-every", 2, "--out", tmp_path / "whole")
    call(*CELLS, "--steps", 6, "--eval-every", 2, "--stop-at", 3, "--out", tmp_path / "half")
    call("--resume", tmp_path / "half")
    call(*CELLS, "--steps", 6, "--out", tmp_path / "plain")
    whole, half, plain = (torch.load(tmp_path / n / "last.pt", weights_only=True) for n in ("whole", "half", "plain"))
    for name, value in whole["model"].items():
        assert torch.equal(value, half["model"][name]) and torch.equal(value, plain["model"][name]), name
    curves = [list(csv.reader(open(tmp_path / n / "curve.csv"))) for n in ("whole", "half")]
    assert curves[0][0] == ["step", "minutes", "PQ", "AP", "AP50", "AP70", "AP80", "AP90"]
    assert [r[0] for r in curves[0]] == [r[0] for r in curves[1]] == ["step", "2", "4", "6"]
    assert [r[2:] for r in curves[0]] == [r[2:] for r in curves[1]]
    assert half["seconds"] > 0 and not (tmp_path / "plain" / "curve.csv").exists()
    metrics = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    assert float(curves[0][-1][4]) == pytest.approx(metrics["AP_mask"]["AP50"], abs=0.006)


def test_adaptis_trains_its_proposals_last_and_logs_the_losses_of_both_stages(tmp_path):
    """On the pyramid, with the backbone frozen in the second stage; a resume in the middle of it gives the same weights."""
    quick = [*SMALL, "--method", "adaptis", "--point-window", 64, 96, "--steps", 6, "--proposal-share", 0.5, "--eval-count", 1, "--interval", 1]
    call(*quick, "--out", tmp_path / "whole")
    for stop in (3, 4):
        call(*(quick if stop == 3 else ()), *(("--out", tmp_path / "parts") if stop == 3 else ("--resume", tmp_path / "parts")), "--stop-at", stop)
        if stop == 3:
            first = torch.load(tmp_path / "parts" / "last.pt", weights_only=True)["model"]
    call("--resume", tmp_path / "parts")
    whole, parts = (torch.load(tmp_path / n / "last.pt", weights_only=True)["model"] for n in ("whole", "parts"))
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name
        assert torch.equal(value, first[name]) or name.startswith("proposal"), name          # batch norm's statistics stand still, too
    assert any(not torch.equal(v, first[n]) for n, v in whole.items() if n.startswith("proposal"))
    rows = list(csv.DictReader(open(tmp_path / "parts" / "log.csv")))
    assert [bool(r["mask"]) for r in rows] == [bool(r["semantic"]) for r in rows] == [True] * 3 + [False] * 3
    assert [bool(r["proposal"]) for r in rows] == [False] * 3 + [True] * 3 and all(float(r["lr"]) > 0 for r in rows)


def test_the_adaptis_recipes_are_the_papers():
    """Sections 6 and 7: T, R, K, crops, scales, rates, epochs; the window of the head is the crop."""
    city = train.settings({"method": "adaptis", "dataset": "cityscapes"})
    assert (city["threshold"], city["radius"], city["points"], city["crop"], city["point_window"], city["batch"]) == (.4, 280, 6, [400, 800], [400, 800], 8)
    assert (city["lr"], city["lr_body"], city["scale"], city["body"], city["sampler"]) == (1e-4, 5e-5, [.2, 1.2], "resnet50", "uniform")
    first = city["steps"] * (1 - city["proposal_share"])
    assert first == pytest.approx(260 * 2975 / 8, rel=1e-3) and city["drops"] == [240 / 260, 255 / 260] and city["flip_test"]
    coco, mapillary, cells = (train.settings({"method": "adaptis", "dataset": d}) for d in ("coco", "mapillary", "cells"))
    assert (coco["threshold"], coco["points"], coco["crop"], coco["short_side"], coco["batch"]) == (.35, 8, [544, 544], 600, 16)
    assert [600 * s for s in coco["scale"]] == pytest.approx([350, 700]) and mapillary["threshold"] == .35
    assert [2000 * s for s in mapillary["scale"]] == pytest.approx([500, 2200]) and mapillary["batch"] == 8
    assert cells["method"] == train.settings({"dataset": "cells"})["method"] == "adaptis" and cells["per_round"] == 7
    assert cells["steps"] * cells["batch"] == 140 * 10000 and cells["scenes"] == 10000 and cells["short_side"] == 0
    peer = train.settings({"dataset": "cells", "method": "maskrcnn"})
    assert peer["short_side"] == 4 * 96 and peer["drops"] == [35 / 55, 45 / 55] and peer["steps"] * peer["batch"] == 55 * 10000
    assert train.settings({})["method"] == "seamless" and "radius" not in train.settings({})


def test_the_flags_of_adaptis_reach_the_network():
    """The ablation's loss and coordinates, T, R, window, points; and the file's own toy network reads the trainer's weights."""
    def build(**flags):
        return train.build_adaptis(adaptis.OverlappingCells.categories, train.settings({"dataset": "cells", **flags}))
    for flag, loss in (("nfl", adaptis.normalized_focal_loss), ("focal", adaptis.focal_loss), ("bce", adaptis.binary_cross_entropy)):
        assert build(mask_loss=flag).loss is loss
    assert build(coordinates=False).selection.place is None and build().selection.place is not None
    model = build(threshold=.6, radius=20., point_window=[32, 48], points=3, per_round=5, patience=4, min_area=9, flip_test=True)
    assert (model.threshold, model.selection.relative.radius, model.selection.window, model.points) == (.6, 20, [32, 48], 3)
    assert (model.per_round, model.patience, model.min_area, model.flip, model.proposal) == (5, 4, 9, True, None)
    toy = adaptis.toy_model()
    toy.load_state_dict(build().state_dict())
    assert toy.selection.window == (64, 64) and tuple(build().selection.window) == (64, 64) and toy.selection.relative.radius == 48


def test_the_fused_map_is_the_sum_of_the_levels_up_to_stride_32():
    """AdaptIS's one map: stride 4, coarser levels enlarged bilinearly; levels beyond stride 32 are left out."""
    maps = {s: torch.randn(1, 3, -(-64 // s), -(-96 // s)) for s in (4, 8, 16, 32, 64)}
    class Body(torch.nn.Module):
        channels = 3
        def forward(self, images):
            return maps
    fused = train.Fused(Body())
    wanted = maps[4] + sum(torch.nn.functional.interpolate(maps[s], (16, 24), mode="bilinear") for s in (8, 16, 32))
    assert fused.stride == 4 and fused.channels == 3 and torch.allclose(fused(None), wanted, atol=1e-6)


def test_mask_rcnn_sees_cells_enlarged_four_times_and_answers_at_their_size(tmp_path, capsys):
    """Table 1's peer, by the same command; the four columns are printed."""
    call(*CELLS, "--method", "maskrcnn", "--steps", 1, "--out", tmp_path, "--width", 16, "--body", "tiny", "--rois", 16, "--proposals", 20)
    assert "mask AP at an IoU of .5" in capsys.readouterr().out
    assert np.array(Image.open(next((tmp_path / "predictions").glob("*.png")))).shape[:2] == (96, 96)


def test_real_data_sets_train_and_score_at_native_size(cityscapes, tmp_path):
    call("--dataset", "cityscapes", "--root", cityscapes, *SMALL, "--weights", "none", "--short-side", 96, "--steps", 2, "--out", tmp_path / "run")
    png = Image.open(next((tmp_path / "run" / "predictions").glob("*.png")))
    assert png.size == (128, 64)


def test_whole_pictures_of_different_sizes_are_padded_with_void():
    a = (torch.ones(3, 4, 6), data.crop(data.StreetScenes(1, size=(64, 128))[0], 0, 0, (4, 6))[1])
    b = (torch.ones(3, 5, 3), data.crop(data.StreetScenes(1, size=(64, 128))[0], 0, 0, (5, 3))[1])
    images, targets = train.collate([a, b])
    assert images.shape == (2, 3, 5, 6) and images[0, :, 4].sum() == 0 and images[1, :, :, 3:].sum() == 0
    assert all(t.segments.shape == (5, 6) for t in targets) and targets[0].segments[4].sum() == 0 and targets[1].segments[:, 3:].sum() == 0


def test_the_stride_4_ceiling_of_a_half_plane_aligned_with_the_cells_is_perfect_and_of_a_fine_comb_is_not():
    half, comb = torch.ones(32, 32, dtype=torch.long), torch.ones(32, 32, dtype=torch.long)
    half[:, 16:] = 2
    comb[:, ::4] = 2                                                   # one column in four never wins a cell
    for segments, survives in ((half, True), (comb, False)):
        s = data.Sample(torch.zeros(3, 32, 32), segments, torch.tensor([0, 1]), torch.zeros(2, dtype=torch.bool), "")
        assert torch.equal(train.stride4_ceiling(s, (32, 32)), segments) == survives
    assert torch.equal(train.stride4_ceiling(data.Sample(torch.zeros(3, 32, 32), comb, torch.tensor([0, 1]), torch.zeros(2, dtype=torch.bool), ""), (128, 128)), comb)


# --- Wrong input: one sentence, exit code 2 -------------------------------------------------------------------------------

def test_a_missing_root_is_named_and_no_folder_left_behind(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "--root" in sentence(capsys, "--dataset", "cityscapes")
    assert str(tmp_path / "nowhere") in sentence(capsys, "--dataset", "cityscapes", "--root", tmp_path / "nowhere", "--weights", "none")
    assert list(tmp_path.iterdir()) == []


def test_images_without_labels_are_named(capsys, cityscapes, tmp_path):
    for f in (cityscapes / "gtFine").rglob("*.png"):
        f.unlink()
    assert "gtFine" in sentence(capsys, "--dataset", "cityscapes", "--root", cityscapes, *SMALL, "--weights", "none", "--out", tmp_path / "r")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_png_is_named_even_from_a_loading_process(capsys, cityscapes, tmp_path, workers):
    for f in (cityscapes / "leftImg8bit" / "train").rglob("*.png"):
        f.write_bytes(f.read_bytes()[:300])
    said = sentence(capsys, "--dataset", "cityscapes", "--root", cityscapes, *SMALL, "--weights", "none", "--workers", workers, "--out", tmp_path / "r")
    assert "leftImg8bit.png" in said


def test_a_label_of_another_size_is_named(capsys, cityscapes, tmp_path):
    for f in (cityscapes / "gtFine" / "train").rglob("*.png"):
        Image.fromarray(np.full((10, 10), 7, np.uint16)).save(f)
    said = sentence(capsys, "--dataset", "cityscapes", "--root", cityscapes, *SMALL, "--weights", "none", "--out", tmp_path / "r")
    assert "instanceIds.png" in said and "(10, 10)" in said


def test_labels_without_a_single_segment_are_named(capsys, cityscapes, tmp_path):
    for f in (cityscapes / "gtFine" / "train").rglob("*.png"):
        Image.fromarray(np.zeros((64, 128), np.uint16)).save(f)
    said = sentence(capsys, "--dataset", "cityscapes", "--root", cityscapes, *SMALL, "--weights", "none", "--out", tmp_path / "r")
    assert "--sampler isus" in said and "nothing to sample" in said
    assert "r_st" in sentence(capsys, *SMALL, "--scale", 2, 1, "--out", tmp_path / "r")


def test_an_unknown_id_is_named(capsys, cityscapes, tmp_path):
    for f in (cityscapes / "gtFine" / "train").rglob("*.png"):
        Image.fromarray(np.full((64, 128), 77, np.uint16)).save(f)
    assert "77" in sentence(capsys, "--dataset", "cityscapes", "--root", cityscapes, *SMALL, "--weights", "none", "--out", tmp_path / "r")


def test_a_truncated_checkpoint_is_named(capsys, trained, tmp_path):
    (tmp_path / "cut.pt").write_bytes((trained / "last.pt").read_bytes()[:5000])
    assert "cut.pt" in sentence(capsys, "--eval", tmp_path / "cut.pt")
    assert "no such file" in sentence(capsys, "--eval", tmp_path / "nothing.pt")


def test_a_file_of_something_else_is_no_checkpoint(capsys, tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pt")
    assert "no checkpoint" in sentence(capsys, "--eval", tmp_path / "other.pt")


def test_a_checkpoint_of_another_method_is_refused(capsys, trained):
    assert "maskrcnn" in sentence(capsys, "--eval", trained / "last.pt", "--method", "maskrcnn")


def test_a_checkpoint_of_other_categories_is_refused(capsys, trained, cityscapes):
    said = sentence(capsys, "--eval", trained / "last.pt", "--dataset", "cityscapes", "--root", cityscapes)
    assert "9 categories" in said and "19" in said


def test_a_picture_that_is_no_picture_is_named(capsys, trained, tmp_path):
    (tmp_path / "text.png").write_text("hello")
    assert "text.png" in sentence(capsys, "--predict", trained / "last.pt", tmp_path / "text.png", "--out", tmp_path)


def test_an_unknown_body_and_a_thin_body_with_imagenet_weights_are_named(capsys, tmp_path):
    assert "resnet50" in sentence(capsys, *SMALL, "--body", "vgg", "--out", tmp_path / "r")
    assert "no ImageNet weights" in sentence(capsys, *SMALL, "--weights", "imagenet", "--out", tmp_path / "s")


def test_predict_without_pictures_says_so(capsys, trained):
    assert "picture.png" in sentence(capsys, "--predict", trained / "last.pt")


def test_weights_that_cannot_be_had_are_named(capsys, tmp_path, cityscapes, monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    said = sentence(capsys, "--dataset", "cityscapes", "--root", cityscapes, "--out", tmp_path / "r", "--workers", 0)
    assert "--weights FILE" in said and "--weights none" in said
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "w.pt")
    assert "not the weights of resnet50" in sentence(capsys, "--dataset", "cityscapes", "--root", cityscapes, "--out", tmp_path / "r2", "--weights", tmp_path / "w.pt")


def test_a_finished_run_is_not_overwritten(capsys, trained):
    before = (trained / "last.pt").read_bytes()
    assert "--resume" in sentence(capsys, *SMALL, "--steps", 2, "--out", trained)
    assert (trained / "last.pt").read_bytes() == before


def test_a_gpu_that_is_not_there_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "cuda" in sentence(capsys, *SMALL, "--device", "cuda", "--out", tmp_path / "r")
