"""Does ISUS help the coarse levels of a pyramid? Four ways to sample crops, seeds, intervals.

    python -m lab.octaves [--seeds 5] [--arms ARM ...] [--street] [--out DIR] [--threads N]

Question: detectors learn from crops by CUS or by ISUS. Which finds large things better on whole
images, which are rare in training? All arms see as many crops, placed alike: at the category.

    one scale     any place, sigma = 1, as test images have
    CUS, narrow   class-uniform, sigma uniform in 1/2 to 2
    CUS, wide     class-uniform, sigma log-uniform in 1/8 to 8
    ISUS          sigma of things by level within 1/8 to 8; of stuff log-uniform in 1/8 to 8

What refutes the paper's claim: on levels 3 and 4 together (things of 32 pixels or more) box AP with
ISUS is not above that of CUS, wide: over five seeds the 95% interval of the difference holds 0.

The world lets ISUS act: one to three things an image; eight times fewer things on each next level;
images are drawn at four times the size of test images, so enlarging shows detail instead of blur.
--street: the toy street instead, drawn at four times its size, likewise; give it --steps 1600, for
after 300 steps box AP is 0.3.
A run that DIR has already is not repeated: start two programs with arms of their own, then one
with all.
"""
import functools
import hashlib
import json
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import isus
import seamless
from data import Category, Sample, crop, pyramid_level
from lab import demo_ibs, ends, folders, runs
from lab.ap import AveragePrecision
from lab.draw import new_figure, save
from lab.intervals import paired_t
from lab.street import StreetScenes
from lab.worlds import SEEDS, Drawn

SIDE, DETAIL = 128, 4                                          # of test images; drawn times larger
CANONICAL, LEVELS = 32, 4                                      # level 1: sizes of 8 to 16 pixels
COLUMNS = [*(f"AP_{k}" for k in range(1, LEVELS + 1)), "AP_34"]          # of levels; of 3 and 4

SHOWN = ["AP_1", "AP_2", "AP_34"]                              # in the figure


class Setting(NamedTuple):
    """What differs between the two worlds."""
    train: Callable        # number of images -> what crops are taken from
    tests: dict            # name -> function of number of images and seed
    size: tuple            # of test images; the first number is s0
    canonical: int         # of the network and of ISUS
    wide: tuple            # limits of sigma
    window: tuple          # of crops
    batch: int
    model: dict            # keywords of Seamless
    fill: float            # area of a mask as a share of its box, to tell levels by area

    def areas(self):
        """Limits of mask areas for each of COLUMNS, of lab/ap.py; level 3 begins at canonical."""
        ends = [self.fill * (self.canonical * 2.0 ** k) ** 2 for k in (-1, 0, 1)]
        pairs = [*zip([0, *ends], [*ends, 1e10]), (ends[1], 1e10)]
        return {"": (0, 1e10), **{c.removeprefix("AP"): pair for c, pair in zip(COLUMNS, pairs)}}


# --- The world --------------------------------------------------------------------------------

