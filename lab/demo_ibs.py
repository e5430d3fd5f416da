"""The demo of ibs.py: Figure 5 and Table 3 of the paper in small, on parking lots (lab/parking.py).

Five networks of kernels (lab/kernels.py) learn from equally many pixels: of whole images, of random
crops or of paired crops, with intra-batch supervision (IBS) or without. They are measured on images
of the test split, whole and cut to the size of a crop.
"""
import math
import time
from pathlib import Path

import torch
from torch import nn

import isus
import seamless
from data import Sample, collate, crop
from ibs import MinimalNet, PairedCropSampler, mask_logits
from lab import unified
from lab.draw import new_figure, save
from lab.recipes import RECIPES
from lab.worlds import world
from pq import PanopticQuality, confusion_ratio

# Choice: the crop is as large a share of the image as 640x1280 is of Cityscapes'.
CROP, SCALE, BATCH = (80, 160), (0.8, 1.25), 6
WEIGHT = RECIPES["ibs", "parking"]["model"]["ibs_weight"]
# How it is built, its method in train.py, learning rate, length of gradients.
FAMILIES = {"kernels": (unified.kernels, "ibs", 0.002, 10.0),
            "queries": (unified.queries, "queries", 0.001, 1.0)}
# Name: mode of the sampler, weight of IBS, and the paper's PQ_th, Acc_th, Prec_th (Table 3).
ROWS = {"full images": ("full", 0.0, "29.8  73.8  80.8"),
        "crops": ("uniform", 0.0, "31.8  74.7  77.9"),
        "crops, IBS": ("uniform", WEIGHT, "32.9  76.3  82.5"),
        "pairs": ("paired", 0.0, ""),
        "pairs, IBS": ("paired", WEIGHT, "33.6  77.0  82.2")}
THRESHOLDS = list(range(0, 100, 5))                            # T of Figure 5, in percent
AT_25 = THRESHOLDS.index(25)
# Parts of an image, by size: where they begin (top, left).
WINDOWS = {(80, 160): (24, 48), (128, 160): (0, 48), (80, 256): (24, 0), (128, 256): (0, 0)}


# --- The smallest case ------------------------------------------------------------------------

def learn_two_cars(weight, seed=0, steps=150):
    """Two images of 32x32 pixels, a red square on the one, a blue one on the other. A MinimalNet
    learns from both, with IBS of this weight -> the network, images, targets."""
    segments = torch.ones(32, 32, dtype=torch.int64)
    segments[8:24, 8:24] = 2
    crops = []
    for i, colour in enumerate(([0.9, 0.2, 0.1], [0.1, 0.3, 0.9])):
        image = torch.full((3, 32, 32), 0.5)
        image[:, segments == 2] = torch.tensor(colour)[:, None]
        sample = Sample(image, segments, torch.tensor([0, 1]), torch.zeros(2).bool(), "")
        crops.append(crop(sample, 0, 0, (32, 32), image_id=i))
    images, targets = collate(crops)
    torch.manual_seed(seed)
    net = MinimalNet([False, True], ibs_weight=weight)
    optimiser = torch.optim.Adam(net.parameters(), 5e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        sum(net.losses(images, targets).values()).backward()
        optimiser.step()
    return net, images, targets


def two_cars(weight):
    """-> percent of the blue square that the mask of the red one covers, and the reverse; percent
    of itself that each mask covers."""
    net, images, targets = learn_two_cars(weight)
    with torch.no_grad():
        embeddings, features = net(images, [t.boxes[1:] for t in targets])
        masks = [[mask_logits(e, f)[0, 2:6, 2:6] > 0 for f in features] for e in embeddings]
    share = [[100 * mask.float().mean().item() for mask in row] for row in masks]
    return (share[0][1], share[1][0]), (share[0][0], share[1][1])


# --- Training ---------------------------------------------------------------------------------

def batches(scenes, index, mode, seed=0, **options):
    """An endless supply of batches: six crops, or in mode "full" two whole images. `options` are
    those of the PairedCropSampler."""
    how = dict(size=CROP, scale=SCALE, seed=seed)
    if mode == "paired":
        return iter(PairedCropSampler(scenes, index, batch=BATCH, **how, **options))
    batch = 2 if mode == "full" else BATCH
    return iter(isus.CropSampler(scenes, index, mode=mode, scale_things=SCALE, batch=batch, **how))


def share_with_common_category(source, isthing, draws=100):
    """In how many of `draws` batches do the first two crops show things of one category? Percent.
    Only there is intra-batch supervision likely to meet a confusion."""
    count = 0
    for _ in range(draws):
        first, second = (set(t.categories[isthing[t.categories]].tolist())
                         for t in next(source)[1][:2])
        count += bool(first & second)
    return 100 * count / draws


def learn(net, source, steps, rate, clip):
    """Trains by AdamW -> seconds. The rate rises from a third in 50 steps and falls to 0 like a
    cosine. Gradients longer than `clip` are made that long."""
    device, begin = net.isthing.device, time.time()
    optimiser = torch.optim.AdamW(net.parameters(), rate, weight_decay=0.05)
    net.train()
    for step in range(steps):
        fall = (1 + math.cos(math.pi * step / steps)) / 2
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1 / 3 + step / 75, fall)
        images, targets = next(source)
        losses = net.losses(images.to(device), [t.to(device) for t in targets])
        optimiser.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimiser.step()
    net.eval()
    return time.time() - begin


