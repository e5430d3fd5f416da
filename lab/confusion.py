"""Crops confuse a network, intra-batch supervision cures it: seeds, both networks, with intervals.

    python -m lab.confusion [--family kernels] [--rows ROW ...] [--seeds 5] [--out DIR]
    python -m lab.confusion --rows "crops, IBS" --weights 1 2 4 8 15 --seeds 1 --split val

Networks learn from equally many pixels of parking lots, as in lab/demo_ibs.py, and are measured on
whole images and on parts of them as large as a crop. What refutes the paper: the interval of the
paired difference of "confused", with IBS and without, reaches 0. What would make the disease an
accident of weak networks: on parts as large as a crop, networks of crops have a PQ of more than 3
below that of networks of whole images.

A network that DIR has already is not trained again, so two programs may share the work: give each
`--threads 1`, the same DIR and rows of its own. Then ask for all rows.
"""
import json

import numpy as np
import torch

import isus
from data import DataError, crop
from lab import demo_ibs, ends, folders, runs
from lab.draw import new_figure, save
from lab.errors import Errors
from lab.intervals import paired_t
from lab.worlds import world

# Name: mode of the sampler, whether there is IBS, options of demo_ibs.train.
ROWS = {"whole images": ("full", False, {}),
        "crops": ("uniform", False, {}), "crops, IBS": ("uniform", True, {}),
        "pairs": ("paired", False, {}), "pairs, IBS": ("paired", True, {}),
        "pairs of stuff too, IBS": ("paired", True, dict(stuff=True)),
        "pairs by box, IBS": ("paired", True, dict(measure="box")),
        "whole images, no coordinates": ("full", False, dict(model=dict(coordinates=False))),
        "crops, no coordinates": ("uniform", False, dict(model=dict(coordinates=False)))}
USUAL = list(ROWS)[:5]
CROP, WHOLE = demo_ibs.CROP, (128, 256)
QUALITY = ("PQ", "PQ_th", "PQ_st", "Acc_th", "Prec_th")
COLUMNS = (*QUALITY, "confused", "before merging", "PQ, crop-sized", "confused, crop-sized")


def measured(name, weight, seed, flags, folder):
    """Trains and measures one network, unless `folder` holds it -> its metrics."""
    mode, supervised, options = ROWS[name]
    weight = weight if supervised else 0.0
    label = name.replace(",", "").replace(" ", "-")
    label = f"{flags.family}-{label}-{weight:g}-{flags.steps}-{flags.split}-{seed}"
    path = folder / label / "metrics.json"
    if not path.exists():
        scenes = world("parking", "train", flags.training)
        net, seconds = demo_ibs.train(
            scenes, isus.build_index(scenes), mode, weight, steps=flags.steps, seed=seed,
            device=flags.device, family=flags.family, **options)
        unseen = world("parking", flags.split, flags.images)
        found = {"curve": {}}
        for size, at in demo_ibs.WINDOWS.items():
            parts = [crop(unseen[i], *at, size) for i in range(len(unseen))]
            quality, confused, before, _ = demo_ibs.measure(net, parts)
            found["curve"]["{}x{}".format(*size)] = confused.tolist()
            if size == CROP:
                found |= {"PQ, crop-sized": quality["PQ"],
                          "confused, crop-sized": confused[demo_ibs.AT_25].item()}
            if size == WHOLE:
                found |= {k: quality[k] for k in QUALITY}
                found |= {"confused": confused[demo_ibs.AT_25].item(), "before merging": before,
                          "errors": errors_of(net, parts)}
        hardware = runs.World(flags.device, threads=flags.threads).hardware()
        found["run"] = dict(seed=seed, hardware=hardware, minutes=seconds / 60, steps=flags.steps)
        runs.write_json(folders.make_folder(path.parent) / "metrics.json", found)
    return json.loads(path.read_text())


def errors_of(net, images):
    """What lab/errors.py says of a network on pairs (image, Target)."""
    errors = Errors(net.isthing.cpu())
    for image, t in images:
        found = net.predict(image.to(net.isthing.device))
        errors.update(found.segments.cpu(), found.categories.cpu(), t.segments,
                      gt_categories=t.categories, gt_crowd=t.crowd)
    return errors.compute()


def numbers(seeds, column):
    """One column of metrics [of each seed], float [seeds]; NaN where nothing could be measured."""
    return np.array([m[column] for m in seeds], dtype=float)