class Octaves:
    """`length` images of 512x512 pixels with ground (stuff) and one to three things: ellipses with
    a core, with four sectors or with two halves, all with fine hatching. Pattern and hatching scale
    with the thing, so the category shows at any size. Flat ellipses of all sizes belong to the
    ground. Image i depends on (seed, i) alone.

    natural: level k, at 128x128 pixels, has 8 times as many things as level k + 1; else equally
    many. Within a level sizes are log-uniform. Things do not overlap and lie inside the image."""
    categories = [Category("ground", False, (128, 128, 128)), Category("core", True, (200, 60, 60)),
                  Category("sectors", True, (60, 160, 60)), Category("halves", True, (60, 60, 200))]

    def __init__(self, length, seed, *, natural=True):
        self.length, self.seed = length, seed
        share = np.array([8.0 ** -k if natural else 1.0 for k in range(LEVELS)])
        self.share = share / share.sum()

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        i = range(self.length)[i]                              # raises IndexError past the end
        random = np.random.default_rng([self.seed, i])
        side = SIDE * DETAIL
        image, segments = self.ground(random, side), np.ones((side, side), np.int64)
        for _ in range(4):                                     # clutter
            box, _ = self.place(random, random.integers(LEVELS), side)
            self.paint(image, box, random, kind=None)
        categories, free = [0], np.ones((side, side), bool)
        for _ in range(random.integers(1, 4)):
            for _ in range(20):                                # until a place is free
                box, window = self.place(random, random.choice(LEVELS, p=self.share), side)
                if free[window].all():
                    kind = random.integers(3)
                    inside = self.paint(image, box, random, kind=kind)
                    categories.append(1 + kind)
                    segments[window][inside] = len(categories)
                    free[window] = False
                    break
        image = torch.from_numpy(image.clip(0, 1).transpose(2, 0, 1).copy())
        return Sample(image, torch.from_numpy(segments), torch.tensor(categories),
                      torch.zeros(len(categories), dtype=torch.bool), f"octaves-{self.seed}-{i}")

    def ground(self, random, side):
        """Noise that looks alike at all scales -> float32 [side, side, 3]."""
        total = np.broadcast_to(random.uniform(0.3, 0.7, 3), (side, side, 3)).astype(np.float32)
        for cells in (2, 4, 8, 16, 32, 64, 128):
            noise = torch.from_numpy(random.normal(0, 0.04, (1, 1, cells, cells)).astype("f"))
            noise = F.interpolate(noise, (side, side), mode="bilinear")
            total = total + noise[0, 0, :, :, None].numpy()
        return total

    def place(self, random, level, side):
        """A random box of a level, whole pixels -> (x1, y1, x2, y2) and its window as slices."""
        size = DETAIL * CANONICAL * 2 ** (level - 2 + random.uniform(0.02, 0.98))
        size = min(size, 0.85 * side)
        stretch = math.exp(random.uniform(-0.15, 0.15))
        w, h = (max(2, round(v)) for v in (size * stretch, size / stretch))
        x, y = (int(random.integers(side - n + 1)) for n in (w, h))
        return (x, y, x + w, y + h), (slice(y, y + h), slice(x, x + w))

    def paint(self, image, box, random, kind):
        """Paints an ellipse into `box`; kind 0 to 2, or None: flat -> its pixels, bool [h, w]."""
        x1, y1, x2, y2 = box
        v, u = np.meshgrid((np.arange(y2 - y1) + 0.5) / (y2 - y1) * 2 - 1,
                           (np.arange(x2 - x1) + 0.5) / (x2 - x1) * 2 - 1, indexing="ij")
        turn = random.uniform(0, 2 * math.pi)
        along, across = (u * math.cos(turn) + v * math.sin(turn),
                         v * math.cos(turn) - u * math.sin(turn))
        colours = random.uniform(0, 1, (2, 3))
        colours[1] = (colours[0] + random.uniform(0.35, 0.65, 3)) % 1           # never alike
        first = {0: u * u + v * v < 0.3, 1: along * across > 0, 2: along > 0,
                 None: np.ones_like(u, bool)}[kind]
        colour = np.where(first[..., None], *colours)
        if kind is not None:
            colour = colour * np.where(np.sin(40 * across) > 0, 1.0, 0.8)[..., None]
        inside = u * u + v * v < 1
        image[y1:y2, x1:x2][inside] = colour[inside]
        return inside


SETTINGS = {
    "octaves": Setting(
        train=lambda n: Octaves(n, SEEDS["train"]),
        tests={"natural": lambda n, seed: Octaves(n, seed),
               "balanced": lambda n, seed: Octaves(n, seed, natural=False)},
        size=(SIDE, SIDE), canonical=CANONICAL, wide=(1 / 8, 8.0), window=(96, 96), batch=8,
        model=dict(anchor_scale=3), fill=math.pi / 4),
    "street": Setting(
        train=lambda n: StreetScenes(n, size=(DETAIL * 256, DETAIL * 512), seed=SEEDS["train"]),
        tests={"natural": lambda n, seed: StreetScenes(n, seed=seed)},
        size=(256, 512), canonical=56, wide=(1 / 8, 8.0), window=(128, 256), batch=4,
        model=dict(anchor_scale=4, ratios=(0.2, 0.5, 1, 2, 5)), fill=0.6)}


# --- The arms ---------------------------------------------------------------------------------

class LogUniform(isus.CropSampler):
    """A CropSampler whose sigma, where level and instance do not decide, is log-uniform."""

    def crop(self, k):
        """Crop number k; its sigma depends on (seed, k) alone, as the rest does."""
        digest = hashlib.sha256(f"sigma {self.seed} {k}".encode()).digest()
        low, high = self.scale_things
        sigma = low * (high / low) ** (int.from_bytes(digest[:4], "big") / 2 ** 32)
        self.scale = (sigma, sigma)
        return super().crop(k)


