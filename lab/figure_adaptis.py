"""The figure of adaptis.py: results, answers at single points, the greedy algorithm."""
import math

import numpy as np
import torch
import torch.nn.functional as F

from adaptis import sample_points, segment_instances
from lab.cells import OverlappingCells
from lab.demo_adaptis import found_and_false, instance_map
from lab.draw import COLOURS, new_figure, pyplot, save
from lab.worlds import SEEDS


def coloured(image, labels, count, seed=1):
    """The image with every instance in a colour of its own -> [H, W, 3]; `count` colours."""
    import matplotlib
    random = np.random.default_rng(seed)
    hues = random.permutation(np.linspace(0, 1, count, endpoint=False))
    tints = matplotlib.colormaps["hsv"](hues)[:, :3] * random.uniform(0.65, 1, (count, 1))
    shade = image.mean(0).numpy()[..., None] * 0.35 + 0.65
    return np.clip(np.concatenate([[[1, 1, 1]], tints])[labels.numpy()] * shade, 0, 1)


def result(model, sample, left, right, name):
    """Draws an image and its instances side by side; the title counts them."""
    labels = instance_map(model.predict(sample.image))
    found, objects, false = found_and_false(labels, sample.segments, sample.categories)
    left.imshow(sample.image.permute(1, 2, 0).numpy())
    left.set_title(name)
    right.imshow(coloured(sample.image, labels, int(labels.max())))
    right.set_title(f"{found} of {objects}, {false} false")


def say(ax, text):
    """Text above `ax` that may run on above its neighbours."""
    ax.annotate(text, (0, 1), (0, 6), "axes fraction", "offset points").set_in_layout(False)


def single_points(model, sample, axes):
    """Two points on the largest cell, then points on others, and the confidence C at each."""
    plt = pyplot()
    H, W = sample.image.shape[1:]
    features = model.encoder(sample.image[None])
    numbers = torch.where(sample.categories == 1)[0] + 1
    area = torch.bincount(sample.segments.flatten(), minlength=len(sample.categories) + 1)
    numbers = numbers[area[numbers].argsort(descending=True)]
    g = torch.Generator().manual_seed(3)
    points = torch.cat([sample_points(sample.segments, numbers[k][None], 1, g)[0]
                        for k in (0, 0, 1, 2, len(numbers) // 2, -2)])
    logits, corners = model.selection(features, points[None])
    grey = sample.image.mean(0)[..., None].expand(-1, -1, 3).numpy() * 0.5 + 0.4
    for ax, point, C, (x, y) in zip(axes, points, logits.sigmoid(), corners.tolist()):
        h, w = C.shape
        confidence = np.zeros((H, W))
        confidence[y:y + h, x:x + w] = C[:H - y, :W - x]
        heat = plt.get_cmap(COLOURS)(confidence)[..., :3]
        share = confidence[..., None].clip(max=0.9)
        ax.imshow((grey + (heat - grey) * share).clip(0, 1), extent=(0, W, H, 0))
        ax.plot(*point.tolist(), "o", ms=4, mfc="cyan", mec="black")
        ax.add_patch(plt.Rectangle((x, y), w, h, fill=False, ec="grey", ls=":"))
    axes[0].set_title(" ")
    say(axes[0], "image A: two points on one cell ...")
    say(axes[2], "... and points on others; dotted: the window; yellow: confidence 1")


def greedy_steps(model, sample, axes):
    """The map of segmented objects after some rounds of the greedy algorithm, and the points that
    the next round asks. It runs again for each panel, and finds nothing after these rounds."""
    H, W = sample.image.shape[1:]
    features = model.encoder(sample.image[None])
    logits = F.interpolate(model.semantic(features), scale_factor=model.stride, mode="bilinear")
    unknown = logits[0, :, :H, :W].argmax(0) == 1

    def after(rounds):
        asked = []

        def propose(points):
            logits, corners = model.selection(features, points[None])
            asked.append(points)
            return logits.sigmoid() * (len(asked) <= rounds), corners

        labels, _ = segment_instances(propose, unknown, model.threshold,
                                      generator=torch.Generator().manual_seed(0), **model.search)
        return labels, asked

    count = int(after(math.inf)[0].max())
    for ax, rounds in zip(axes, (0, 2, 5, 9, 14, math.inf)):
        labels, asked = after(rounds)
        panel = coloured(sample.image, labels, max(count, int(labels.max())))
        panel[(unknown & (labels == 0)).numpy()] = 0.6
        ax.imshow(panel, extent=(0, W, H, 0))
        if len(asked) > rounds:
            ax.plot(*asked[rounds].T.numpy(), "o", ms=3, mfc="white", mec="black")
        ax.set_title(f"\n{min(rounds, len(asked))} rounds: {int(labels.max())} cells")
    say(axes[0], "\nThe greedy algorithm. Grey: not segmented yet; dots: the seven points that the "
                 "next round asks\n")


@torch.no_grad()
def draw(path, model):
    """Draws the figure with test images: six results, six points, six steps, one image of 384x384.
    The model is on the CPU, in eval mode."""
    test = OverlappingCells(15, seed=SEEDS["test"])
    large = OverlappingCells(1, 384, (128, 352), seed=SEEDS["test"])[0]
    figure = new_figure(9.6)
    upper, lower = figure.subfigures(2, 1, height_ratios=(3, 2))
    axes = upper.subplots(4, 6)
    for k, (i, name) in enumerate(zip((0, 3, 5, 8, 11, 14), "ABCDEF")):
        left, right = axes[k // 3, k % 3 * 2], axes[k // 3, k % 3 * 2 + 1]
        result(model, test[i], left, right, f"image {name}")
    single_points(model, test[0], axes[2])
    greedy_steps(model, test[0], axes[3])
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
    wide = lower.subplots(1, 2)
    patience, model.search["patience"] = model.search["patience"], 20 * 16
    result(model, large, *wide, "384 x 384 pixels, trained on 96 x 96")
    model.search["patience"] = patience
    for ax in wide:
        ax.axis("off")
    save(figure, path)
