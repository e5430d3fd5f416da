"""Click on cells and see their masks: python -m lab.clicks 7 [--weights FILE]

The argument is the number of a toy image or a PNG or JPEG file. The backbone runs before the window
opens; a click costs one run of the head.
"""
import argparse
import itertools

import numpy as np
import torch

from data import DataError
from lab.cells import OverlappingCells
from lab.demo_adaptis import KEPT, load
from lab.worlds import SEEDS


def window(model, image):
    """A matplotlib figure of image [3, H, W]; a click paints the object under the cursor."""
    import matplotlib.pyplot as plt
    H, W = image.shape[1:]
    with torch.no_grad():
        features = model.encoder(image[None])
        shared = model.selection.share(features)
    paint, colours = np.zeros((H, W, 4), np.float32), itertools.count()
    figure, ax = plt.subplots(figsize=(7, 7 * H / W + 0.5), layout="constrained")
    ax.imshow(image.permute(1, 2, 0).numpy(), extent=(0, W, H, 0))  # clicks then count as points
    overlay = ax.imshow(paint, extent=(0, W, H, 0))
    ax.set_title("click on a cell")
    ax.axis("off")

    @torch.no_grad()
    def on_click(event):
        if event.inaxes is not ax or not (0 <= event.xdata < W and 0 <= event.ydata < H):
            return
        point = torch.tensor([[[event.xdata, event.ydata]]], dtype=torch.float32)
        logits, corners = model.selection(features, point, shared)
        x, y = corners[0].tolist()
        C = logits[0].sigmoid()[:H - y, :W - x].numpy()
        mask = C > model.threshold
        colour = plt.get_cmap("tab10")(next(colours) % 10)[:3]
        paint[y:y + len(mask), x:x + mask.shape[1]][mask] = (*colour, 0.75)
        overlay.set_data(paint)
        mean = C[mask].mean() if mask.any() else 0
        ax.set_title(f"({event.xdata:.0f}, {event.ydata:.0f}): {mask.sum()} pixels, "
                     f"mean confidence {mean:.2f}")
        figure.canvas.draw_idle()

    figure.canvas.mpl_connect("button_press_event", on_click)
    return figure


def read(name):
    """A toy image by its number, or an image file -> float32 [3, H, W]."""
    if name.isdigit():
        return OverlappingCells(10**9, seed=SEEDS["test"])[int(name)].image
    from PIL import Image
    try:
        pixels = np.array(Image.open(name).convert("RGB"))
    except OSError as e:
        raise DataError(f"{name} cannot be read as an image ({e}); give a PNG or JPEG file, or the "
                        "number of a toy image") from e
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def main(argv=None):
    """Opens the window."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", help="a number, or a file")
    parser.add_argument("--weights", default=KEPT, help=f"default: {KEPT}")
    args = parser.parse_args(argv)
    try:
        window(load(args.weights), read(args.image))
    except DataError as e:
        parser.error(str(e))
    import matplotlib.pyplot as plt
    plt.show()


if __name__ == "__main__":
    main()
