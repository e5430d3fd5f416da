"""The data sets of train.py by name. Toy worlds have three splits, each by its seed: no image is in
two of them. Real data is read in its official layout, see lab/readers.py."""
import importlib
import itertools

import torch
from torch.utils.data import DataLoader

from data import DataError, Sample
from lab import cache, readers

SEEDS = {"train": 1, "val": 0, "test": 2}
TOYS = {  # module, class, and how many images each split has by default
    "street": ("lab.street", "StreetScenes", {"train": 800, "val": 50, "test": 50}),
    "cells": ("lab.cells", "OverlappingCells", {"train": 10000, "val": 200, "test": 200}),
    "parking": ("lab.parking", "Parking", {"train": 400, "val": 100, "test": 100}),
}

OFFICIAL = {"cityscapes": ("train", "val"), "idd": ("train", "val"),      # training, evaluation
            "coco": ("train2017", "val2017"), "mapillary": ("training", "validation"),
            "own": ("train", "val")}                           # in COCO's format, lab/own_images.md


def open_dataset(args, split):
    """The data set of `args`: split is "train", "val" or "test". Real data has no public test
    labels, so both "val" and "test" are its official validation split there."""
    name = args["dataset"]
    if name in TOYS:
        images = args["images"] if split == "train" else args["eval_images"]
        return world(name, split, images)
    if not args["root"]:
        raise DataError(f"--dataset {name} needs --root DIR, the folder of the data set")
    folder = OFFICIAL[name][0 if split == "train" else 1]
    folder = args["train_split" if split == "train" else "eval_split"] or folder
    if name in ("cityscapes", "idd"):
        dataset = readers.Cityscapes(args["root"], folder, table=name)
    else:
        dataset = readers.CocoPanoptic(args["root"], folder)
    return cache.Decoded(dataset, args["cache"]) if args["cache"] and split == "train" else dataset


def open_training(args):
    """The training part of `args`. Opens the other part too: what is wrong with it should be said
    before the training, not after it. DataError: the categories of the two differ."""
    parts = [open_dataset(args, split) for split in ("train", "test")]
    names = [[f"{c.name} ({'thing' if c.isthing else 'stuff'})" for c in part.categories]
             for part in parts]
    for first, other in itertools.zip_longest(*names, fillvalue="none"):
        if first != other:
            raise DataError(f"{args['root']}: the training part has the category {first} where the "
                            f"evaluation part has {other}: both must list the same ones in order")
    return parts[0]


def world(name, split, images=0):
    """The toy world `name`, its split "train", "val" or "test"; `images` 0: the default number.

    Training images are drawn once and kept (`Drawn`)."""
    if name not in TOYS or split not in SEEDS:
        raise DataError(f"no toy world {name!r} with a split {split!r}: take one of "
                        f"{', '.join(TOYS)} and one of {', '.join(SEEDS)}")
    module, kind, counts = TOYS[name]
    draw = getattr(importlib.import_module(module), kind)
    dataset = draw(images or counts[split], seed=SEEDS[split])
    return Drawn(dataset) if split == "train" else dataset


class Drawn:
    """A toy data set that caches its images as uint8: drawing one takes too long to repeat at every
    step. Segments are kept as uint8 too, so an image may have 255 of them."""

    def __init__(self, dataset):
        self.dataset, self.categories, self.kept = dataset, dataset.categories, {}

    def __len__(self):
        return len(self.dataset)

    def keep(self, i, sample):
        image = (sample.image * 255).round().to(torch.uint8)
        self.kept[i] = (image, sample.segments.to(torch.uint8), sample.categories.clone(),
                        sample.crowd.clone(), sample.name)     # a helper's tensor is an open file

    def fill(self, processes=0):
        """Draws all that is missing, with helper processes, so that loaders share the memory.

        A generator of its own: otherwise a resumed run would draw other random numbers."""
        missing = [i for i in range(len(self)) if i not in self.kept]
        rest = torch.utils.data.Subset(self.dataset, missing)
        loader = DataLoader(rest, batch_size=None, num_workers=processes if missing else 0,
                            generator=torch.Generator())
        for i, sample in zip(missing, loader):
            self.keep(i, sample)

    def parts(self, i):
        if i not in self.kept:
            self.keep(i, self.dataset[i])
        return self.kept[i]

    def labels(self, i):
        _, segments, categories, crowd, _ = self.parts(i)
        return segments.long(), categories, crowd

    def __getitem__(self, i):
        image, segments, *rest = self.parts(range(len(self))[i])
        return Sample(image.float() / 255, segments.long(), *rest)
