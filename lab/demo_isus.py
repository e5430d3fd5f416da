"""The demo of isus.py: what three samplers do to the levels and categories of toy streets.

Streets have 256x512 pixels, a quarter of real ones, so the canonical size is 56 instead of 224.
Every sampler draws scales from the same range: 0.5 to 2, then 0.25 to 4.
"""
from pathlib import Path

import torch
import torch.nn.functional as F

from data import pyramid_level
from isus import CropSampler, build_index
from lab.draw import new_figure, save
from lab.worlds import Drawn, world

RANGES, MODES = ((0.5, 2.0), (0.25, 4.0)), ("uniform", "cus", "isus")
PLACED = "instance"     # mode "isus", but the crop shows the instance that decided on the scale
CANONICAL, WINDOW = 56, (128, 256)
COLOURS = {"uniform": "tab:gray", "cus": "tab:orange", "isus": "tab:green"}


def entropy(counts):
    """- sum p log2 p of a histogram -> bits: log2 of the number of bins if all are equal."""
    p = counts[counts > 0] / counts.sum()
    return -(p * p.log2()).sum().item() + 0.0


def spread(levels):
    """The entropy of levels [crops, 4] and its standard error, from ten parts of the crops."""
    parts = torch.tensor([entropy(part.sum(0)) for part in levels.chunk(10)])
    return entropy(levels.sum(0)), parts.std().item() / len(parts) ** 0.5


