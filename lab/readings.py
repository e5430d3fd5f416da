"""Readings of the same outputs of an affinity checkpoint, and how sure their differences are.

    python -m lab.readings RUN/last.pt [--out DIR] [--images N] [flags of train.py, as --root]

    heuristic    Seamless's rules (seamless.fuse)
    filled       the rules without void: where the likeliest category is a thing that was not
                 detected, the likeliest stuff. An argmax has no void either.
    argmax       argmax of the potential Psi, without the head
    affinity     argmax of P, if the checkpoint has a head
    argmax, void; affinity, void: with the rules' way to void: a pixel is void where stuff wins and
                 the likeliest category is a thing
    argmax, fine argmax of the potential at the size of the image, not at stride 4
    argmax, fine, half free
                 without things that win less than half of their masks: the rules drop those, too

All share boxes, masks and semantic logits. Each is measured as it is and with small stuff trimmed
to void (appendix C). Intervals are bootstrap intervals over images, of trimmed readings. Writes
readings.json.
"""
from pathlib import Path

import torch
import torch.nn.functional as F

from affinity_head import dynamic_potential, segment
from data import DataError, Prediction, new_numbers
from lab import ends, runs
from lab.ap import AveragePrecision
from lab.evaluate import input_size
from lab.intervals import bootstrap
from pq import PanopticQuality
from seamless import fuse, resize_logits


def readings(model, image, size):
    """image [3, H, W] -> {name: Prediction at `size`}, small stuff kept."""
    base, head, area = model.base, model.head, model.base.stuff_area
    base.stuff_area = 0
    try:
        revised = model.predict(image, size)
        model.head = None
        plain = model.predict(image, size)
    finally:
        base.stuff_area, model.head = area, head
    logits = base.semantic_head(base.body(image[None])).float()
    logits = resize_logits(logits, size)[0]
    stuff = logits.masked_fill(base.isthing[:, None, None], -torch.inf)
    found, result = plain.instances, {}
    for name, chosen in (("heuristic", logits), ("filled", stuff)):
        fused = fuse(found["masks"], found["scores"], found["categories"],
                     semantic=chosen.argmax(0), isthing=base.isthing,
                     score_threshold=base.score_threshold, stuff_area=0)
        result[name] = Prediction(*fused, found)
    for name, kept in (("argmax", plain), ("affinity", revised)):
        if name == "argmax" or head is not None:
            result[name] = kept
            result[f"{name}, void"] = with_void(kept, logits.argmax(0), base.isthing)
    result["argmax, fine"], result["argmax, fine, half free"] = fine(
        model, image, size, logits=logits, found=found)
    return result


def with_void(prediction, semantic, isthing):
    """The prediction with void where stuff won and `semantic`, int64 [H, W], is a thing: the rules
    leave void there, too."""
    segments, categories, scores, instances = prediction
    stuff = torch.cat([isthing.new_zeros(1), ~isthing[categories]])[segments]
    segments = segments.masked_fill(stuff & isthing[semantic], 0)
    keep = torch.bincount(segments.flatten(), minlength=len(categories) + 1)[1:] > 0
    return Prediction(new_numbers(keep)[segments], categories[keep], scores[keep], instances)


def fine(model, image, size, logits, found):
    """Argmax of the potential at `size`; then without things that win less than half of their masks
    -> two Predictions. logits [N, H, W]; found: `instances` of any reading."""
    base, old = model.base, tuple(image.shape[1:])
    sure = base.detect(base.body(image[None]), old)[0]
    keep = sure["scores"] >= base.score_threshold
    sure = {k: v[keep] for k, v in sure.items()}
    psi, channels = dynamic_potential(sure, logits, base.isthing, image_size=old,
                                      variant=model.variant)
    won = torch.bincount(psi.argmax(0).flatten(), minlength=len(psi))[:len(sure["scores"])]
    hidden = torch.where(2 * won < found["masks"][keep].flatten(1).sum(1))[0]
    return [Prediction(*segment(p, channels, sure["scores"], size=size), found)
            for p in (psi, psi.index_fill(0, hidden, psi.min().item() - 1))]


def trim(prediction, isthing, area):
    """The prediction with stuff of fewer than `area` pixels as void."""
    segments, categories, scores, instances = prediction
    count = torch.bincount(segments.flatten(), minlength=len(categories) + 1)[1:]
    keep = isthing[categories] | (count >= area)
    return Prediction(new_numbers(keep)[segments], categories[keep], scores[keep], instances)


def plain_pq(rows, group):
    """PQ in percent over the categories `group`, bool [C]. rows [n, 4, C]: of n images the IoUs of
    true positives, true positives, false positives, false negatives."""
    iou, tp, fp, fn = rows.sum(0)
    return (100 * iou / (tp + fp / 2 + fn / 2))[group].nanmean()