def table(rows, pairs):
    """rows {name: [metrics of each seed]} -> text: means over the seeds, then paired differences
    with 95% intervals for `pairs` [(row, row), ...]."""
    lines = [" " * 30 + "".join(f"{c:>12s}" for c in QUALITY) + "".join(
        f"{c:>22s}" for c in COLUMNS[len(QUALITY):])]
    for name, seeds in rows.items():
        lines.append(f"{name:30s}" + "".join(
            f"{numbers(seeds, c).mean():{12 if c in QUALITY else 22}.1f}" for c in COLUMNS))
    for first, second in pairs:
        changes = (paired_t(*(numbers(rows[row], c) for row in (first, second))) for c in COLUMNS)
        lines.append(f"\n{first} - {second}: " + ", ".join(
            "{} {:+.1f} [{:+.1f}, {:+.1f}]".format(c, *change)
            for c, change in zip(COLUMNS, changes)))
    return "\n".join(lines)


def draw(rows, family, path):
    """Figure 5, and confusion on larger and larger parts of the images; a thin line for a seed."""
    figure = new_figure(3)
    left, right = figure.subplots(1, 2)
    sizes = list(next(iter(rows.values()))[0]["curve"])
    for k, (name, seeds) in enumerate(rows.items()):
        curves = np.array([list(m["curve"].values()) for m in seeds])     # [seeds, sizes, T]
        sides = ((left, demo_ibs.THRESHOLDS, curves[:, -1]),
                 (right, sizes, curves[:, :, demo_ibs.AT_25]))
        for ax, x, y in sides:
            ax.plot(x, y.mean(0), color=f"C{k}", lw=2, label=name)
            for line in y:
                ax.plot(x, line, color=f"C{k}", lw=0.5, alpha=0.5)
    left.set(xlabel="T, % of a true thing covered", ylabel="confused, %", ylim=(0, None),
             title=f"{family}: predictions that cover T of two things")
    right.set(xlabel="size of the image; crops: 80x160", ylabel="confused at T = 25%, %",
              ylim=(0, None), title=f"{family}: on larger and larger images")
    left.legend()
    save(figure, path)


def main(argv=None):
    """-> {row: [metrics of each seed]}."""
    parser = ends.Parser(__doc__)
    parser.add_argument("--family", choices=list(demo_ibs.FAMILIES), default="kernels")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=USUAL, metavar="ROW",
                        help=f"of {', '.join(map(repr, ROWS))}; default: the first five")
    parser.add_argument("--weights", nargs="+", type=float, metavar="W",
                        help="of IBS: a row each; default: the recipe's")
    parser.add_argument("--seeds", type=int, default=5, help="0, 1, ...; default: 5 of them")
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--steps", type=int, default=640)
    parser.add_argument("--images", type=int, default=60, help="to be measured; default: 60")
    parser.add_argument("--training", type=int, default=400, help="images; default: 400")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", default="runs/confusion")
    flags = parser.parse_args(argv)
    if flags.family != "kernels" and any("model" in ROWS[name][2] for name in flags.rows):
        raise DataError(f"--family {flags.family} has no coordinates: leave these rows to kernels")
    runs.World(flags.device, threads=flags.threads)
    folder, rows, pairs = folders.make_folder(flags.out), {}, []
    recipe = demo_ibs.RECIPES[demo_ibs.FAMILIES[flags.family][1], "parking"]["model"]["ibs_weight"]
    for name in flags.rows:
        supervised = ROWS[name][1]
        for weight in (flags.weights or [recipe]) if supervised else [0.0]:
            label = f"{name} of weight {weight:g}" if supervised and flags.weights else name
            rows[label] = [measured(name, weight, seed, flags, folder)
                           for seed in range(flags.seeds)]
            print(f"{label}: confused " + ", ".join(f"{m['confused']:.1f}%" for m in rows[label]),
                  flush=True)
            without = "pairs" if ROWS[name][0] == "paired" else "crops"
            pairs += [(label, without)] if supervised and without in rows else []
    print(f"\n{flags.family}, {flags.steps} steps, {flags.images} images of {flags.split}\n"
          + table(rows, pairs))
    draw(rows, flags.family, folder / f"confusion_{flags.family}.png")
    return rows


if __name__ == "__main__":
    with ends.one_sentence("lab.confusion"):
        main()
