"""Images of segments: `draw` colours one image, `show_predictions` a sheet of them. And what all
figures share: width, size of letters, colours of numbers."""
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw


WIDTH, DPI = 8, 125                # of each figure: inches, pixels an inch
FONT = 8.5                         # points: 12 pixels where a figure is shown 800 pixels wide
COLOURS = "viridis"                # of numbers


def pyplot():
    """matplotlib.pyplot without a screen, with one size of letters and one colour map. It is
    imported where it is needed: it takes a second."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot
    sizes = dict.fromkeys(("font.size", "axes.titlesize", "figure.titlesize"), FONT)
    matplotlib.rcParams.update({**sizes, "legend.fontsize": FONT, "image.cmap": COLOURS})
    return matplotlib.pyplot


def new_figure(height, **options):
    """An empty figure, WIDTH inches wide, that `save` writes."""
    return pyplot().figure(figsize=(WIDTH, height), **{"layout": "constrained", **options})


@contextmanager
def figure_of(path, rows, columns, height):
    """A figure of `rows` x `columns` axes that fill it; on leaving, it is written to `path`."""
    figure = new_figure(height, layout="none")
    yield figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(0, 0, 1, 1, 0.01, 0.01)
    save(figure, path)


def save(figure, path):
    """Writes a matplotlib figure to `path`, closes it and prints where it is. A palette of 256
    colours needs a third of the bytes. A name that would cover another one is left out."""
    figure.set_dpi(DPI)
    figure.canvas.draw()
    for ax in figure.axes:
        boxes = []
        for text in (t for t in ax.texts if t.get_gid() == "name"):
            box = text.get_window_extent()
            free = ax.bbox.x0 < box.x0 and box.x1 < ax.bbox.x1
            free = free and not any(box.overlaps(other) for other in boxes)
            text.set_visible(free)
            boxes += [box] if free else []
    figure.canvas.draw()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())
    sheet.quantize(256).save(path, optimize=True)
    pyplot().close(figure)
    print(f"wrote {path}")


def colours_of(segment_categories, categories):
    """RGB float32 [N + 1, 3] of segments 0..N, 0..255: void is black, stuff has its category's
    colour, things of one category differ in shade."""
    palette = [(0., 0., 0.)]
    for k, c in enumerate(segment_categories):
        shade = 1.
        if categories[c].isthing:                              # the golden ratio spreads shades
            shade = .6 + .8 * ((.618 * segment_categories[:k].count(c) + .4) % 1)
        dark, light = min(shade, 1), max(shade - 1, 0)
        palette.append([v * dark + (255 - v) * light for v in categories[c].colour])
    return torch.tensor(palette)


def places(segments, segment_categories, categories):
    """Where a name may stand: (x, y, name) of each segment of more than a hundredth of the image,
    at its pixel nearest to the mean of its pixels."""
    found = []
    for k, c in enumerate(segment_categories, 1):
        pixels = torch.nonzero(segments == k).float()
        if len(pixels) > .01 * segments.numel():
            far = (pixels - pixels.mean(0)).square().sum(1)
            y, x = pixels[far.argmin()].tolist()
            found.append((x, y, categories[c].name))
    return found


def draw(image, segments, segment_categories, categories, *, ax=None, names=True):
    """Coloured segments over the image, with names on large ones -> uint8 [H, W, 3]. Shown in `ax`
    if it is given; the names are the axes' then, else pixels."""
    segments = torch.as_tensor(segments).cpu()
    segment_categories = torch.as_tensor(segment_categories).tolist()
    below = F.pad(segments[1:] != segments[:-1], (0, 0, 0, 1))
    right = F.pad(segments[:, 1:] != segments[:, :-1], (0, 1))
    grey = torch.as_tensor(image).cpu().float().mean(0)[..., None]
    out = .7 * colours_of(segment_categories, categories)[segments] + .3 * 255 * grey
    out = torch.where((below | right)[..., None], 255., out).clamp(0, 255).to(torch.uint8).numpy()
    named = places(segments, segment_categories, categories) if names else []
    if ax is not None:
        ax.imshow(out)
        ax.axis("off")
        for x, y, name in named:
            ax.text(x, y, name, color="w", ha="center", va="center", clip_on=True, gid="name",
                    bbox={"facecolor": "k", "alpha": .4, "pad": 1, "lw": 0})
        return out
    sheet = Image.fromarray(out)
    pen = ImageDraw.Draw(sheet)
    for x, y, name in named:
        x1, y1, x2, y2 = pen.textbbox((0, 0), name)
        place = (x - (x1 + x2) / 2, y - (y1 + y2) / 2)
        pen.rectangle(pen.textbbox(place, name), fill="black")
        pen.text(place, name, fill="white")
    return np.asarray(sheet)


def show_predictions(path, shown, categories):
    """A sheet: each row an image, its label and a prediction. shown: rows (Sample, Prediction)."""
    with figure_of(path, len(shown), 3, height=1.4 * len(shown)) as axes:
        for (sample, prediction), row in zip(shown, axes):
            row[0].imshow(sample.image.permute(1, 2, 0).numpy())
            row[0].axis("off")
            draw(sample.image, sample.segments, sample.categories, categories, ax=row[1])
            draw(sample.image, prediction.segments, prediction.categories, categories, ax=row[2])