def train(scenes, index, mode, weight, *, steps, seed=0, device="cpu", family="kernels",
          model=None, **options):
    """A network of kernels, or queries, that learnt from `scenes` -> (network, seconds). `model`:
    settings that differ from the recipe's. `options` are those of the PairedCropSampler.

    Two whole images have fewer pixels than six crops, on average 32 for every 35: "full" gets more
    steps."""
    torch.manual_seed(seed)
    body = seamless.resnet_fpn("tiny", 64)
    build, method, rate, clip = FAMILIES[family]
    settings = {**RECIPES[method, "parking"]["model"], "ibs_weight": weight, **(model or {})}
    net = build([c.isthing for c in scenes.categories], body, paired=mode == "paired",
                **settings).to(device)
    steps = steps * 35 // 32 if mode == "full" else steps
    source = batches(scenes, index, mode, seed=seed, **options)
    return net, learn(net, source, steps, rate=rate, clip=clip)


# --- Measuring --------------------------------------------------------------------------------

@torch.no_grad()
def measure(net, images):
    """images: pairs (image, Target) -> (what PanopticQuality says; percent of predicted things that
    are confused, a tensor over THRESHOLDS; the same at T = 25 of the masks before they are merged;
    for each image its `instances` on the CPU)."""
    isthing, device = net.isthing.cpu(), net.isthing.device
    quality, instances = PanopticQuality(isthing), []
    confused, before = torch.zeros(2, len(THRESHOLDS)), torch.zeros(2, 1)        # confused, all
    for image, t in images:
        found = net.predict(image.to(device))
        segments, truth = found.segments.cpu(), (t.segments, t.categories)
        quality.update(segments, found.categories, *truth)
        instances.append({k: v.cpu() for k, v in found.instances.items()})
        confused += torch.stack(confusion_ratio(
            segments, found.categories, *truth, isthing=isthing, thresholds=THRESHOLDS))
        before += torch.stack(confusion_ratio(
            instances[-1]["masks"], instances[-1]["categories"], *truth, isthing=isthing,
            thresholds=[25]))
    confused, before = (100 * v[0] / v[1].clamp(min=1) for v in (confused, before))
    return quality.compute(), confused, before.item(), instances


def compare(steps, train_images, test_images, *, device="cpu", out="figures"):
    """Trains and measures the five networks, prints tables and draws figures into `out`: ibs.png,
    and what MinimalNet and the last of the five compute."""
    from lab import shapes
    for weight in (0.0, 1.0):
        (red, blue), _ = two_cars(weight)
        print(f"a red and a blue car, weight of IBS {weight}: the mask of the red one covers "
              f"{red:.0f}% of the blue one, the reverse {blue:.0f}%")
    scenes, unseen = world("parking", "train", train_images), world("parking", "test", test_images)
    index, isthing = isus.build_index(scenes), torch.tensor([c.isthing for c in scenes.categories])
    for mode, text in (("uniform", "drawn at random"), ("paired", "drawn in pairs")):
        share = share_with_common_category(batches(scenes, index, mode), isthing)
        print(f"two crops {text} show things of one category: {share:.0f}%")
    unseen = [unseen[i] for i in range(len(unseen))]
    parts = {size: [crop(s, *at, size) for s in unseen] for size, at in WINDOWS.items()}
    curves, growth, instances = {}, {}, {}
    columns = ("PQ", "PQ_th", "PQ_st", "Acc_th", "Prec_th")
    print(f"\n{steps} steps, one seed, {len(unseen)} whole images of the test split; confused at "
          "T = 25%,\nafter merging and before; at the right what the paper says of Vistas\n"
          f"{'trained on':12s}" + "".join(f"{name:>8s}" for name in columns)
          + "  merged  before  seconds  PQ_th Acc_th Prec_th")
    for name, (mode, weight, paper) in ROWS.items():
        net, seconds = train(scenes, index, mode, weight=weight, steps=steps, device=device)
        found = {size: measure(net, images) for size, images in parts.items()}
        growth[name] = [confused[AT_25].item() for _, confused, _, _ in found.values()]
        quality, curves[name], before, instances[name] = found[128, 256]
        print(f"{name:12s}" + "".join(f"{quality[column]:8.1f}" for column in columns)
              + f"  {growth[name][-1]:5.1f}%  {before:5.1f}%  {seconds:7.0f}   {paper}", flush=True)
    print("\nconfused at T = 25% on parts of the same images; crops have 80x160\n" + " " * 12
          + "".join(f"{h:6d}x{w}" for h, w in parts))
    for name, values in growth.items():
        print(f"{name:12s}" + "".join(f"{v:9.1f}%" for v in values))
    draw_figure(unseen, isthing, instances, curves=curves, growth=growth, out=out)
    shapes.ibs(out)
    shapes.kernels(out, net)


