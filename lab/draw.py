"""Images of segments: `draw` colours one image, `show_predictions` a sheet of them."""
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw


def pyplot():
    """matplotlib.pyplot without a screen. It is imported where it is needed: it takes a second."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


@contextmanager
def figure_of(path, rows=1, columns=1, size=(10, 5), dpi=120, **options):
    """A figure of `rows` x `columns` axes; on leaving, it is written to `path`. `options` go to
    plt.subplots; without any, the axes fill the figure."""
    plt = pyplot()
    figure, axes = plt.subplots(rows, columns, figsize=size, dpi=dpi, squeeze=False, **options)
    yield axes
    if not options:
        figure.subplots_adjust(0, 0, 1, 1, 0.01, 0.01)
    save(figure, path)


def save(figure, path):
    """Writes a matplotlib figure to `path`, closes it and prints where it is. A palette of 256
    colours needs a third of the bytes."""
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
            ax.text(x, y, name, color="w", size=7, ha="center", va="center", clip_on=True,
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
    with figure_of(path, len(shown), 3, size=(15, 2.6 * len(shown))) as axes:
        for (sample, prediction), row in zip(shown, axes):
            row[0].imshow(sample.image.permute(1, 2, 0).numpy())
            row[0].axis("off")
            draw(sample.image, sample.segments, sample.categories, categories, ax=row[1])
            draw(sample.image, prediction.segments, prediction.categories, categories, ax=row[2])
