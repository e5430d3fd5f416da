"""Segments image files of your own: a coloured copy of each, and COCO panoptic files."""
import matplotlib
import matplotlib.pyplot as plt
from pathlib import Path

from data import DataError
from lab import draw, evaluate, readers

matplotlib.use("Agg")


def predict_files(model, paths, categories, world, folder, *, short_side=0):
    """Writes folder/NAME.png (segments over the image) and folder/panoptic/NAME.png with
    folder/panoptic.json for each image file; prints what was found."""
    if not paths:
        raise DataError("--predict needs images after the checkpoint: --predict RUN/last.pt "
                        "image.png ...")
    model.eval()
    folder.mkdir(parents=True, exist_ok=True)
    annotations = []
    for path in map(Path, paths):
        image = readers.read_image(path)
        found = evaluate.predict(model, image, short_side, world)
        annotations.append(readers.write_annotation(folder / "panoptic", path.stem, found.segments,
                                                    found.categories))
        h, w = image.shape[1:]
        fig, ax = plt.subplots(figsize=(w / 100, h / 100))
        fig.subplots_adjust(0, 0, 1, 1)
        draw.draw(image, found.segments, found.categories, categories, ax=ax)
        ax.axis("off")
        fig.savefig(folder / f"{path.stem}.png", dpi=100)
        plt.close(fig)
        names = [categories[c].name for c in found.categories.tolist()]
        text = ", ".join(f"{names.count(n)} {n}" for n in dict.fromkeys(names)) or "nothing found"
        print(f"{path}: {text} -> {folder / path.stem}.png")
    readers.write_panoptic_json(folder / "panoptic", annotations, categories)
