"""Evaluation on full images: every metric of the papers, sharded over the processes of a run."""
import csv
import io
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset

from data import Prediction
from lab import draw, folders, readers, runs
from lab.ap import AveragePrecision
from pq import PanopticQuality, confusion_ratio

THRESHOLDS = tuple(range(5, 96, 5))  # T of Figure 5 of de Geus and Dubbelman, in percent


def input_size(size, short_side):
    """(height, width) scaled so that the shorter measures `short_side` pixels; 0: unchanged."""
    factor = short_side / min(size) if short_side else 1
    return tuple(max(1, round(n * factor)) for n in size)


def predict(model, image, short_side, world):
    """Resizes the image [3, H, W], predicts at its own size -> Prediction on the CPU."""
    native = tuple(image.shape[1:])
    size = input_size(native, short_side)
    if size != native:
        image = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0].clamp(0, 1)
    with world.autocast(), torch.no_grad():
        found = model.predict(image.to(world.device), native)
    instances = {k: v.cpu() for k, v in found.instances.items()}
    return Prediction(*(v.cpu() for v in found[:3]), instances)


class Confusion:
    """How many predicted things are confused with another at each threshold T (pq.py)."""

    def __init__(self, isthing):
        self.isthing, self.counts = isthing, torch.zeros(2, len(THRESHOLDS), dtype=torch.int64)

    def update(self, sample, prediction):
        pair = confusion_ratio(prediction.segments, prediction.categories, sample.segments,
                               sample.categories, isthing=self.isthing, thresholds=THRESHOLDS,
                               gt_crowd=sample.crowd)
        self.counts += torch.stack(pair)

    def all_reduce(self):
        if dist.is_initialized():
            counts = self.counts.cuda() if dist.get_backend() == "nccl" else self.counts
            dist.all_reduce(counts)
            self.counts = counts.cpu()

    def compute(self):
        share = 100 * self.counts[0] / self.counts[1].clamp(min=1)
        return {str(t): v for t, v in zip(THRESHOLDS, share.tolist())}


@torch.no_grad()
def evaluate(model, dataset, world, folder, *, short_side=0, images=0, workers=0, quiet=False,
             about=None):
    """Predicts the first `images` images (0: all) of a data set at their native size -> metrics,
    the same on any number of processes. Writes metrics.json, predictions.png and the predictions in
    COCO panoptic format into `folder`. `about` (seed, command, ...) is kept among the metrics."""
    model.eval()
    world.align(model)
    isthing = torch.tensor([c.isthing for c in dataset.categories])
    quality = PanopticQuality(isthing)
    precision = {kind: AveragePrecision(len(isthing), kind=kind) for kind in ("mask", "box")}
    confusion = Confusion(isthing)
    report = model.report() if hasattr(model, "report") else None
    count = min(images or len(dataset), len(dataset))
    mine = range(world.rank, count, world.size)
    loader = DataLoader(Subset(dataset, mine), batch_size=None, num_workers=workers,
                        generator=torch.Generator())
    annotations, shown, seconds = [], [], 0.0
    official = getattr(dataset, "category_ids", None)          # numbers that a server wants back
    image_ids = getattr(dataset, "image_ids", {})
    (folder / "predictions").mkdir(parents=True, exist_ok=True)
    for sample in loader:
        started = time.time()
        found = predict(model, sample.image, short_side, world)
        seconds += time.time() - started
        truth = (sample.segments, sample.categories, sample.crowd)
        quality.update(found.segments, found.categories, *truth)
        for kind, key in (("mask", "masks"), ("box", "boxes")):
            instances = [found.instances[k] for k in (key, "scores", "categories")]
            precision[kind].update(*instances, *truth, isthing=isthing)
        confusion.update(sample, found)
        if report is not None:
            report.update(sample, found)
        annotations.append(readers.write_annotation(
            folder / "predictions", sample.name, found.segments, found.categories,
            category_ids=official, image_id=image_ids.get(sample.name)))
        if world.rank == 0 and len(shown) < 4:
            shown.append((sample, found))
    for metric in (quality, *precision.values(), confusion, *([report] if report else [])):
        metric.all_reduce()
    annotations = [a for part in world.gather(annotations) for a in part]
    result = {**quality.compute(), "confusion": confusion.compute(), "images": count,
              "AP_mask": precision["mask"].compute(), "AP_box": precision["box"].compute(),
              "images_per_second": len(mine) * world.size / max(seconds, 1e-9)}
    if report is not None:
        result["instances"] = report.compute()
    if about is not None:
        result["run"] = about
    if world.rank == 0:
        readers.write_panoptic_json(folder / "predictions", annotations, dataset.categories,
                                    official)
        draw.show_predictions(folder / "predictions.png", shown, dataset.categories)
        runs.write_json(folder / "metrics.json", result)
        if result["PQ"] != result["PQ"]:                       # NaN: a test set without labels
            print(f"no label has a segment, so there is nothing to score: {folder} holds the "
                  "predictions alone")
        elif not quiet:
            print(quality.table([c.name for c in dataset.categories]))
            print(summary(result))
    world.gather(None)                                         # wait for rank 0's files
    return result


def summary(result):
    """A few lines of text: AP, speed, confusion, and what the method itself reports."""
    mask, box = result["AP_mask"], result["AP_box"]
    sizes = ", ".join(f"{k} {mask['AP_' + k]:.1f}" for k in ("small", "medium", "large"))
    each = {round(100 * t): v for t, v in mask["per_threshold"].items()}
    lines = [f"mask AP {mask['AP']:.1f} ({sizes})   box AP {box['AP']:.1f}   "
             f"on {result['images']} images, {result['images_per_second']:.2f} a second",
             "mask AP at an IoU of " + ", ".join(f".{t // 10} {each[t]:.1f}"
                                                  for t in (50, 70, 80, 90) if t in each),
             f"confused things at T = 25%: {result['confusion']['25']:.1f}%"]
    for name, value in result.get("instances", {}).items():
        lines.append(f"instances before merging, {name}: {value:.1f}")
    return "\n".join(lines)


def add_to_curve(path, step, seconds, result):
    """A line of curve.csv: how good after so many steps and minutes of training; prints it. Lines
    of a resumed run beyond `step` are dropped."""
    mask = result["AP_mask"]
    each = {f"AP{round(100 * t)}": v for t, v in mask["per_threshold"].items()}
    row = {"step": step, "minutes": f"{seconds / 60:.2f}", "PQ": f"{result['PQ']:.2f}",
           "AP": f"{mask['AP']:.2f}", **{k: f"{v:.2f}" for k, v in each.items()}}
    print(f"step {step:6d}: PQ {result['PQ']:.1f}, mask AP {mask['AP']:.1f} on val", flush=True)
    rows = []
    if path.exists():
        with open(path) as f:
            rows = [r for r in csv.DictReader(f) if int(r["step"]) < step]
    text = io.StringIO(newline="")
    out = csv.DictWriter(text, list(row))
    out.writeheader()
    out.writerows([*rows, row])
    folders.write_file(path, text.getvalue().encode())