def size(boxes):
    """sqrt(w h) of boxes [N, 4] -> [N], in pixels."""
    return (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()


class Crops:
    """Crops of one sampler, and the things in them."""

    def __init__(self, streets, index, mode, limits, count):
        mode, place = ("isus", "instance") if mode == PLACED else (mode, "category")
        sampler = CropSampler(streets, index, size=WINDOW, mode=mode, scale=limits, place=place,
                              scale_things=limits, canonical=CANONICAL)
        self.crops = [sampler.crop(k) for k in range(count)]
        self.targets, self.limits = [t for _, t in self.crops], limits
        self.isthing = torch.tensor([c.isthing for c in streets.categories])
        self.things = [self.isthing[t.categories] & ~t.crowd for t in self.targets]

    def boxes(self, name):
        """`boxes` or `full_boxes` of all things in the crops -> [N, 4]."""
        return torch.cat([getattr(t, name)[m] for t, m in zip(self.targets, self.things)])

    def levels(self):
        """How many things of each level the crops show, by visible boxes -> [crops, 4]."""
        level = [pyramid_level(t.boxes[m], canonical=CANONICAL)
                 for t, m in zip(self.targets, self.things)]
        return torch.stack([torch.bincount(k, minlength=5)[1:] for k in level])

    def shares(self):
        """The share of crops that show each category of things -> [C]."""
        shown = torch.stack([torch.bincount(t.categories, minlength=len(self.isthing)) > 0
                             for t in self.targets])
        return shown[:, self.isthing].float().mean(0)

    def chosen(self):
        """Crops placed at a thing -> rows (image, target, level of that whole thing)."""
        rows = []
        for (image, t), m in zip(self.crops, self.things):
            if t.instance and m[t.instance - 1]:
                box = t.full_boxes[t.instance - 1:t.instance]
                rows.append((image, t, int(pyramid_level(box, canonical=CANONICAL))))
        return rows

    def at_a_limit(self):
        """Of the crops placed at a thing: the share whose scale is one of the two limits."""
        scales = [t.scale for _, t, _ in self.chosen()]
        return sum(s in self.limits for s in scales) / max(len(scales), 1)


def cut_by_size(crops):
    """Figure 2, left: the mean IoU of visible and whole boxes, by percentiles of whole size
    0-25-75-90-99-100 -> list of 5.

    Choice: the paper does not name the axis; such uneven bins are probably percentiles of size."""
    visible, whole = size(crops.boxes("boxes")) ** 2, size(crops.boxes("full_boxes")) ** 2
    order = whole.argsort()
    ends = [round(q * len(whole)) for q in (0, 0.25, 0.75, 0.9, 0.99, 1)]
    return [(visible / whole)[order[a:b]].mean().item() for a, b in zip(ends, ends[1:])]


def percent(shares, digits=1):
    """Shares as percents in columns."""
    return " ".join(f"{100 * v:5.{digits}f}" for v in shares.tolist())


def print_levels(arms):
    """Levels of all things in the crops and of the chosen ones; `arms`: (limits, mode) -> Crops."""
    print('\n"more uniform supervision across all scales": the share of all things in the crops on '
          "level 1 to 4, in %,\nits entropy (2 bits: equal shares); then the levels of the things "
          "at which crops were placed,\nand the share of these crops whose sigma is a limit. "
          f"'{PLACED}': ISUS that crops at the instance of its scale")
    for (limits, mode), crops in arms.items():
        levels = crops.levels()
        bits, error = spread(levels)
        line = (f"  scales {limits[0]:g} to {limits[1]:g}".ljust(20) + mode.ljust(9)
                + percent(levels.sum(0) / levels.sum())
                + f"   {bits:.2f} ± {error:.2f} bits")
        if mode != "uniform":
            chosen = torch.tensor([k for *_, k in crops.chosen()]).long().bincount(minlength=5)[1:]
            line += f"   placed {percent(chosen / chosen.sum())}"
        if mode in ("isus", PLACED):
            line += f"   clamped {crops.at_a_limit():.0%}"
        print(line)


def print_tables(arms, names, cut, sizes):
    """What the paper shows, and what was counted here."""
    print("Figure 2 of the paper, which has plots and no numbers, and our counts:")
    print("  left: crops cut large objects".ljust(45) + "IoU " + " ".join(f"{v:.2f}" for v in cut)
          + " at percentiles 0-25-75-90-99-100 of size")
    print("  right: sizes are \"markedly non-uniform\"".ljust(45)
          + " ".join(map(str, sizes.tolist())) + " things of <=4 8 16 32 64 >=128 pixels")
    print_levels(arms)
    print(f"\ncrops that show a {', '.join(names)}, in %")
    for mode in MODES:
        print(f"  {mode:8}{percent(arms[RANGES[0], mode].shares(), digits=0)}")
    things = arms[RANGES[0], "isus"].levels().sum(1).float().mean()
    print(f"\nA crop of ISUS shows {things:.0f} things. One of them was chosen, or stuff was; the "
          "others are only resized with it.")
    for low, high in RANGES:
        (isus, a), (cus, b) = (spread(arms[(low, high), m].levels()) for m in ("isus", "cus"))
        gain, error = isus - cus, (a * a + b * b) ** 0.5
        verdict = "more" if gain > 2 * error else "less" if gain < -2 * error else "equally"
        print(f"At scales {low:g} to {high:g} the levels of all things are {verdict} uniform with "
              f"ISUS as against CUS: {gain:+.2f} ± {error:.2f} bits.")


def draw_figure(arms, cut, sizes, categories, path):
    """Figure 2 of the paper, the levels at both ranges, and examples of chosen instances."""
    figure = new_figure(5.4)
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.05))
    a, b, *panels = above.subplots(1, 4, width_ratios=(1, 1.25, 1, 1))
    a.bar(["25", "75", "90", "99", "100"], cut)
    a.set(title="(a) IoU of visible\nand whole boxes", xlabel="size, up to percentile", ylim=(0, 1))
    b.bar(["≤4", "8", "16", "32", "64", "≥128"], sizes.tolist())
    b.set(title="(b) number of things\nby size", xlabel="sqrt(w h), pixels")
    for letter, ax, limits in zip("cd", panels, RANGES):
        for k, mode in enumerate(MODES):
            counts = arms[limits, mode].levels().sum(0)
            ax.bar([level + 0.27 * (k - 1) for level in (1, 2, 3, 4)],
                   (100 * counts / counts.sum()).tolist(), 0.27, color=COLOURS[mode],
                   label=f"{mode}: {entropy(counts):.2f} bits")
        ax.axhline(25, color="k", lw=0.8, ls=":")
        ax.set(title=f"({letter}) level of all things, %,\nscales {limits[0]:g} to {limits[1]:g}",
               xlabel="pyramid level", xticks=[1, 2, 3, 4], ylim=(0, 110))
        ax.legend()
    for ax in (a, b, *panels):
        ax.spines[["top", "right"]].set_visible(False)
    below.suptitle("(e) ISUS: the chosen instance, the level of its whole box, and sigma")
    rows = arms[RANGES[0], PLACED].chosen()
    for n, ax in enumerate(below.subplots(2, 4).T.flat):       # a column for each level
        ax.axis("off")
        level = n // 2 + 1
        for image, t, _ in [row for row in rows if row[2] == level][n % 2:n % 2 + 1]:
            ax.imshow(image.permute(1, 2, 0).numpy())
            edge = F.pad((t.segments == t.instance).float(), (1,) * 4)    # closes lines at the crop
            ax.contour(*(torch.arange(m) - 1 for m in edge.T.shape), edge, [0.5], colors="yellow")
            name = categories[t.categories[t.instance - 1]].name
            ax.set_title(f"{name}, level {level}, σ = {t.scale:.2f}")
    save(figure, path)


def compare_samplers(scenes, count, out):
    """Draws `count` crops from each sampler at each range; prints the tables, writes isus.png."""
    streets = Drawn(world("street", "val", scenes))
    index = build_index(streets)
    isthing = torch.tensor([c.isthing for c in streets.categories])
    things = size(index.box[isthing[index.category] & ~index.crowd])
    sizes = things.log2().round().clamp(2, 7).long().bincount(minlength=8)[2:]
    print(f"{scenes} streets of 256x512 pixels; {count} crops of 128x256 from each sampler\n")
    arms = {(limits, mode): Crops(streets, index, mode, limits=limits, count=count)
            for limits in RANGES for mode in (*MODES, PLACED)}
    cut = cut_by_size(arms[RANGES[0], "uniform"])
    names = [c.name for c in streets.categories if c.isthing]
    print_tables(arms, names, cut, sizes=sizes)
    draw_figure(arms, cut, sizes, categories=streets.categories, path=Path(out, "isus.png"))
