"""Segments image files of your own: a coloured copy of each, and COCO panoptic files."""
from pathlib import Path

import torch
from PIL import Image

from data import DataError
from lab import draw, evaluate, folders, readers


def predict_files(model, paths, categories, world, folder, *, short_side=0):
    """Writes folder/NAME.png (segments over the image) and folder/panoptic/NAME.png with
    folder/panoptic.json for each image file; prints what was found.

    The second image of one name becomes NAME-2. An image that cannot be read, or is too large for
    the GPU, is left out. DataError names these when the others are done."""
    if not paths:
        raise DataError("--predict needs images after the checkpoint: --predict RUN/last.pt "
                        "image.png ...")
    model.eval()
    paths, annotations, bad = [Path(p) for p in paths], [], []
    taken = {p.stem.lower() for p in paths if p.resolve().parent == folder.resolve()}
    for path in paths:
        try:
            image = readers.read_image(path)
        except DataError as e:
            bad.append(str(e).replace(readers.MISSING, "correct the path"))
            continue
        try:
            found = evaluate.predict(model, image, short_side, world)
        except torch.OutOfMemoryError:
            bad.append(f"{path} needs more GPU memory: set crops.short_side, or --device cpu")
            continue
        folders.make_folder(folder)                            # none where no image is readable
        name, n = path.stem, 1
        while name.lower() in taken:                           # some disks ignore case
            n += 1
            name = f"{path.stem}-{n}"
        taken.add(name.lower())
        annotations.append(readers.write_annotation(folder / "panoptic", name, found.segments,
                                                    found.categories))
        coloured = draw.draw(image, found.segments, found.categories, categories)
        Image.fromarray(coloured).save(folder / f"{name}.png")
        names = [categories[c].name for c in found.categories.tolist()]
        text = ", ".join(f"{names.count(n)} {n}" for n in dict.fromkeys(names)) or "nothing found"
        print(f"{path}: {text} -> {folder / name}.png")
    if annotations:
        readers.write_panoptic_json(folder / "panoptic", annotations, categories)
    if bad:
        done = f"{len(annotations)} of {len(paths)} images are done, in {folder}; "
        raise DataError((done if annotations else "") + "; ".join(bad))