ARMS = {"one scale": (isus.CropSampler, dict(mode="uniform", scale=(1.0, 1.0))),
        "CUS, narrow": (isus.CropSampler, dict(mode="cus", scale=(0.5, 2.0))),
        "CUS, wide": (LogUniform, dict(mode="cus")), "ISUS": (LogUniform, dict(mode="isus"))}


def sampler(arm, setting, scenes, index, seed=0):
    """The crops of an arm, without end."""
    kind, how = ARMS[arm]
    return kind(scenes, index, size=setting.window, short_side=setting.size[0], seed=seed,
                canonical=setting.canonical, scale_things=setting.wide, batch=setting.batch, **how)


def shown(source, isthing, count=400):
    """How many things of levels 1 to 4, by whole boxes, `count` crops show -> int64 [4]."""
    boxes = []
    for k in range(count):
        _, t = source.crop(k)
        boxes.append(t.full_boxes[isthing[t.categories]])
    level = pyramid_level(torch.cat(boxes), LEVELS, canonical=source.canonical)
    return level.bincount(minlength=LEVELS + 1)[1:]


def reached(setting, index, isthing, draws=10):
    """Of levels drawn for the things of an index: the share that sigma in `wide` reaches."""
    g, hits = torch.Generator().manual_seed(0), []
    for box in index.box[isthing[index.category]] / DETAIL:
        for _ in range(draws):
            level = int(torch.randint(1, LEVELS + 1, (), generator=g))
            sigma = isus.scale_for_level(box, level, setting.wide, generator=g,
                                         canonical=setting.canonical)
            found = pyramid_level(sigma * box[None], LEVELS, canonical=setting.canonical)
            hits.append(int(found) == level)
    return sum(hits) / len(hits)


# --- Training and measuring -------------------------------------------------------------------

def detector(setting, categories):
    """A small Seamless whose levels fit the world, with the standard box loss."""
    body = seamless.resnet_fpn("small", 64)
    return seamless.Seamless([c.isthing for c in categories], body, canonical=setting.canonical,
                             positive=0.5, rois=64, proposals=100, window=16, **setting.model)


@torch.no_grad()
def box_ap(net, dataset, setting):
    """Box AP on whole images at sigma = 1 -> {"AP": all, "AP_1" to "AP_4": of a level, "AP_34"}."""
    meter = AveragePrecision(len(dataset.categories), kind="box", areas=setting.areas())
    isthing, device = net.isthing.cpu(), net.isthing.device
    for i in range(len(dataset)):
        image, t = crop(dataset[i], 0, 0, setting.size, size=setting.size)
        found = net.predict(image.to(device)).instances
        meter.update(*(found[k].cpu() for k in ("boxes", "scores", "categories")), t.segments,
                     t.categories, t.crowd, isthing=isthing)
    return {k: v for k, v in meter.compute().items() if k in ("AP", *COLUMNS)}


@functools.cache
def scenes_of(name, count):
    """The training images of a world, drawn once, and their index."""
    scenes = Drawn(SETTINGS[name].train(count))
    return scenes, isus.build_index(scenes)


def measured(arm, seed, flags, folder):
    """Trains and measures one detector, unless `folder` holds it -> its metrics."""
    label, setting = arm.replace(",", "").replace(" ", "-"), SETTINGS[flags.world]
    path = folder / f"{flags.world}-{label}-{flags.steps}-{flags.split}-{seed}" / "metrics.json"
    if not path.exists():
        scenes, index = scenes_of(flags.world, flags.training)
        torch.manual_seed(seed)
        net = detector(setting, scenes.categories).to(flags.device)
        source = sampler(arm, setting, scenes, index, seed=seed)
        seconds = demo_ibs.learn(net, iter(source), flags.steps, rate=0.002, clip=10.0)
        found = {name: box_ap(net, data(flags.images, SEEDS[flags.split]), setting)
                 for name, data in setting.tests.items()}
        found["shown"] = shown(source, net.isthing.cpu()).tolist()
        hardware = runs.World(flags.device, threads=flags.threads).hardware()
        found["run"] = dict(seed=seed, hardware=hardware, minutes=seconds / 60, steps=flags.steps)
        runs.write_json(folders.make_folder(path.parent) / "metrics.json", found)
    return json.loads(path.read_text())