def difference(first, second, isthing):
    """PQ and PQ_th of one reading minus another -> {key: [difference, low, high]}, 95% intervals.
    first, second [n, 4, C]: rows of the same images, see `plain_pq`."""
    groups = {"PQ": isthing | ~isthing, "PQ_th": isthing}

    def both(pairs):
        return torch.stack([plain_pq(pairs[:, 0], group) - plain_pq(pairs[:, 1], group)
                            for group in groups.values()])
    pairs = torch.stack([first, second], 1)
    values = zip(both(pairs.double()).tolist(), *(v.tolist() for v in bootstrap(pairs, both)))
    return dict(zip(groups, map(list, values)))


@torch.no_grad()
def compare(model, dataset, world, short_side=0, images=0):
    """Reads the first `images` images (0: all) -> a dictionary: of each reading, trimmed or kept,
    its measures in percent; of each difference its interval; AP of boxes and masks."""
    model.eval()
    isthing, area = model.base.isthing.cpu(), model.base.stuff_area / (1024 * 2048)
    sums, metrics = {}, {}
    precision = {kind: AveragePrecision(len(isthing), kind=kind) for kind in ("box", "mask")}
    for i in range(min(images or len(dataset), len(dataset))):
        sample = dataset[i]
        image, native = sample.image, tuple(sample.image.shape[1:])
        own = input_size(native, short_side)
        if own != native:
            image = F.interpolate(image[None], own, mode="bilinear", antialias=True)[0].clamp(0, 1)
        with world.autocast():
            found = readings(model, image.to(world.device), native)
        truth = (sample.segments, sample.categories, sample.crowd)
        for name, kept in found.items():
            kept = Prediction(*(v.cpu() for v in kept[:3]), kept.instances)
            trimmed = trim(kept, isthing, area * native[0] * native[1])
            for key, p in (((name, False), kept), ((name, True), trimmed)):
                one = PanopticQuality(isthing)
                one.update(p.segments, p.categories, *truth)
                sums.setdefault(key, []).append(
                    torch.stack([one.sums[k] for k in ("iou", "tp", "fp", "fn")]))
                metrics.setdefault(key, PanopticQuality(isthing)).update(
                    p.segments, p.categories, *truth)
        for kind, key in (("box", "boxes"), ("mask", "masks")):
            instances = [kept.instances[k].cpu() for k in (key, "scores", "categories")]
            precision[kind].update(*instances, *truth, isthing=isthing)
    table = {f"AP_{kind}": metric.compute()["AP"] for kind, metric in precision.items()}
    for (name, trimmed), metric in metrics.items():
        result = metric.compute()
        iou = torch.tensor([c["iou"] for c in result["per_category"] if not c["isthing"]])
        table[f"{name} {'trimmed' if trimmed else 'kept'}"] = {
            **{k: result[k] for k in ("PQ", "PQ_th", "PQ_st")},
            "IoU_st": iou.nanmean().item()}
    rows = {key: torch.stack(part) for key, part in sums.items()}
    last = "affinity" if ("affinity", True) in rows else "argmax"
    for name in ("heuristic", "filled", "argmax", "argmax, fine, half free"):
        if name != last:
            found = difference(rows[last, True], rows[name, True], isthing)
            table |= {f"{last} - {name}, {key}": value for key, value in found.items()}
    return table


def text(table, count):
    """The table of `compare` for the screen."""
    lines = [f"{count} images".ljust(28) + "     PQ   things    stuff   IoU of stuff"]
    for name, value in table.items():
        if isinstance(value, dict):
            lines.append(f"{name:28s}" + "".join(f"{v:7.1f}  " for v in value.values()))
        elif isinstance(value, list):
            lines.append(f"{name:28s}{value[0]:+7.2f}  [{value[1]:+.2f}, {value[2]:+.2f}]")
        else:
            lines.append(f"{name:28s}{value:7.1f}")
    return "\n".join(lines)


def run(argv=None):
    """The command line -> the table."""
    import train
    parser = ends.Parser(__doc__)
    parser.add_argument("checkpoint", type=Path, help="RUN/last.pt of --method affinity")
    parser.add_argument("--out", type=Path, help="folder of readings.json; default: the run's")
    parser.add_argument("--images", type=int, default=0, help="the first N images; 0: all")
    own, rest = parser.parse_known_args(argv)
    flags = train.parse(rest)
    own.checkpoint = runs.checkpoint_path(own.checkpoint)
    state = runs.load_checkpoint(own.checkpoint)
    args, _ = train.arguments(flags, state, own.checkpoint, job="--eval")
    if args["method"] != "affinity":
        raise DataError(f"{own.checkpoint} is of --method {args['method']}: lab.readings compares "
                        "the readings of --method affinity")
    args["eval_images"] = own.images or args["eval_images"]
    world = runs.World(flags.device, flags.precision, flags.threads)
    dataset = train.open_dataset(args, "test")
    model = train.build_model(args, dataset.categories, world, state=state, path=own.checkpoint)
    table = compare(model, dataset, world, short_side=args["crops"]["short_side"],
                    images=own.images)
    print(text(table, min(own.images or len(dataset), len(dataset))))
    folder = own.out or own.checkpoint.parent
    folder.mkdir(parents=True, exist_ok=True)
    runs.write_json(folder / "readings.json", table)
    return table


def main(argv=None):
    with ends.one_sentence("lab.readings"):
        run(argv)


if __name__ == "__main__":
    main()
