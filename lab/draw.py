"""Image of segments: `draw` colours one image, `show_predictions` a sheet of them."""

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


@contextmanager
def figure_of(path, rows=1, columns=1, size=(10, 5), dpi=120, **options):
    """A figure of `rows` x `columns` axes; on leaving, it is written to `path` with 256 colours at
    most.

    The palette needs a third of the bytes. `options` go to plt.subplots; without any, the axes fill
    the figure.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=size, dpi=dpi, squeeze=False, **options)
    yield axes
    if not options:
        figure.subplots_adjust(0, 0, 1, 1, 0.01, 0.01)
    save(figure, path)
    plt.close(figure)


def save(figure, path):
    """Writes a matplotlib figure to `path` with 256 colours and prints where it is."""
    figure.canvas.draw()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())
    sheet.quantize(256).save(path, optimize=True)
    print(f"wrote {path}")


def draw(image, segments, segment_categories, categories, ax=None, names=True):
    """Coloured segments over the image -> uint8 [H, W, 3]; shown in `ax`, if given, with names on
    large segments."""
    segments, kinds = torch.as_tensor(segments).cpu(), torch.as_tensor(segment_categories).tolist()
    palette = [(0.0, 0.0, 0.0)]
    for k, c in enumerate(kinds):  # the golden ratio spreads shades evenly
        shade = (
            0.6 + 0.8 * ((0.618 * kinds[:k].count(c) + 0.4) % 1) if categories[c].isthing else 1.0
        )
        palette.append(
            [v * min(shade, 1) + (255 - v) * max(shade - 1, 0) for v in categories[c].colour]
        )
    edge = F.pad(segments[1:] != segments[:-1], (0, 0, 0, 1)) | F.pad(
        segments[:, 1:] != segments[:, :-1], (0, 1)
    )
    out = (
        0.7 * torch.tensor(palette)[segments]
        + 0.3 * 255 * torch.as_tensor(image).cpu().float().mean(0)[..., None]
    )
    out = (
        torch.where(edge[..., None], torch.tensor(255.0), out).clamp(0, 255).to(torch.uint8).numpy()
    )
    if ax is not None:
        ax.imshow(out)
        ax.axis("off")
        for k, c in enumerate(kinds if names else [], 1):
            place = torch.nonzero(segments == k).float()
            if len(place) > 0.01 * segments.numel():
                y, x = place[
                    (place - place.mean(0)).square().sum(1).argmin()
                ].tolist()  # nearest to its centre
                ax.text(
                    x,
                    y,
                    categories[c].name,
                    color="w",
                    size=7,
                    ha="center",
                    va="center",
                    clip_on=True,
                    bbox={"facecolor": "k", "alpha": 0.4, "pad": 1, "lw": 0},
                )
    return out


def show_predictions(path, shown, categories):
    """A sheet: each row an image, its label and a prediction. shown: rows (Sample, Prediction)."""
    with figure_of(path, len(shown), 3, size=(15, 2.6 * len(shown))) as axes:
        for (sample, prediction), row in zip(shown, axes):
            row[0].imshow(sample.image.permute(1, 2, 0))
            row[0].axis("off")
            draw(sample.image, sample.segments, sample.categories, categories, row[1])
            draw(sample.image, prediction.segments, prediction.categories, categories, row[2])