# --- Tables and figure ------------------------------------------------------------------------

def table(rows, images, best="ISUS"):
    """rows {arm: [metrics of each seed]} -> text: AP on "natural" or "balanced" images, means over
    the seeds, and paired differences `best` - arm with 95% intervals."""
    columns = ("AP", *COLUMNS)
    lines = [f"{images} images".ljust(18) + "".join(f"{c:>24s}" for c in columns)]
    values = {arm: {c: np.array([m[images].get(c) for m in seeds], float) for c in columns}
              for arm, seeds in rows.items()}
    for arm, v in values.items():
        lines.append(f"{arm:18s}" + "".join(f"{v[c].mean():24.1f}" for c in columns))
    for arm in values if best in values else ():
        if arm != best:
            texts = ("{:+.1f} [{:+.1f}, {:+.1f}]".format(*paired_t(values[best][c], values[arm][c]))
                     for c in columns)
            lines.append(f"{best} - {arm}".ljust(18) + "".join(f"{t:>24s}" for t in texts))
    return "\n".join(lines)


def draw(rows, scenes, path):
    """An image of the world, what the crops of each arm show, and AP by level."""
    figure = new_figure(3)
    tests = [k for k in ("natural", "balanced") if k in next(iter(rows.values()))[0]]
    left, middle, *right = figure.subplots(1, 2 + len(tests))
    left.imshow(scenes[1].image.permute(1, 2, 0).numpy())
    left.set_axis_off()
    left.set_title("an image")
    levels, width = np.arange(1, LEVELS + 1), 0.8 / len(rows)
    for k, (arm, seeds) in enumerate(rows.items()):
        at = levels + width * (k + 0.5) - 0.4
        counts = np.mean([m["shown"] for m in seeds], 0)
        middle.bar(at, 100 * counts / counts.sum(), width, color=f"C{k}")
        for ax, images in zip(right, tests):
            values = np.array([[m[images][c] for c in SHOWN] for m in seeds], float)
            at = at[:len(SHOWN)]
            ax.bar(at, values.mean(0), width, color=f"C{k}", alpha=0.6, label=arm)
            for row in values:
                ax.plot(at, row, ".", color="black", ms=3)
            ax.set_title(f"box AP, {images} images")
            ax.set_xticks(levels[:len(SHOWN)], ["1", "2", "3, 4"])
    middle.set(title="things in crops, %", xticks=levels)
    for ax in (middle, *right):
        ax.set_xlabel("level")
    figure.legend(*right[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    save(figure, path)


def main(argv=None):
    """-> {arm: [metrics of each seed]}."""
    parser = ends.Parser(__doc__)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM",
                        help=f"of {', '.join(map(repr, ARMS))}; default: all")
    parser.add_argument("--seeds", type=int, default=5, help="0, 1, ...; default: 5 of them")
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--street", dest="world", action="store_const", const="street",
                        default="octaves", help="the toy street, drawn at four times its size")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--training", type=int, default=400, help="images; default: 400")
    parser.add_argument("--images", type=int, default=300, help="to be measured; default: 300")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", default="runs/octaves")
    flags = parser.parse_args(argv)
    runs.World(flags.device, threads=flags.threads)
    folder, rows, setting = folders.make_folder(flags.out), {}, SETTINGS[flags.world]
    some = setting.train(min(flags.training, 40))
    isthing = torch.tensor([c.isthing for c in some.categories])
    share = reached(setting, isus.build_index(Drawn(some)), isthing)
    print(f"ISUS reaches {share:.0%} of the levels that it draws", flush=True)
    for arm in flags.arms:
        rows[arm] = [measured(arm, seed, flags, folder) for seed in range(flags.seeds)]
        last = list(setting.tests)[-1]
        print(f"{arm}: AP of levels 3 and 4 on {last} images " + ", ".join(
            f"{m[last]['AP_34']:.1f}" for m in rows[arm]), flush=True)
    for images in setting.tests:
        print(f"\n{table(rows, images)}")
    draw(rows, some, folder / f"{flags.world}.png")
    return rows


if __name__ == "__main__":
    with ends.one_sentence("lab.octaves"):
        main()