# --- The figure -------------------------------------------------------------------------------

def best_mask(instances, truth):
    """Of the masks that cover most of `truth` bool [H, W], the one of best score; None if no mask
    does."""
    covers = (instances["masks"] & truth).sum((1, 2)) > 0.5 * truth.sum()
    rows = torch.where(covers)[0]
    if not len(rows):
        return None
    return instances["masks"][rows[instances["scores"][rows].argmax()]]


def most_confused(scenes, isthing, instances, count=3):
    """The things whose masks cover more than a quarter of most others, at most one of an image ->
    [(number of the scene, truth bool [H, W]), ...]."""
    cases = []
    for n, scene in enumerate(scenes):
        area = torch.bincount(scene.segments.flatten(), minlength=len(scene.categories) + 1)[1:]
        things = isthing[scene.categories]
        for k in torch.where(things)[0].tolist():
            truth = scene.segments == k + 1
            mask = best_mask(instances[n], truth)
            if mask is not None:
                shared = torch.bincount(scene.segments[mask], minlength=len(area) + 1)[1:]
                cases.append((int((things & (shared > 0.25 * area)).sum()), n, truth))
    worst = {}
    for _, n, truth in sorted(cases, key=lambda case: -case[0]):
        worst.setdefault(n, truth)
    return list(worst.items())[:count]


def show_mask(ax, image, truth, mask):
    """The image in grey with the mask in red and the truth outlined; "none found" without mask."""
    image = image.mean(0, keepdim=True).expand(3, -1, -1) * 0.55 + 0.25
    if mask is None:
        ax.text(0.5, 0.15, "none found", transform=ax.transAxes, ha="center", va="center",
                color="white")
    else:
        red = torch.tensor([0.95, 0.1, 0.1])[:, None, None]
        image = torch.where(mask, 0.35 * image + 0.65 * red, image)
    ax.imshow(image.permute(1, 2, 0).clamp(0, 1), interpolation="nearest")
    ax.contour(truth, [0.5], colors="lime", linewidths=1.5)


def draw_figure(scenes, isthing, instances, *, curves, growth, out):
    """ibs.png: the masks that crops confuse most and what pairs with IBS make of them; Figure 5;
    confusion on larger and larger parts of the images."""
    figure = new_figure(4)
    left, right = figure.subfigures(1, 2, width_ratios=[1.8, 1])
    grid = left.subplots(3, 3)
    titles = ("a vehicle", "its mask, trained on crops", "... on pairs, with IBS")
    for ax, title in zip(grid[0], titles):
        ax.set_title(title)
    for ax in grid.flat:
        ax.set_axis_off()
    for axes, (n, truth) in zip(grid, most_confused(scenes, isthing, instances["crops"])):
        image = scenes[n].image
        axes[0].imshow(image.permute(1, 2, 0).clamp(0, 1), interpolation="nearest")
        axes[0].contour(truth, [0.5], colors="white", linewidths=1.5)
        for ax, name in zip(axes[1:], ("crops", "pairs, IBS")):
            show_mask(ax, image, truth, mask=best_mask(instances[name][n], truth))
    upper, lower = right.subplots(2)
    styles = {"full images": ("black", "-"), "crops": ("tab:red", "-"),
              "crops, IBS": ("tab:blue", "-"), "pairs": ("tab:red", "--"),
              "pairs, IBS": ("tab:blue", "--")}
    for name, (colour, style) in styles.items():
        upper.plot(THRESHOLDS, curves[name], color=colour, ls=style, lw=2, label=name)
        lower.plot([f"{h}x{w}" for h, w in WINDOWS], growth[name], color=colour, ls=style, lw=2,
                   marker="o", ms=4)
    upper.set(xlabel="T, % of a true thing covered", ylabel="confused, %", xlim=(0, 95),
              ylim=(0, None))
    lower.set(xlabel="size of the image; crops: 80x160", ylabel="confused at T = 25%, %",
              ylim=(0, None))
    upper.set_title("confused predictions (Figure 5)")
    upper.legend()
    for ax in (upper, lower):
        ax.grid(alpha=0.3)
    save(figure, Path(out, "ibs.png"))
