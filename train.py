"""Puts the ideas together: a panoptic network that trains on a GPU, or on two CPU cores with toy data.

    python train.py                                         toy street scenes, a thin backbone, some minutes on a CPU
    python train.py --dataset cityscapes --root DIR         the real thing; idd, coco and mapillary likewise
    python train.py --method seamless|adaptis|affinity|ibs|maskrcnn   who segments (maskrcnn: torchvision's, as a peer)
    python train.py --dataset cells                         the toy problem of AdaptIS; hours, or --steps 10000
    python train.py --dataset parking [--ibs-weight 0]      the toy problem of intra-batch supervision; minutes
    python train.py --resume RUN                            go on as if the run had not stopped
    python train.py --eval RUN/last.pt [--root DIR]         full-image evaluation
    python train.py --eval RUN/last.pt --readings           of --method affinity: rules, argmax and head on the same outputs
    python train.py --predict RUN/last.pt picture.png ...   on anybody's pictures
    python train.py --versus "A-*" "B-*"                    the same seeds of two recipes: paired differences
    python train.py --compare                               every method on the same toy street: one table, one figure
    torchrun --nproc_per_node=8 train.py --dataset ...      one process a GPU

Data flows one way: data set -> sampler -> batch of crops -> model.losses() -> optimiser; full image -> model.predict() -> pq.
A run's folder holds last.pt, log.csv, curves.png, predictions.png, metrics.json and the predictions in COCO panoptic format.

A method is an nn.Module with two methods and, if it trains in stages, a third:
    .losses(images [B, 3, H, W], targets) -> {name: scalar}     zero with gradients where there is nothing to learn from
    .predict(image [3, H, W], size=None) -> Prediction          at `size` (height, width), the image's own by default
    .stages() -> [(name, parameters, make_optimiser, share of the steps), ...]
"""
import argparse
import csv
import functools
import glob
import json
import math
import os
import resource
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import matplotlib
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.data import DataLoader

import adaptis
import affinity_head
import cabb_loss
import data
import ibs
import isus
import seamless
from pq import AveragePrecision, PanopticQuality, confusion_ratio, instance_pixels

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen first)


class UserError(Exception):
    """Something the user can mend; its text says what is wrong and what to do.  Ends the program with exit code 2."""


# --- Recipes: what a data set asks for.  Every entry is a flag of the command line, which wins. ---------------------------
# Seamless 2019, section 5: SGD, 48k steps of 8 whole images, rate 1e-2 divided by 10 after 36k and 44k, warm-up from a third
# in 200 steps, shortest side 1024 t with t in [0.5, 2].  `--sampler full --box-loss standard --batch 8` is that recipe to the
# letter.  The default trains as the 2021 paper does, on crops by ISUS with CABB, and sees as many pixels a step (16 crops of
# 512x1024) in less memory; that paper's own schedule is not in the text at hand.  `--no-freeze` is the 2019 "no freeze, decay BN".
PAPER = dict(body="resnet50", weights="imagenet", width=256, extra=1, canonical=224, anchor_scale=8, ratios=[0.5, 1, 2], rois=512,
             proposals=1000, window=64, stuff_area=4096, sampler="isus", crop=[512, 1024], batch=16, short_side=1024,
             scale=[0.5, 2.0], scale_things=[0.5, 2.0], jitter=0.0, hue=0.0, flip=0.5, lr=0.01, steps=48000, warmup=200,
             drops=[0.75, 44 / 48], clip=10.0, decay=1e-4, frozen=2, no_freeze=False, interval=50, eval_count=0, semantic_loss="hardest", roi_mask_loss="bce", excitation=False,
             score_threshold=0.5)
RECIPES = {
    # Toy pictures have 256x512 pixels, objects a quarter of the size, and section 5.3's anchors: many ratios, twice the stride.
    "street": {**PAPER, **dict(body="small", weights="none", width=64, extra=2, canonical=56, anchor_scale=2, ratios=[0.2, 0.5, 1, 2, 5],
                               rois=64, proposals=100, window=16, crop=[192, 384], batch=4, short_side=0,
                               scale=[0.8, 1.25], scale_things=[0.8, 1.25], jitter=0.1, lr=0.04, steps=850, warmup=50, drops=[0.6, 0.85], interval=50, eval_count=50, scenes=800)},
    "cityscapes": PAPER,
    "idd": PAPER,
    # Section 5.3: five aspect ratios, anchors of side 2 D, shortest side 1920 t with t in [0.8, 1.25], 192k steps.
    "mapillary": {**PAPER, **dict(extra=2, ratios=[0.2, 0.5, 1, 2, 5], anchor_scale=2, short_side=1920, scale=[0.8, 1.25],
                                  steps=192000, drops=[0.75, 176 / 192], crop=[1024, 1024], batch=8)},
    # Choice: no COCO recipe in the paper; Mask R-CNN's shortest side of 800 and one level more than Cityscapes.
    "coco": {**PAPER, **dict(extra=1, short_side=800, scale=[0.8, 1.25], crop=[640, 640], steps=90000)},
}
# AdaptIS, sections 6 and 7: Adam; rate 5e-5 for a pretrained backbone (`lr_body`), 1e-4 for the rest; random crops; six points a
# picture; R = 280 pixels; T = 0.40; 260 epochs in batches of 8 with drops after 240 and 255, then 10 for the proposals.
# The head sees as much of a whole picture as it saw of a crop: `point_window` is the crop.  Steps are epochs * pictures / batch.
# Choice: jitter of 0.2, heads of three layers and 64 channels, objects of 100 pixels at least, and up to 200 points in a row that
# find nothing; the text has no such numbers.  `per_round` is how many proposals run at once: speed, not result.  The other flags
# are those of the data set's recipe above.
POINTS = dict(sampler="uniform", crop=[400, 800], point_window=[400, 800], batch=8, scale=[0.2, 1.2], jitter=0.2, lr=1e-4, lr_body=5e-5, decay=0.0,
              steps=270 * 2975 // 8, warmup=0, drops=[240 / 260, 255 / 260], proposal_share=10 / 270, points=6, radius=280.0, threshold=0.40,
              per_round=8, patience=200, mask_loss="nfl", coordinates=True, head_width=64, head_blocks=3, min_area=100, flip_test=True)
ADAPTIS = {
    # A toy of a quarter of the size, from scratch: one rate for all.
    "street": {**POINTS, **dict(crop=[192, 384], point_window=[192, 384], batch=4, scale=[0.8, 1.25], jitter=0.1, lr=2e-3,
                                lr_body=2e-3, steps=850, warmup=50, drops=[0.6, 0.85], proposal_share=0.12, radius=70.0, head_width=32, min_area=16, flip_test=False)},
    "cityscapes": POINTS,
    "idd": POINTS,
    # Longest side 500 to 2200 in training and 2000 at test time (pictures are 4:3); 65 epochs of 18,000, drops after 50 and 60; mirrored only.
    "mapillary": {**POINTS, **dict(short_side=1500, scale=[0.25, 1.1], jitter=0.0, steps=75 * 18000 // 8, drops=[50 / 65, 60 / 65],
                                   proposal_share=10 / 75, threshold=0.35)},
    # Shortest side 350 to 700 in training and 600 at test time; 20 epochs of 118,000 in batches of 16, drops after 15 and 19; eight points.
    "coco": {**POINTS, **dict(short_side=600, scale=[350 / 600, 700 / 600], crop=[544, 544], point_window=[544, 544], jitter=0.0, batch=16,
                              steps=30 * 118000 // 16, drops=[0.75, 0.95], proposal_share=10 / 30, points=8, threshold=0.35)},
    # Choice: as the street, with the crops of the parking lot.
    "parking": {**POINTS, **dict(crop=[80, 160], point_window=[80, 160], batch=6, scale=[0.8, 1.25], jitter=0.0, lr=2e-3, lr_body=2e-3,
                                 steps=1280, warmup=50, drops=[0.6, 0.85], proposal_share=0.12, radius=40.0, head_width=32, min_area=16, flip_test=False)},
    # Section 6: 140 epochs of 10,000 pictures, random points, seven a round.  Choice: batches of 8, and a rate four times the paper's
    # 5e-4 that falls at the end; the paper names neither batch nor drops.
    "cells": {**POINTS, **dict(short_side=0, crop=[96, 96], point_window=[64, 64], sampler="full", scale=[1.0, 1.0],
                               scale_things=[1.0, 1.0], jitter=0.0, lr=2e-3, lr_body=2e-3, steps=140 * 10000 // 8, warmup=200, drops=[0.6, 0.85, 0.95], radius=48.0, threshold=0.5, per_round=7, patience=20,
                               proposal_share=0.0, head_width=32, head_blocks=3, min_area=30, flip_test=False)},
}
# The peers on cells: pictures enlarged four times as in the paper, anchors and levels for cells of 80 to 180 pixels.
RECIPES["cells"] = {**RECIPES["street"], **dict(method="adaptis", sampler="full", crop=[384, 384], short_side=384, scale=[1.0, 1.0],
                                                scale_things=[1.0, 1.0], canonical=112, anchor_scale=8, extra=0, ratios=[0.33, 1, 3],
                                                rois=128, proposals=200, jitter=0.0, batch=4, steps=137500, lr=0.02, drops=[35 / 55, 45 / 55], scenes=10000, eval_count=200)}
# The scenes of ibs.py: the crop has the share of the picture that 640x1280 has of Cityscapes's.
RECIPES["parking"] = {**RECIPES["street"], **dict(method="ibs", body="tiny", extra=0, canonical=28, crop=[80, 160], batch=6, jitter=0.0, steps=1280,
                                                  warmup=50, drops=[0.65, 0.9], scenes=400, eval_count=100, interval=100)}
# Li et al. 2020, section 4 and appendix B: 65k steps of 32 crops, drops after 40k and 55k, warm-up of 500 steps from a third, relighting
# ("a small amount": a jitter of 0.2 and a twentieth of the colour circle are ours); loss weights of detection, semantics, panoptic;
# variant B; Lovász losses.  Random crops and the standard box loss: the paper knows neither ISUS nor CABB.
LI = dict(sampler="uniform", box_loss="standard", jitter=0.2, hue=0.05, batch=32, steps=65000, warmup=500,
          drops=[40 / 65, 55 / 65], loss_weights=[0.25, 1.0, 1.0], semantic_loss="lovasz", roi_mask_loss="lovasz", excitation=True, variant="B",
          affinity_channels=128, masks=True, affinity=True, end_to_end="all", true_boxes=False, reading="affinity")
PLAIN = {**LI, **dict(semantic_loss="cross-entropy")}          # A.1: "supervised by a cross-entropy loss, unless otherwise stated"
# Choice: on the toy street variant C and a quarter of the panoptic weight.  Its things are small, V knows little of them (the paper's
# reason for C on COCO), and in a few hundred steps from scratch the panoptic loss costs detection the more, the more it weighs.
STREET = {**PLAIN, **dict(roi_mask_loss="bce", batch=4, jitter=0.1, hue=0.0, lr=0.04, steps=850, warmup=50,
                          drops=[0.6, 0.85], loss_weights=[1.0, 1.0, 0.25], variant="C", affinity_channels=64)}
AFFINITY = {
    "street": STREET,
    "parking": {**STREET, **dict(batch=6, jitter=0.0, steps=1280)},
    "cells": {**STREET, **dict(sampler="full", jitter=0.0, steps=137500, lr=0.02, drops=[35 / 55, 45 / 55])},
    "cityscapes": LI,
    # Choice: no recipe for these two in the paper: Cityscapes's, and on Vistas the steps of Seamless's, in its batches.
    "idd": LI,
    "mapillary": {**LI, **dict(batch=8, steps=192000, drops=[0.75, 176 / 192])},
    # Whole pictures of shortest side 800, mirrored only; 200k steps, rate 0.02, drops after 150k and 190k; variant C; cut-off 0.75.
    # Choice: batches of 16; the longest side is not held under 1333, which only very long pictures would notice.
    "coco": {**PLAIN, **dict(sampler="full", short_side=800, scale=[1.0, 1.0], scale_things=[1.0, 1.0], jitter=0.0, batch=16, lr=0.02, steps=200000,
                             drops=[0.75, 0.95], loss_weights=[1.0, 0.2, 0.1], variant="C", score_threshold=0.75)},
}
# De Geus and Dubbelman 2023, section 5.2.  Kernels (Panoptic FCN): Cityscapes 65k steps of 32 crops of 512x1024, Vistas 150k of 32
# crops of 1024x1024, shortest side 1024 to 2048.  Queries (Mask2Former): 90k and 300k steps of 16 such crops.  Table 3's rows:
# `--sampler full --batch 4 --steps 100000 --ibs-weight 0` (Vistas: --batch 8 --steps 150000), `--sampler uniform --ibs-weight 0`,
# `--sampler uniform`, and the default.  Section 6.4: `--embeddings queries --things-only --dataset mapillary`.
# Choice: what the text leaves to the two networks' own papers is as commonly known of them: polynomial decay with power 0.9; for
# queries AdamW, a tenth of the rate for the ResNet, nothing frozen.  The weight of IBS is 1 (the text has none; the parking lot
# wants 2), and Vistas is evaluated at the upper end of its scales.  IDD and COCO, not in the paper, are trained as Cityscapes.
KERNELS = dict(embeddings="kernels", ibs_weight=1.0, embedding_channels=64, sampler="paired", batch=32, lr=0.02, steps=65000, warmup=1000,
               poly=0.9, scale=[0.5, 2.0], scale_things=[0.5, 2.0], score_threshold=0.3, overlap=0.5, queries=100, outside=False,
               things_only=False)
QUERIES = dict(embeddings="queries", embedding_channels=256, batch=16, lr=1e-4, lr_body=1e-5, decay=0.05, clip=0.01, warmup=0, frozen=0,
               steps=90000, score_threshold=0.8, overlap=0.8)
IBS = {
    "street": {**KERNELS, **dict(batch=4, lr=0.04, steps=850, warmup=50, poly=0.0, drops=[0.6, 0.85], scale=[0.8, 1.25], scale_things=[0.8, 1.25],
                                 embedding_channels=32)},
    "cityscapes": KERNELS,
    "idd": KERNELS,
    "mapillary": {**KERNELS, **dict(steps=150000, short_side=2048, scale=[0.5, 1.0], scale_things=[0.5, 1.0], crop=[1024, 1024])},
    "coco": KERNELS,
    "parking": {**KERNELS, **dict(batch=6, lr=0.04, steps=1280, warmup=50, poly=0.0, drops=[0.65, 0.9], scale=[0.8, 1.25],
                                  scale_things=[0.8, 1.25], embedding_channels=32, ibs_weight=2.0)},
    "cells": {**KERNELS, **dict(batch=4, steps=137500, embedding_channels=32, scale=[1.0, 1.0], scale_things=[1.0, 1.0])},
}
IBS_QUERIES = {
    "street": {**QUERIES, **dict(batch=4, lr=1e-3, lr_body=1e-3, steps=850, warmup=50, poly=0.0, drops=[0.6, 0.85], clip=1.0,
                                 embedding_channels=64, score_threshold=0.5, overlap=0.5, queries=60)},
    "cityscapes": QUERIES,
    "idd": QUERIES,
    "mapillary": {**QUERIES, **dict(steps=300000)},
    "coco": QUERIES,
    "parking": {**QUERIES, **dict(batch=6, lr=1e-3, lr_body=1e-3, steps=1280, warmup=50, poly=0.0, drops=[0.65, 0.9], clip=1.0,
                                  embedding_channels=64, score_threshold=0.5, overlap=0.5, queries=60)},
    "cells": {**QUERIES, **dict(batch=4, lr_body=1e-4, steps=137500, embedding_channels=64)},
}
OF_METHODS = {"adaptis": ADAPTIS, "affinity": AFFINITY, "ibs": IBS}      # laid over the recipe of the data set
SPLITS = {"cityscapes": ("train", "val"), "idd": ("train", "val"), "coco": ("train2017", "val2017"), "mapillary": ("training", "validation")}


def open_dataset(args, train):
    """The data set of `args`, its training or its evaluation part."""
    if args["dataset"] == "street":
        # Training never meets the evaluation's scenes: they come from another seed.
        return Remembered(data.StreetScenes(args["scenes"], seed=1)) if train else data.StreetScenes(args["eval_count"] or 50, seed=0)
    if args["dataset"] == "cells":
        return adaptis.OverlappingCells(args["scenes"], seed=1) if train else adaptis.OverlappingCells(2000, seed=0)
    if args["dataset"] == "parking":
        return Remembered(ibs.Parking(args["scenes"], seed=1)) if train else ibs.Parking(args["eval_count"] or 100, seed=0)
    if not args.get("root"):
        raise UserError(f"--dataset {args['dataset']} needs --root DIR, the folder of the data set")
    split = args.get("train_split" if train else "val_split") or SPLITS[args["dataset"]][0 if train else 1]
    if args["dataset"] in ("cityscapes", "idd"):
        return data.Cityscapes(args["root"], split, table=args["dataset"])
    return data.CocoPanoptic(args["root"], split)


def input_size(size, short_side):
    """(height, width) scaled so that the shorter measures `short_side` pixels; unchanged for 0."""
    f = short_side / min(size) if short_side else 1
    return tuple(max(1, round(n * f)) for n in size)


class Remembered:
    """A toy data set whose pictures are drawn once and then kept, as bytes: drawing costs more than a training step has to spare."""

    def __init__(self, dataset):
        self.dataset, self.categories, self.kept = dataset, dataset.categories, {}

    def __len__(self):
        return len(self.dataset)

    def keep(self, i, s):
        self.kept[i] = (s.image * 255).round().to(torch.uint8), s.segments.to(torch.uint8), s.categories, s.crowd, s.name

    def fill(self, processes):
        """Draw everything now, with helpers, so that the processes that load crops later share it."""
        for i, s in enumerate(DataLoader(self.dataset, batch_size=None, num_workers=processes, generator=torch.Generator()) if not self.kept else ()):
            self.keep(i, s)

    def parts(self, i):
        if i not in self.kept:
            self.keep(i, self.dataset[i])
        return self.kept[i]

    def labels(self, i):
        _, segments, categories, crowd, _ = self.parts(i)
        return segments.long(), categories, crowd

    def __getitem__(self, i):
        image, segments, *rest = self.parts(i)
        return data.Sample(image.float() / 255, segments.long(), *rest)


# --- From pictures to batches ---------------------------------------------------------------------------------------------

def build_sampler(dataset, args, world, folder, start):
    """The supply of crops, from crop number `start` on, for the network's own levels.  Labels on disk are read once: their index is
    kept beside the runs."""
    index, cache, share = None, None, (0, 1, 0)
    if isinstance(dataset, Remembered):
        dataset.fill(os.cpu_count() if args["workers"] else 0)
    else:
        folder.parent.mkdir(parents=True, exist_ok=True)
        cache = folder.parent / f"index-{args['dataset']}-{args['train_split'] or 'train'}.pt"
        share = world.rank, world.size, args["workers"]
    if args["sampler"] == "paired" and args["batch"] // world.size % 2:
        raise UserError(f"--sampler paired: {args['batch'] // world.size} crops a process are not made of pairs; take an even number")
    colour = functools.partial(data.colour_jitter, strength=args["jitter"], hue=args["hue"]) if args["jitter"] else None
    try:
        if args["sampler"] in ("isus", "cus", "paired"):
            index = isus.build_index(dataset, cache, *share)
        if args["sampler"] == "paired":
            return ibs.PairedCropSampler(dataset, args["crop"], args["short_side"], args["scale"], args["seed"], start // 2, world.rank,
                                         world.size, args["flip"], colour, index)
        return isus.CropSampler(dataset, args["crop"], args["sampler"], args["short_side"], args["scale_things"], args["scale"], args["seed"],
                                start, world.rank, world.size, canonical=args["canonical"], flip=args["flip"], augment=colour, index=index)
    except ValueError as e:
        raise e if isinstance(e, data.DataError) else UserError(f"--sampler {args['sampler']}: {e}") from e


def draw_crops(loader, count):
    """`count` crops from a loader that gives one or a pair at a time."""
    crops = []
    while len(crops) < count:
        item = next(loader)
        crops += [item] if isinstance(item[0], torch.Tensor) else item
    return crops


def collate(crops):
    """Crops -> images [B, 3, H, W] and targets; whole pictures of different sizes are padded with void at the right and below."""
    h, w = (max(image.shape[d] for image, _ in crops) for d in (1, 2))
    images = torch.stack([F.pad(i, (0, w - i.shape[2], 0, h - i.shape[1])) for i, _ in crops])
    for image, t in crops:
        t.segments = F.pad(t.segments, (0, w - image.shape[2], 0, h - image.shape[1]))
    return images, [t for _, t in crops]


# --- Methods --------------------------------------------------------------------------------------------------------------

def build_body(args):
    """The one backbone and pyramid that every method stands on."""
    weights = args["weights"]
    state = {"none": None, "imagenet": "IMAGENET1K_V1"}[weights] if weights in ("none", "imagenet") else load_file(weights)
    try:
        return seamless.resnet_fpn(args["body"], args["width"], args["extra"], state, args["frozen"], args["frozen"] > 0, args["excitation"])
    except OSError as e:
        raise UserError(f"the ImageNet weights of {args['body']} could not be downloaded ({e}); fetch the file that torchvision names "
                        "on a machine with a network and pass it with --weights FILE, or train from scratch with --weights none") from e
    except RuntimeError as e:
        raise UserError(f"{weights}: these are not the weights of {args['body']}: {str(e).splitlines()[0]}") from e
    except ValueError as e:
        raise UserError(str(e)) from e


def build_seamless(categories, args):
    """Seamless (2019); its head widths follow the pyramid's: 256 channels give the paper's 256, 1024, 256 and 128."""
    c = args["width"]
    return seamless.Seamless([k.isthing for k in categories], build_body(args), BOX_LOSSES[args["box_loss"]], args["canonical"],
                             args["anchor_scale"], args["ratios"], c, 4 * c, c, c // 2, args["window"], score_threshold=args["score_threshold"],
                             samples=(256, args["rois"]), after=(2 * args["proposals"], args["proposals"]), stuff_area=args["stuff_area"],
                             semantic_loss=SEMANTIC_LOSSES[args["semantic_loss"]], mask_loss=ROI_MASK_LOSSES[args["roi_mask_loss"]],
                             masks=args.get("masks", True))


class Affinity(nn.Module):
    """The affinity head on Seamless's boxes, masks and semantic probabilities: a channel an object and argmax, no rules.

    Deviation: all that stands before the head is Seamless's, so that methods here differ in one idea: MiniDL with batch norms
    where the paper's semantic submodule has group norms, and Seamless's proposal and region heads for its Mask R-CNN's.

    `masks`, `affinity`, `end_to_end`, `true_boxes` and `reading` are the rows of the paper's ablations: end_to_end "all" lets the
    panoptic loss train everything, "head" the affinity head alone, "none" leaves it out.

    Choice: the head trains on the detections that inference takes, those above `score_threshold`.  Matching looks at boxes
    only: among all above 0.05 it may pick one of score 0.1 over one of 0.9 that fits slightly worse, and the loss would then
    lower the 0.9."""

    def __init__(self, categories, args):
        super().__init__()
        if args["affinity"] and args["end_to_end"] == "none":
            raise UserError("--end-to-end none: nothing would train the affinity head; add --no-affinity, or let it be head or all")
        if not args["affinity"] and args["end_to_end"] == "head":
            raise UserError("--end-to-end head: --no-affinity leaves no head to train; let it be all or none")
        if args["variant"] == "A" and not args["masks"]:
            raise UserError("--variant A adds the logits of masks, and --no-masks leaves them out; take --variant B")
        self.base = build_seamless(categories, args)
        self.head = affinity_head.InstanceAffinityHead(args["width"], args["affinity_channels"]) if args["affinity"] else None
        self.weights, self.variant, self.reading = args["loss_weights"], args["variant"], args["reading"]
        self.end_to_end, self.true_boxes, self.proposals = args["end_to_end"], args["true_boxes"], args["proposals"]

    def potential(self, found, logits, size):
        """Detections and semantic logits [C, h, w] of an image of `size` -> potential [K, h, w], category of each channel [K]."""
        raw = self.variant == "A"                                        # on logits
        v = logits.float() if raw else logits.float().softmax(0)
        (h, w), (height, width) = v.shape[1:], size
        # A side of 1026 has 257 cells that share it: pixels as they would be if it had 1028.
        boxes = found["boxes"] * found["boxes"].new_tensor([4 * w / width, 4 * h / height] * 2)
        masks = affinity_head.paste(found["masks"], boxes, (h, w)) if "masks" in found else None
        return affinity_head.dynamic_potential(v, boxes, found["scores"], found["categories"], self.base.isthing, 4,
                                               masks if raw or masks is None else masks.sigmoid(), self.variant)

    def truth(self, features, targets):
        """The true boxes as detections of score 1 (appendix A.4's other way to train)."""
        found = []
        for t in targets:
            _, boxes, _, categories = seamless.thing_truth(t, self.base.isthing)
            found.append({"boxes": boxes.float(), "scores": boxes.new_ones(len(boxes), dtype=torch.float32), "categories": categories})
        if self.base.region_head.mask is not None:
            classes = [self.base.thing_index[f["categories"]] for f in found]
            for f, m in zip(found, self.base.region_head.masks(features, [f["boxes"] for f in found], classes)):
                f["masks"] = m
        return found

    def losses(self, images, targets):
        size, features = images.shape[-2:], self.base.body(images)
        losses, proposals, logits = self.base.learn(features, targets, size)
        detection, semantic, panoptic = self.weights
        losses = {k: v * (semantic if k == "semantic" else detection) for k, v in losses.items()}
        if self.end_to_end == "none":
            return losses
        found = (self.truth(features, targets) if self.true_boxes else
                 self.base.detect(features, size, [p[:self.proposals] for p in proposals], self.base.score_threshold))
        potentials = [self.potential(f, v, size)[0] for f, v in zip(found, logits)]
        if self.end_to_end == "head":
            features, potentials = {s: f.detach() for s, f in features.items()}, [p.detach() for p in potentials]
        if self.head is not None:
            potentials = self.head(features, potentials)
        scale = 1.0 if self.variant == "A" else 10.0                     # A is made of logits
        each = [affinity_head.panoptic_matching_loss(p, f["boxes"], f["categories"], t, self.base.isthing, scale)
                for p, f, t in zip(potentials, found, targets)]
        return {**losses, "panoptic": panoptic * sum(each) / len(each)}

    @torch.no_grad()
    def readings(self, image, size=None, names=("heuristic", "filled", "argmax", "affinity")):
        """image [3, H, W] -> {name: Prediction at `size`}, small stuff not trimmed: what Seamless's rules, the argmax over the
        potential and the argmax over the head's answer make of the same boxes, masks and semantic logits.  The rules may say
        "void" where the likeliest category is a thing that nobody detected, an argmax may not; "filled" are the rules without
        this way out: such pixels take the likeliest stuff."""
        own, isthing, threshold = image.shape[-2:], self.base.isthing, self.base.score_threshold
        size = tuple(size or own)
        features = self.base.body(image[None])
        found, logits = self.base.detect(features, own)[0], self.base.semantic_head(features)
        boxes = found["boxes"] * found["boxes"].new_tensor([size[1] / own[1], size[0] / own[0]] * 2)
        logits_here = seamless.resize_logits(logits.float(), size)[0]
        semantic = logits_here.argmax(0)
        if "masks" in found:
            masks = seamless.paste_masks(found["masks"], boxes, size)
        else:                                                            # the mask of a box: its category's pixels in it
            rows, columns = affinity_head.box_gate(boxes, size, 1)
            masks = rows[:, :, None] & columns[:, None, :] & (semantic == found["categories"][:, None, None])
        instances = {**found, "boxes": boxes, "masks": masks}
        sure = {k: v[found["scores"] >= threshold] for k, v in found.items()}
        result = {}
        for name in names:
            if name in ("heuristic", "filled"):
                rest = semantic if name == "heuristic" else logits_here.masked_fill(isthing[:, None, None], -torch.inf).argmax(0)
                fused = seamless.fuse(masks, found["scores"], found["categories"], rest, isthing, threshold, stuff_area=0)
            else:
                psi, channels = self.potential(sure, logits[0], own)
                if name == "affinity" and self.head is not None:
                    psi = self.head(features, [psi])[0]
                fused = affinity_head.segment(psi, channels, sure["scores"], size)
            result[name] = seamless.Prediction(*fused, instances)
        return result

    def trim(self, prediction):
        """Appendix C, as every other method here does it: no stuff of fewer than `stuff_area` pixels of a 1024x2048 picture."""
        area = self.base.stuff_area * prediction.segments.numel() / (1024 * 2048)
        return seamless.Prediction(*affinity_head.trim_small_stuff(*prediction[:3], self.base.isthing, area), prediction.instances)

    def predict(self, image, size=None):
        return self.trim(self.readings(image, size, (self.reading,))[self.reading])


class Unified(ibs.UnifiedNet):
    """Embeddings times features, with intra-batch supervision unless its weight is 0; queries learn by AdamW."""

    def __init__(self, categories, args):
        how = dict(canonical=args["canonical"])
        if args["embeddings"] == "queries":
            how = dict(queries=args["queries"], outside=args["outside"], things_only=args["things_only"])
        super().__init__([k.isthing for k in categories], build_body(args), args["embeddings"], args["embedding_channels"], args["ibs_weight"],
                         args["sampler"] == "paired", args["score_threshold"], args["overlap"], args["stuff_area"], **how)
        if args["embeddings"] == "queries":
            def groups():                                                     # the backbone learns at a rate of its own
                body = {id(p) for p in self.body.stages.parameters()}
                return [{**g, "params": [p for p in g["params"] if (id(p) in body) == mine], "lr": args["lr_body" if mine else "lr"]}
                        for g in parameter_groups(self, args) for mine in (True, False)]
            self.stages = lambda: [("all", groups(), lambda g: torch.optim.AdamW(g, args["lr"], weight_decay=args["decay"]), 1.0)]


class MaskRCNN(nn.Module):
    """torchvision's own Mask R-CNN on the same body, stuff by the same semantic head, fused by the same rule: the peer."""

    def __init__(self, categories, args):
        super().__init__()
        from torchvision.models.detection import MaskRCNN as Peer
        from torchvision.models.detection.rpn import AnchorGenerator
        self.body, c = build_body(args), args["width"]
        self.body.out_channels = c
        self.register_buffer("isthing", torch.tensor([k.isthing for k in categories]), persistent=False)
        strides, levels = self.body.strides, [str(i) for i in range(4)]
        anchors = AnchorGenerator(tuple((args["anchor_scale"] * s,) for s in strides), (tuple(args["ratios"]),) * len(strides))
        pool = [torchvision.ops.MultiScaleRoIAlign(levels, size, 2, canonical_scale=args["canonical"]) for size in (7, 14)]
        d = torchvision.models.detection
        classes = int(self.isthing.sum()) + 1                            # 0 is the background
        peer = Peer(self.body, None, rpn_anchor_generator=anchors, box_roi_pool=pool[0], mask_roi_pool=pool[1],
                    box_head=d.faster_rcnn.TwoMLPHead(c * 49, 4 * c), box_predictor=d.faster_rcnn.FastRCNNPredictor(4 * c, classes),
                    mask_head=d.mask_rcnn.MaskRCNNHeads(c, (c,) * 4, 1), mask_predictor=d.mask_rcnn.MaskRCNNPredictor(c, c, classes),
                    rpn_post_nms_top_n_train=2 * args["proposals"], rpn_post_nms_top_n_test=args["proposals"],
                    box_batch_size_per_image=args["rois"])
        self.rpn, self.roi_heads = peer.rpn, peer.roi_heads
        self.semantic_head = seamless.SemanticHead(c, len(categories), c // 2, args["window"])
        self.stuff_area = args["stuff_area"]

    def instances(self, images, features, targets=None):
        """torchvision's two heads on our features -> (detections, losses)."""
        named = {str(i): f.float() for i, f in enumerate(features.values())}
        batch = d = torchvision.models.detection.image_list.ImageList(images, [tuple(images.shape[-2:])] * len(images))
        with torch.autocast(images.device.type, enabled=False):          # its box coding and losses want float32
            proposals, rpn = self.rpn(batch, named, targets)
            found, roi = self.roi_heads(named, proposals, d.image_sizes, targets)
        return found, {**rpn, **roi}

    def losses(self, images, targets):
        features = self.body(images)
        things = []
        for t in targets:
            ids, boxes, _, category = seamless.thing_truth(t, self.isthing)
            labels = (self.isthing.long().cumsum(0))[category]
            things.append({"boxes": boxes, "labels": labels, "masks": (t.segments == ids[:, None, None]).to(torch.uint8)})
        logits = seamless.resize_logits(self.semantic_head(features).float(), images.shape[-2:])
        truth = torch.stack([seamless.semantic_target(t) for t in targets])
        return {**self.instances(images, features, things)[1], "semantic": seamless.hardest_pixels_loss(logits, truth)}

    @torch.no_grad()
    def predict(self, image, size=None):
        features, own = self.body(image[None]), image.shape[-2:]
        found = self.instances(image[None], features)[0][0]
        found["categories"] = torch.where(self.isthing)[0][found.pop("labels") - 1]
        found["masks"] = torch.logit(found["masks"][:, 0], 1e-6)         # torchvision gives probabilities
        return seamless.assemble(found, self.semantic_head(features), own, size or own, self.isthing, stuff_area=self.stuff_area)


class Fused(nn.Module):
    """One map at stride 4, as AdaptIS wants it: the pyramid's levels up to stride 32, enlarged and added up."""

    def __init__(self, body):
        super().__init__()
        self.body, self.stride, self.channels = body, 4, body.channels

    def forward(self, images):
        first, *coarser = [m for stride, m in sorted(self.body(images).items()) if stride <= 32]
        return sum((F.interpolate(m, first.shape[-2:], mode="bilinear") for m in coarser), first)


def build_adaptis(categories, args):
    """AdaptIS; on cells with its own U-Net and random points, elsewhere on the pyramid and with the point proposal branch."""
    toy = args["dataset"] == "cells"
    encoder = adaptis.UNet() if toy else Fused(build_body(args))
    return adaptis.AdaptIS([k.isthing for k in categories], encoder, args["head_width"], args["head_blocks"], args["point_window"], args["radius"],
                           args["points"], MASK_LOSSES[args["mask_loss"]], not toy, args["threshold"], args["per_round"], args["patience"],
                           args["min_area"], 0 if toy else args["stuff_area"], args["flip_test"], (args["lr_body"], args["lr"]),
                           args["proposal_share"], args["coordinates"])


def known_cross_entropy(logits, target):
    """Cross entropy, mean over the pixels that are not void; 0 with gradients where all are."""
    total = F.cross_entropy(logits.float(), target, ignore_index=seamless.IGNORE, reduction="sum")
    return total / (target != seamless.IGNORE).sum().clamp(min=1)


# (categories, args) -> a module that keeps the protocol above
METHODS = {"seamless": build_seamless, "adaptis": build_adaptis, "affinity": Affinity, "ibs": Unified, "maskrcnn": MaskRCNN}
SEMANTIC_LOSSES = {"hardest": seamless.hardest_pixels_loss, "cross-entropy": known_cross_entropy, "lovasz": affinity_head.lovasz_softmax}
ROI_MASK_LOSSES = {"bce": F.binary_cross_entropy_with_logits, "lovasz": affinity_head.lovasz_hinge}
MASK_LOSSES = {"nfl": adaptis.normalized_focal_loss, "focal": adaptis.focal_loss, "bce": adaptis.binary_cross_entropy}
BOX_LOSSES = {"cabb": cabb_loss.cabb_loss, "standard": cabb_loss.box_loss}   # (deltas, gt, anchors, beta, crop_size, truncated) -> [N]
SAMPLERS = (*isus.MODES, "paired")                                                         # which crops to train on


# --- Where it runs --------------------------------------------------------------------------------------------------------

class World:
    """Device, precision and the other processes.  One process: rank 0 of 1."""

    def __init__(self, args):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        cuda = torch.cuda.is_available() and args["device"] != "cpu"
        if args["device"] == "cuda" and not cuda:
            raise UserError("--device cuda: no CUDA device was found; leave --device away to use the CPU")
        if args["threads"]:
            torch.set_num_threads(args["threads"])
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo")
        # bf16 is two to three times as fast where the processor multiplies it in hardware, and slower where it does not.
        fast = cuda or (hasattr(torch.cpu, "_is_avx512_bf16_supported") and torch.cpu._is_avx512_bf16_supported())
        # A level of one pixel is left to float32 on a CPU: oneDNN returns garbage as the bf16 gradient of a strided convolution there.
        tiny = not cuda and max(args["crop"]) <= 32 << args["extra"]
        self.bf16 = args["precision"] == "bf16" or (args["precision"] == "auto" and fast and not tiny)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def memory(self):
        """Peak memory in GiB: of the GPU, or of this process on a CPU."""
        return (torch.cuda.max_memory_allocated() if self.device.type == "cuda" else
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2**30

    def agree(self, value):
        """Rank 0's value, on every rank."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def barrier(self):
        if self.size > 1:
            dist.barrier()

    def say(self, *text):
        if self.rank == 0:
            print(*text, flush=True)


# --- Checkpoints ----------------------------------------------------------------------------------------------------------

def save_checkpoint(path, state):
    """Written beside and moved into place: whoever is killed on the way leaves the previous file whole."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def load_file(path):
    """torch.load for files of tensors and plain values only, with one clear sentence if that fails."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        raise UserError(f"{path} cannot be read as a checkpoint; it is damaged, cut short or something else ({type(e).__name__}): "
                        "take another copy") from e


def load_checkpoint(path, explicit):
    """-> the checkpoint and the arguments of its run, the `explicit` flags of this command over them."""
    state = load_file(path)
    if not (isinstance(state, dict) and {"model", "args", "step", "categories"} <= state.keys()):
        raise UserError(f"{path} is no checkpoint of train.py; give the last.pt of a run's folder")
    for flag in ("method", "body"):
        if explicit.get(flag, state["args"][flag]) != state["args"][flag]:
            raise UserError(f"{path} was trained with --{flag} {state['args'][flag]}, not {explicit[flag]}; leave --{flag} away or train anew")
    new = settings({k: state["args"][k] for k in ("dataset", "method", "embeddings") if k in state["args"]})     # flags younger than the checkpoint
    return state, {**new, **state["args"], **explicit}


def restore_model(state, args, categories, path):
    """The trained model; refuses to read one set of categories as another."""
    known = [c[0] for c in state["categories"]]
    if known != [k.name for k in categories]:
        raise UserError(f"{path} knows {len(known)} categories ({', '.join(known[:4])}, ...), --dataset "
                        f"{args['dataset']} has {len(categories)} ({', '.join(k.name for k in categories[:4])}, ...); "
                        "evaluate it on its own data set")
    model = METHODS[args["method"]](categories, {**args, "weights": "none"})
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as e:
        raise UserError(f"{path} holds another network than these flags ask for: leave those of the model away (--reading argmax reads "
                        "an affinity checkpoint without its head)") from e
    return model


# --- Evaluation on full images --------------------------------------------------------------------------------------------

def stride4_ceiling(sample, size):
    """The ground truth squeezed through a stride-4 output of an input of `size` and back, segments [H, W]: nobody who predicts
    at stride 4 can be expected to do better.  Shares of each segment in 4x4 cells, bilinear, argmax."""
    small = F.interpolate(sample.segments[None, None].float(), size=size, mode="nearest-exact")[0, 0].long()
    best, out = torch.full(sample.segments.shape, -1.0), torch.zeros_like(sample.segments)
    for k in range(len(sample.categories) + 1):
        share = F.avg_pool2d((small == k)[None, None].float(), 4, ceil_mode=True)
        share = F.interpolate(share, size=sample.segments.shape, mode="bilinear", align_corners=False)[0, 0]
        out, best = torch.where(share > best, k, out), torch.maximum(share, best)
    return out


CONFUSION = range(5, 96, 5)              # the thresholds T, in percent, of Figure 5 of de Geus and Dubbelman


@torch.no_grad()
def evaluate(model, dataset, args, world, folder, references=False):
    """Every full image, resized to the training's scale, predicted at its native size -> metrics (the same on any number of
    ranks).  Writes predictions in COCO panoptic format and a picture of a few.  `references` adds the stride-4 ceiling (up to a
    hundred pictures) and, on the toy street, the colour baseline."""
    model.eval()
    isthing = torch.tensor([k.isthing for k in dataset.categories])
    scores = {"model": PanopticQuality(isthing), **{kind: AveragePrecision(len(isthing), kind=kind) for kind in ("mask", "box")}}
    count = min(args["eval_count"] or len(dataset), len(dataset))
    references = references and count <= 100           # the ceiling looks at every segment of a picture, which takes its time
    baseline = data.ColourBaseline(open_dataset(args, True)) if references and args["dataset"] == "street" else None
    if references:
        scores.update(ceiling=PanopticQuality(isthing), **({"baseline": PanopticQuality(isthing)} if baseline else {}))
    mine = range(world.rank, count, world.size)
    loader = DataLoader(torch.utils.data.Subset(dataset, mine), batch_size=None, num_workers=args["workers"], generator=torch.Generator())
    annotations, shown, seconds = [], [], 0.0
    confused = torch.zeros(2, len(CONFUSION), dtype=torch.int64)              # predictions that are confused at T, and all
    overlapping, sure = torch.zeros(6, dtype=torch.int64), args.get("score_threshold", 0.0)
    ids, image_ids = getattr(dataset, "category_ids", None), getattr(dataset, "image_ids", {})      # an evaluation server wants its own
    pictures = folder / "predictions"
    pictures.mkdir(parents=True, exist_ok=True)
    for sample in loader:
        native = tuple(sample.image.shape[1:])
        image = data.resize(sample, input_size(native, args["short_side"])).image
        started = time.time()
        with world.autocast():
            p = model.predict(image.to(world.device), native)
        p = seamless.Prediction(*(v.cpu() for v in p[:3]), {k: v.cpu() for k, v in p.instances.items()})
        seconds += time.time() - started
        truth = (sample.segments, sample.categories, sample.crowd)
        scores["model"].update(p.segments, p.categories, *truth)
        for kind, key in (("mask", "masks"), ("box", "boxes")):
            found = [p.instances[k] for k in (key, "scores", "categories")]
            scores[kind].update(*found, *truth, isthing=isthing)
        confused += torch.stack(confusion_ratio(p.segments, p.categories, *truth[:2], isthing, CONFUSION, sample.crowd))
        if args["method"] == "ibs":       # section 6.4: its masks overlap before they are merged.  Choice: those above the cut-off
            sure_ones = p.instances["scores"] > sure
            masks, values, kinds = (p.instances[k][sure_ones] for k in ("masks", "scores", "categories"))
            overlapping[:3] += instance_pixels(masks, values, kinds, *truth[:2], isthing, sample.crowd)
            overlapping[3:5] += torch.cat(confusion_ratio(masks, kinds, *truth[:2], isthing, [25], sample.crowd))
            overlapping[5] += len(masks)
        if references:
            scores["ceiling"].update(stride4_ceiling(sample, image.shape[1:]), sample.categories, *truth)
        if baseline:
            scores["baseline"].update(*baseline.predict(sample.image), *truth)
        annotations.append(data.write_annotation(pictures, sample.name, p.segments, p.categories, None, ids, image_ids.get(sample.name)))
        if world.rank == 0 and len(shown) < 4:
            shown.append((sample, p))
    for score in scores.values():
        score.all_reduce()
    if world.size > 1:
        parts = [None] * world.size
        dist.all_gather_object(parts, annotations)
        annotations = [a for part in parts for a in part]
        counts = torch.cat([confused.flatten(), overlapping]).to(world.device)
        dist.all_reduce(counts)
        confused, overlapping = counts[:-6].cpu().view(2, -1), counts[-6:].cpu()
    result = scores["model"].compute()
    result["confusion"] = dict(zip(map(str, CONFUSION), (100 * confused[0] / confused[1].clamp(min=1)).tolist()))
    if args["method"] == "ibs":
        right, true, predicted, c, n, named = overlapping.tolist()
        result["instances"] = {"Acc_th": 100 * right / max(true, 1), "Prec_th": 100 * right / max(predicted, 1), "confusion": 100 * c / max(n, 1),
                               "things a picture": named / count, "empty ones": (named - n) / count}
    result |= {"AP_mask": scores["mask"].compute(), "AP_box": scores["box"].compute(), "images": count,
               "images_per_second": len(mine) * world.size / max(seconds, 1e-9)}
    result |= {name: scores[name].compute()["PQ"] for name in ("ceiling", "baseline") if name in scores}
    if world.rank == 0:
        data.write_panoptic_json(folder / "predictions", annotations, dataset.categories, ids)
        draw_predictions(folder / "predictions.png", shown, dataset.categories)
        (folder / "metrics.json").write_text(json.dumps(result, indent=1, default=float))
        print(scores["model"].table([k.name for k in dataset.categories]))
        a, b = result["AP_mask"], result["AP_box"]
        sizes = ", ".join(f"{k} {a['AP_' + k]:.1f}" for k in ("small", "medium", "large"))
        print(f"mask AP {a['AP']:.1f} (AP50 {a['AP50']:.1f}, {sizes})   box AP {b['AP']:.1f}   "
              f"on {count} images, {result['images_per_second']:.2f} a second")
        print("confused things, %, at T = " + ", ".join(f"{t} {v:.1f}" for t, v in result["confusion"].items()))
        if "instances" in result:
            v = result["instances"]
            print(f"masks before merging: Acc_th {v['Acc_th']:.1f}   Prec_th {v['Prec_th']:.1f}   confused at T = 25 {v['confusion']:.1f}%   "
                  f"{v['things a picture']:.1f} things a picture, {v['empty ones']:.1f} of them without a pixel")
        if args["dataset"] == "cells":
            print("mask AP at an IoU of " + ", ".join(f".{t // 10} {v:.1f}" for t, v in table1(a).items()))
        if "ceiling" in result:
            print(f"PQ {result['PQ']:.1f}   stride-4 ceiling {result['ceiling']:.1f}"
                  + (f"   colour baseline {result['baseline']:.1f}" if "baseline" in result else ""))
    world.barrier()
    return result


def paired_interval(a, b, isthing, key="PQ", draws=2000, seed=0):
    """How sure is the difference of two readings of the SAME pictures?  a, b: a PanopticQuality's sums for each picture, in the same
    order -> (difference a - b of `key` over all pictures, its 2.5% and 97.5% points over `draws` resamplings of the pictures).
    `key` is one of PQ, SQ, RQ and their kin: the confusion of pixels, a large matrix a picture, is left out."""
    stacked = [{k: torch.stack([sums[k] for sums in side]) for k in side[0] if k != "pixels"} for side in (a, b)]

    def difference(weight):                                    # how often each picture counts [n]
        values = []
        for side in stacked:
            score = PanopticQuality(isthing)
            score.sums |= {k: torch.tensordot(weight, v, 1) for k, v in side.items()}
            values.append(score.compute()[key])
        return values[0] - values[1]
    n = len(a)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.tensor([difference(torch.bincount(torch.randint(n, (n,), generator=generator), minlength=n).double())
                          for _ in range(draws)], dtype=torch.float64)
    return difference(torch.ones(n, dtype=torch.float64)), *drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


@torch.no_grad()
def compare_readings(model, dataset, args, world, folder):
    """The same outputs of one affinity checkpoint read by Seamless's rules (with and without their void), by argmax over the
    potential, and by argmax over the head's answer, each with small stuff trimmed to void and not: a table, and the differences with their bootstrap intervals."""
    if not hasattr(model, "readings"):
        raise UserError(f"--readings compares the ways to read an affinity checkpoint; this one is of --method {args['method']}")
    model.eval()
    isthing, count = torch.tensor([k.isthing for k in dataset.categories]), min(args["eval_count"] or len(dataset), len(dataset))
    names = ("heuristic", "filled", "argmax", *(["affinity"] if model.head is not None else []))
    sums = {(name, trimmed): [] for name in names for trimmed in (True, False)}
    ap = {kind: AveragePrecision(len(isthing), kind=kind) for kind in ("box", "mask")}
    loader = DataLoader(torch.utils.data.Subset(dataset, range(count)), batch_size=None, num_workers=args["workers"], generator=torch.Generator())
    for sample in loader:
        native = tuple(sample.image.shape[1:])
        image = data.resize(sample, input_size(native, args["short_side"])).image
        with world.autocast():
            found = model.readings(image.to(world.device), native, names)
        for name, trimmed in sums:
            p = model.trim(found[name]) if trimmed else found[name]
            score = PanopticQuality(isthing)
            score.update(p.segments.cpu(), p.categories.cpu(), sample.segments, sample.categories, sample.crowd)
            sums[name, trimmed].append(score.sums)
        for kind, key in (("box", "boxes"), ("mask", "masks")):              # the readings share them
            instances = [found[names[0]].instances[k].cpu() for k in (key, "scores", "categories")]
            ap[kind].update(*instances, sample.segments, sample.categories, sample.crowd, isthing=isthing)
    result = {f"AP_{kind}": score.compute()["AP"] for kind, score in ap.items()}
    world.say(f"{count} pictures      PQ   things   stuff   IoU of stuff   small stuff")
    for (name, trimmed), per_picture in sums.items():
        score = PanopticQuality(isthing)
        score.sums = {k: sum(s[k] for s in per_picture) for k in per_picture[0]}
        r = score.compute()
        iou = [c["iou"] for c in r["per_category"] if not c["isthing"] and not math.isnan(c["iou"])]
        row = {k: r[k] for k in ("PQ", "PQ_th", "PQ_st")} | {"IoU_st": sum(iou) / max(len(iou), 1)}
        result[f"{name} {'trimmed' if trimmed else 'kept'}"] = row
        world.say(f"{name:12s}" + "".join(f"{v:8.1f}" for v in list(row.values())[:3]) + f"{row['IoU_st']:15.1f}   {'void' if trimmed else 'kept'}")
    world.say(f"box AP {result['AP_box']:.1f}   mask AP {result['AP_mask']:.1f}")
    for other in names[:-1]:
        for key in ("PQ", "PQ_th"):
            interval = paired_interval(sums[names[-1], True], sums[other, True], isthing, key)
            result[f"{names[-1]} - {other}, {key}"] = interval
            world.say(f"{key:6s} {names[-1]} - {other}: {interval[0]:+.2f}  [{interval[1]:+.2f}, {interval[2]:+.2f}]  "
                      "(95%, bootstrap over the pictures)")
    if world.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "readings.json").write_text(json.dumps(result, indent=1))
    return result


def draw_predictions(path, shown, categories):
    """Image, ground truth and prediction side by side, a row a picture."""
    if not shown:
        return
    h, w = shown[0][0].image.shape[1:]
    fig, axes = plt.subplots(len(shown), 3, figsize=(15, 5 * len(shown) * h / w + 0.3), squeeze=False, layout="constrained")
    for row, (sample, p) in zip(axes, shown):
        row[0].imshow(sample.image.permute(1, 2, 0).clamp(0, 1).numpy())
        data.draw(sample.image, sample.segments, sample.categories, categories, ax=row[1])
        data.draw(sample.image, p.segments, p.categories, categories, ax=row[2])
    for ax, title in zip(axes[0], ("image", "ground truth", "prediction")):
        ax.set_title(title)
    for ax in axes.flat:
        ax.axis("off")
    fig.savefig(path, dpi=80)
    plt.close(fig)


# --- Training -------------------------------------------------------------------------------------------------------------

def parameter_groups(model, args):
    """Weight decay on everything, as the paper has it, or not on norms and biases under --no-freeze (its second variant)."""
    p = [p for p in model.parameters() if p.requires_grad]
    if not args["no_freeze"]:
        return [{"params": p}]
    # Norms and biases are the one-dimensional parameters; the paper spares the norms, their biases' company is ours.
    return [{"params": [q for q in p if q.ndim > 1]}, {"params": [q for q in p if q.ndim <= 1], "weight_decay": 0.0}]


def stages_of(model, args):
    """A method's own stages, or the one stage that trains everything by SGD with Nesterov momentum."""
    if hasattr(model, "stages"):
        return model.stages()
    def sgd(groups):
        return torch.optim.SGD(groups, args["lr"], 0.9, weight_decay=args["decay"], nesterov=True)
    return [("all", parameter_groups(model, args), sgd, 1.0)]


def rate(step, steps, args):
    """The learning rate's factor: linear warm-up from a third, then a tenth after each of `drops` (shares of the run), or, with `poly`
    above 0, (what is left of the run) ** poly."""
    warmup = min(args["warmup"], steps // 4)
    if step < warmup:
        return 1 / 3 + 2 / 3 * step / warmup
    if args.get("poly"):
        return (1 - step / steps) ** args["poly"]
    return 0.1 ** sum(step >= drop * steps for drop in args["drops"])


class Losses(nn.Module):
    """DistributedDataParallel watches `forward`; this makes it the losses."""
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images, targets):
        return self.model.losses(images, targets)


def train(args, world, folder, state=None):
    """The loop: from `state` (a checkpoint) or from the beginning; ends with the evaluation and returns its metrics."""
    dataset, held_out = open_dataset(args, True), open_dataset(args, False)
    torch.manual_seed(args["seed"])
    path, begin = folder / "last.pt", state["step"] if state else 0
    model = restore_model(state, args, dataset.categories, path) if state else METHODS[args["method"]](dataset.categories, args)
    model = model.to(world.device, memory_format=torch.channels_last)
    if world.size > 1 and world.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    torch.manual_seed(args["seed"] + 1000 * world.rank + 1)
    if state:
        random = state["rng"][world.rank if world.rank < len(state["rng"]) else 0]
        torch.set_rng_state(random["cpu"])
        if world.device.type == "cuda" and "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"])
    weights = sum(p.numel() for p in model.parameters())
    world.say(f"{args['method']} on {args['dataset']}: {len(dataset)} training pictures, {weights / 1e6:.2f}M parameters, "
              f"{world.size} x {world.device.type}, {'bf16' if world.bf16 else 'float32'}, into {folder}")
    if args["batch"] % world.size:
        raise UserError(f"--batch {args['batch']} cannot be shared among {world.size} processes; take a multiple of {world.size}")
    sampler = build_sampler(dataset, args, world, folder, begin * args["batch"])
    loader = iter(DataLoader(sampler, batch_size=None, num_workers=args["workers"], generator=torch.Generator(),
                             prefetch_factor=max(2, 2 * args["batch"] // world.size // (2 if args["sampler"] == "paired" else 1)) if args["workers"] else None))
    def whole(i):                                                             # categories of all segments of picture i
        if getattr(sampler, "index", None) is not None:                       # it has read every label
            rows = sampler.index.rows(i)
            return sampler.index.category[rows][~sampler.index.crowd[rows]]
        _, kinds, crowd = dataset.labels(i)
        return kinds[~crowd]
    folder.mkdir(parents=True, exist_ok=True)            # not sooner: what cannot start leaves no folder behind
    log = open_log(folder / "log.csv", begin) if world.rank == 0 else None
    edge, spent, clock = 0, 0.0, (state or {}).get("seconds", 0.0)       # clock: seconds spent on training, those before a resume included
    for name, groups, make_optimiser, share in stages_of(model, args):
        spent += share                              # rounded as a sum, so that the last stage ends with the run
        first, edge = edge, round(spent * args["steps"])
        if begin >= edge and edge < args["steps"]:
            continue
        chosen = {id(p) for g in groups for p in (g["params"] if isinstance(g, dict) else [g])}
        trainable = [p for p in model.parameters() if id(p) in chosen]
        for p in model.parameters():
            p.requires_grad_(id(p) in chosen)
        optimiser = make_optimiser(groups)
        base = [g["lr"] for g in optimiser.param_groups]
        if state and begin > first:
            optimiser.load_state_dict(state["optimiser"])
        wrapped = nn.parallel.DistributedDataParallel(Losses(model), find_unused_parameters=True) if world.size > 1 else Losses(model)
        started, window = time.time(), []
        tick = started
        for step in range(max(begin, first), edge):
            model.train()
            for g, lr in zip(optimiser.param_groups, base):
                g["lr"] = lr * rate(step - first, edge - first, args)
            images, targets = collate(draw_crops(loader, args["batch"] // world.size))
            if args.get("outside"):
                targets = [ibs.ask_outside(t, whole(t.image_id)) for t in targets]
            images = images.to(world.device, memory_format=torch.channels_last, non_blocking=True)
            with world.autocast():
                losses = wrapped(images, [t.to(world.device) for t in targets])
            total = sum(losses.values())
            if not math.isfinite(total.item()):
                worst = [k for k, v in losses.items() if not math.isfinite(v.item())]
                kept = f"{path} holds an earlier state: resume it" if path.exists() else "train again"
                raise UserError(f"step {step}: the loss is not finite ({', '.join(worst)}); {kept} with a lower --lr or a lower --clip")
            optimiser.zero_grad(set_to_none=True)
            total.backward()
            nn.utils.clip_grad_norm_(trainable, args["clip"])
            optimiser.step()
            window.append({**{k: v.item() for k, v in losses.items()}, "total": total.item()})
            done = step + 1
            if done % args["interval"] == 0 or done == args["steps"]:
                means = {k: sum(w[k] for w in window) / len(window) for k in window[0]}
                each, window = (time.time() - started) / len(window), []
                started = time.time()
                if world.rank == 0:
                    log(done, means, optimiser.param_groups[0]["lr"], args["batch"] / each)
                    minutes, rest = divmod(round(each * (args["steps"] - done)), 60)
                    print(f"step {done:6d}/{args['steps']}  " + "  ".join(f"{k} {v:.3f}" for k, v in means.items())
                          + f"  {args['batch'] / each:.1f} img/s  {world.memory():.1f} GiB  "
                          f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} left", flush=True)
            stop = done == args["stop_at"] or done == args["steps"]
            clock, tick = clock + time.time() - tick, time.time()
            if stop or done % (10 * args["interval"]) == 0:
                save_state(path, model, optimiser, done, args, dataset.categories, world, clock)
            if args.get("eval_every") and done % args["eval_every"] == 0 and done < args["steps"]:
                add_to_curve(folder, done, clock, evaluate(model, held_out, args, world, folder), world)
                started, tick = started + time.time() - tick, time.time()
            if done == args["stop_at"] and done < args["steps"]:
                world.say(f"stopped after step {done}; go on with: python train.py --resume {folder}")
                return {}
    if world.rank == 0:
        draw_curves(folder)
    result = evaluate(model, held_out, args, world, folder, references=True)
    if args.get("eval_every"):
        add_to_curve(folder, args["steps"], clock, result, world)
    return result


def table1(ap):
    """The columns of AdaptIS's Table 1: AP at an IoU of 50, 70, 80 and 90 percent."""
    return {round(100 * t): v for t, v in ap["per_threshold"].items() if round(100 * t) in (50, 70, 80, 90)}


def add_to_curve(folder, step, seconds, result, world):
    """A line of curve.csv: how good after so many steps and minutes of training (evaluation not counted)."""
    if world.rank:
        return
    path, ap = folder / "curve.csv", result["AP_mask"]
    rows = [r for r in csv.reader(open(path)) if r[0] == "step" or int(r[0]) < step] if path.exists() else []     # a resumed run's own past
    columns = {"PQ": result["PQ"], "AP": ap["AP"], **{f"AP{t}": v for t, v in table1(ap).items()}}
    rows = rows or [["step", "minutes", *columns]]
    with open(path, "w", newline="") as f:
        csv.writer(f).writerows([*rows, [step, f"{seconds / 60:.2f}", *(f"{v:.2f}" for v in columns.values())]])


def save_state(path, model, optimiser, step, args, categories, world, seconds=0.0):
    """Rank 0 writes; every rank contributes the state of its random numbers."""
    mine = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        mine["cuda"] = torch.cuda.get_rng_state()
    rng = [mine] * world.size
    if world.size > 1:
        dist.all_gather_object(rng, mine)
    if world.rank == 0:
        save_checkpoint(path, {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": step, "seconds": seconds, "rng": rng,
                               "args": {k: v for k, v in args.items() if k != "stop_at"},
                               "categories": [[k.name, bool(k.isthing), list(k.colour)] for k in categories]})


def open_log(path, begin):
    """log.csv as a function (step, losses, rate, images a second); lines beyond a resumed run's first step are dropped."""
    rows = [r for r in csv.DictReader(open(path)) if int(r["step"]) <= begin] if path.exists() and begin else []

    def write(rows, columns):
        with open(path, "w", newline="") as f:
            out = csv.DictWriter(f, columns, restval="")
            out.writeheader()
            out.writerows(rows)
    columns = list(rows[0]) if rows else []
    write(rows, columns) if rows else path.unlink(missing_ok=True)

    def log(step, losses, lr, speed):
        nonlocal columns
        row = {"step": step, **{k: f"{v:.6g}" for k, v in losses.items()}, "lr": f"{lr:.6g}", "images_per_second": f"{speed:.3g}"}
        if not set(row) <= set(columns):               # the first line, or another stage with losses of its own: more columns
            old = list(csv.DictReader(open(path))) if columns else []
            columns = [*columns[:-3], *(k for k in row if k not in columns[:-3])] if columns else list(row)
            write(old, columns)
        with open(path, "a", newline="") as f:
            csv.DictWriter(f, columns, restval="").writerow(row)
    return log


def draw_curves(folder):
    """curves.png from log.csv."""
    rows = list(csv.DictReader(open(folder / "log.csv")))
    fig, ax = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name in [k for k in (rows[0] if rows else {}) if k not in ("step", "lr", "images_per_second")]:
        known = [r for r in rows if r[name]]             # stages have losses of their own
        ax.semilogy([int(r["step"]) for r in known], [max(float(r[name]), 1e-6) for r in known], label=name, lw=2.5 if name == "total" else 1.2)
    ax.set(xlabel="step", ylabel="loss, mean of an interval")
    ax.legend(ncols=2, fontsize=8)
    ax.grid(alpha=0.3)
    fig.savefig(folder / "curves.png", dpi=100)
    plt.close(fig)


# --- The command line -----------------------------------------------------------------------------------------------------

def predict(args, state, pictures, world, folder):
    """Anybody's pictures: a coloured copy of each, and the segments in COCO panoptic format."""
    if not pictures:
        raise UserError("--predict needs pictures after the checkpoint: --predict RUN/last.pt picture.png ...")
    categories = [data.Category(*c) for c in state["categories"]]
    model = restore_model(state, args, categories, "").to(world.device).eval()
    out = folder / "predict"
    out.mkdir(parents=True, exist_ok=True)
    annotations = []
    for path in map(Path, pictures):
        image = data.read_picture(path)
        native = tuple(image.shape[1:])
        small = F.interpolate(image[None], size=input_size(native, args["short_side"]), mode="bilinear", antialias=True)[0]
        with world.autocast():
            p = model.predict(small.to(world.device), native)
        segments, found = p.segments.cpu(), p.categories.cpu()
        annotations.append(data.write_annotation(out / "panoptic", path.stem, segments, found))
        fig, ax = plt.subplots(figsize=(native[1] / 100, native[0] / 100))
        fig.subplots_adjust(0, 0, 1, 1)
        data.draw(image, segments, found, categories, ax=ax)
        ax.axis("off")
        fig.savefig(out / f"{path.stem}.png", dpi=100)
        plt.close(fig)
        names = [categories[c].name for c in found.tolist()]
        print(f"{path}: " + (", ".join(f"{names.count(n)} {n}" for n in dict.fromkeys(names)) or "nothing found") + f" -> {out / path.stem}.png")
    data.write_panoptic_json(out / "panoptic", annotations, categories)


def compare(explicit, world, folder):
    """Every method on the same scenes, seed and number of crops, each by its own recipe: one table, one figure."""
    rows, args = {}, settings(explicit)
    for method in METHODS:
        begin = time.time()
        result = train(settings({**explicit, "method": method}), world, folder / method)
        rows[method] = {**{k: result[k] for k in ("PQ", "PQ_th", "PQ_st", "SQ", "RQ", "PQ_dagger", "mIoU")}, "AP_mask": result["AP_mask"]["AP"],
                        "AP_box": result["AP_box"]["AP"], "minutes": (time.time() - begin) / 60}
    columns = list(next(iter(rows.values())))
    lines = ["method      " + "".join(f"{c:>10}" for c in columns)]
    lines += [f"{m:12s}" + "".join(f"{v:10.1f}" for v in r.values()) for m, r in rows.items()]
    world.say("\n".join(lines))
    if world.rank == 0:
        (folder / "compare.txt").write_text("\n".join(lines) + "\n")
        fig, ax = plt.subplots(figsize=(9, 4), layout="constrained")
        for i, (method, row) in enumerate(rows.items()):
            x = torch.arange(len(columns) - 1) + (i - (len(rows) - 1) / 2) * 0.8 / len(rows)
            ax.bar_label(ax.bar(x, list(row.values())[:-1], 0.8 / len(rows), label=method), fmt="%.0f", fontsize=8)
        ax.set_xticks(range(len(columns) - 1), columns[:-1])
        ax.set_title(f"{args['dataset']}, {args['steps']} steps of {args['batch']} crops, seed {args['seed']}")
        ax.legend()
        fig.savefig(folder / "compare.png", dpi=100)


# 97.5% points of Student's t with 1, 2, ..., 9 degrees of freedom; with more the last one makes an interval a little too wide.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def versus(ours, theirs):
    """Two recipes, each with the same seeds: patterns of run folders -> a table of the means over seeds, of the mean of the paired
    differences and its 95% interval (Student's t, as if differences were normal)."""
    def read(pattern):
        runs = {}
        for path in map(Path, sorted(glob.glob(pattern))):
            if not (path / "metrics.json").exists():
                raise UserError(f"{path} holds no metrics.json: the run has not ended")
            seed = load_file(path / "last.pt")["args"]["seed"]
            if seed in runs:
                raise UserError(f"{pattern}: two runs of seed {seed}; name the runs of one recipe only")
            m = json.loads((path / "metrics.json").read_text())
            runs[seed] = {k: m[k] for k in ("PQ", "PQ_th", "PQ_st", "Acc_th", "Prec_th")}
            runs[seed] |= {"confused, T = 25": m["confusion"]["25"], **{f"mask {k}": v for k, v in m["AP_mask"].items() if k in ("AP", "AP_small", "AP_medium", "AP_large")}}
            runs[seed] |= {f"masks before merging, {k}": v for k, v in m.get("instances", {}).items()}
        return runs
    a, b = read(ours), read(theirs)
    if not a or set(a) != set(b):
        raise UserError(f"seeds must be the same on both sides, not {sorted(a)} of {ours} and {sorted(b)} of {theirs}")
    n = len(a)
    print(f"{'':36s}{'first':>8}{'second':>8}   first - second, {n} paired seeds")
    table = {}
    for key in [k for k in next(iter(a.values())) if all(k in run for side in (a, b) for run in side.values())]:
        x, y = (torch.tensor([side[seed][key] for seed in sorted(side)], dtype=torch.float64) for side in (a, b))
        d = x - y
        if d.isnan().any():                                                   # no object of that size
            continue
        reach = STUDENT[min(n - 1, len(STUDENT)) - 1] * d.std().item() / n ** 0.5 if n > 1 else math.nan
        table[key] = x.mean().item(), y.mean().item(), d.mean().item(), reach
        print(f"{key:36s}{x.mean():8.1f}{y.mean():8.1f}   {d.mean():+6.1f}  [{d.mean() - reach:+.1f}, {d.mean() + reach:+.1f}]")
    return table


def parse(argv):
    """The flags that were given, and only those: recipes and checkpoints fill in the rest."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    what, model, run = p.add_argument_group("what"), p.add_argument_group("model"), p.add_argument_group("training")
    what.add_argument("--dataset", choices=list(RECIPES), help="default: street, toy scenes drawn on the fly")
    what.add_argument("--root", help="folder of the data set, in its official layout")
    what.add_argument("--train-split"), what.add_argument("--val-split")
    what.add_argument("--resume", metavar="RUN", help="go on with the run in this folder")
    what.add_argument("--eval", metavar="RUN/last.pt", help="evaluate on full images")
    what.add_argument("--readings", action="store_true", help="with --eval: of an affinity checkpoint, rules against argmax against the head")
    what.add_argument("--predict", nargs="+", metavar=("RUN/last.pt", "PICTURE"), help="segment pictures")
    what.add_argument("--versus", nargs=2, metavar="RUNS", help="two patterns of run folders, the same seeds: means and paired differences")
    what.add_argument("--compare", action="store_true", help="train every method, print one table")
    what.add_argument("--out", help="the run's folder (default: the first free runs/DATASET-METHOD-N)")
    model.add_argument("--method", choices=list(METHODS)), model.add_argument("--box-loss", choices=list(BOX_LOSSES))
    model.add_argument("--body", help="tiny, small, resnet18, resnet34, resnet50, resnet101")
    model.add_argument("--weights", help="imagenet, none, or the file of a torchvision ResNet's weights")
    model.add_argument("--no-freeze", action="store_true", help="the paper's variant: nothing frozen, no weight decay on norms")
    def numbers(group, kind, **flags):
        for name, what_for in flags.items():
            group.add_argument("--" + name.replace("_", "-"), type=kind, help=what_for)
    numbers(model, int, width="channels of the pyramid; the heads follow", extra="levels beyond stride 32", frozen="stages that do not learn",
            canonical="size in pixels of an object on the third level", rois="proposals a picture to learn from",
            proposals="proposals a picture at test time", window="of MiniDL's pooling", stuff_area="smallest stuff, in pixels of a 1024x2048 picture")
    numbers(model, float, anchor_scale="side of an anchor in strides", score_threshold="of a detection that becomes a segment",
            radius="of AdaptIS's relative coordinates, in pixels", threshold="of AdaptIS's masks")
    numbers(model, int, affinity_channels="C of the affinity features", points="AdaptIS learns from, a picture",
            per_round="points asked at once", patience="rounds without a new object", min_area="of an object, in pixels",
            head_width="channels of AdaptIS's heads", head_blocks="layers of its selection network")
    model.add_argument("--point-window", type=int, nargs=2, metavar=("H", "W"),
                       help="what AdaptIS's selection network sees around a point, in pixels")
    model.add_argument("--mask-loss", choices=list(MASK_LOSSES))
    model.add_argument("--flip-test", action="store_true", help="AdaptIS: average with the mirrored picture")
    model.add_argument("--no-coordinates", dest="coordinates", action="store_false", help="AdaptIS without Relative CoordConv")
    model.add_argument("--semantic-loss", choices=list(SEMANTIC_LOSSES))
    model.add_argument("--roi-mask-loss", choices=list(ROI_MASK_LOSSES), help="of the mask branch")
    model.add_argument("--excitation", action="store_true", help="squeeze and excitation on the last stage of the ResNet")
    model.add_argument("--variant", choices=["A", "B", "C"], help="of the affinity head's potential")
    model.add_argument("--no-masks", dest="masks", action="store_false", help="affinity without the mask branch")
    model.add_argument("--no-affinity", dest="affinity", action="store_false", help="affinity's potential without its head")
    model.add_argument("--end-to-end", choices=["all", "head", "none"], help="what the panoptic matching loss trains")
    model.add_argument("--true-boxes", action="store_true", help="affinity trained on the true boxes instead of its own")
    model.add_argument("--reading", choices=["affinity", "argmax", "heuristic"], help="how affinity's outputs become segments")
    model.add_argument("--loss-weights", type=float, nargs=3, metavar=("D", "S", "P"), help="of affinity's detection, semantic and panoptic losses")
    model.add_argument("--embeddings", choices=list(ibs.FAMILIES), help="of ibs: after Panoptic FCN or after Mask2Former")
    model.add_argument("--outside", action="store_true", help="queries that are asked for what lies outside of the crop, too: what ibs.py corrects")
    model.add_argument("--things-only", action="store_true", help="queries for instance segmentation: no stuff")
    numbers(model, float, ibs_weight="of intra-batch supervision, 0: none", overlap="that a segment of ibs keeps when all are merged")
    numbers(model, int, embedding_channels="C of embeddings and features", queries="of the query network")
    model.add_argument("--ratios", type=float, nargs="+", help="height over width of the anchors")
    run.add_argument("--sampler", choices=SAMPLERS), run.add_argument("--crop", type=int, nargs=2, metavar=("H", "W"))
    numbers(run, int, short_side="shorter side of a picture in pixels, 0: as it is", batch="crops a step, over all processes", steps="length",
            warmup="steps", interval="steps between log lines", stop_at="stop there; the schedule stays", seed="of weights and crops",
            scenes="toy pictures to train on", eval_count="pictures to evaluate on, 0: all", workers="loading processes", threads="of the CPU, 0: all")
    run.add_argument("--eval-every", type=int, help="evaluate every so many steps into curve.csv, 0: at the end only")
    numbers(run, float, lr="learning rate", lr_body="of the backbone, for AdaptIS and the queries of ibs",
            poly="power of a polynomial decay of the rate instead of drops, 0: drops",
            proposal_share="of the steps, for AdaptIS's proposal branch", clip="norm of the gradients", decay="weight decay",
            jitter="of colours, 0..1", hue="turn of the colours where they are jittered, 0..0.5 of their circle", flip="share of mirrored pictures")
    run.add_argument("--scale", type=float, nargs=2, metavar=("LO", "HI"), help="random scale of a training picture")
    run.add_argument("--scale-things", type=float, nargs=2, metavar=("LO", "HI"), help="limits of the scale that ISUS gives an instance")
    run.add_argument("--drops", type=float, nargs="*", help="shares of the run after which the rate falls to a tenth")
    run.add_argument("--precision", choices=["auto", "bf16", "float32"]), run.add_argument("--device", choices=["auto", "cpu", "cuda"])
    return vars(p.parse_args(argv))


DEFAULTS = dict(dataset="street", method="seamless", eval_every=0, box_loss="cabb", seed=0, workers=1, threads=0, stop_at=0, precision="auto", device="auto",
                root=None, train_split=None, val_split=None)


def settings(explicit):
    """All arguments of a new run: defaults, the data set's recipe over them, what was given over both."""
    dataset = explicit.get("dataset", "street")
    method = explicit.get("method", RECIPES[dataset].get("method", DEFAULTS["method"]))
    queries = IBS_QUERIES[dataset] if method == "ibs" and explicit.get("embeddings") == "queries" else {}
    args = {**DEFAULTS, **RECIPES[dataset], **OF_METHODS.get(method, {}).get(dataset, {}), **queries, **explicit, "method": method}
    return {**args, "frozen": 0} if args["no_freeze"] or args["weights"] == "none" else args


def run(explicit):
    """Decide what is asked for and do it."""
    jobs = {k: explicit.pop(k) for k in ("resume", "eval", "readings", "predict", "compare", "versus", "out") if k in explicit}
    if "readings" in jobs and "eval" not in jobs:
        raise UserError("--readings wants a checkpoint to read: --eval RUN/last.pt --readings")
    if "versus" in jobs:
        return versus(*jobs["versus"])
    source = jobs.get("eval") or jobs.get("predict", [None])[0] or ("resume" in jobs and str(Path(jobs["resume"]) / "last.pt"))
    if source:
        state, args = load_checkpoint(source, explicit)
        args = {**args, "stop_at": explicit.get("stop_at", 0)}
    else:
        state, args = None, settings(explicit)
    if (args.get("outside") or args.get("things_only")) and (args["method"], args.get("embeddings")) != ("ibs", "queries"):
        raise UserError("--outside and --things-only are questions for queries: --method ibs --embeddings queries")
    world = World(args)
    try:
        if "predict" in jobs:
            return predict(args, state, jobs["predict"][1:], world, Path(jobs.get("out") or Path(source).parent))
        if "eval" in jobs:
            dataset = open_dataset(args, False)
            model = restore_model(state, args, dataset.categories, source).to(world.device, memory_format=torch.channels_last)
            if "readings" in jobs:
                return compare_readings(model, dataset, args, world, Path(jobs.get("out") or Path(source).parent))
            return evaluate(model, dataset, args, world, Path(jobs.get("out") or Path(source).parent / "eval"), references=True)
        folder = Path(jobs.get("resume") or jobs.get("out") or world.agree(free_folder(args, "compare" if "compare" in jobs else args["method"])))
        if "resume" not in jobs and any((folder / part / "last.pt").exists() for part in (".", *METHODS)):
            raise UserError(f"{folder} holds a run already; go on with it by --resume {folder}, or give another --out")
        return compare(explicit, world, folder) if "compare" in jobs else train(args, world, folder, state)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def free_folder(args, name):
    """The first of runs/DATASET-NAME-1, -2, ... that does not exist."""
    return next(f for f in (Path("runs") / f"{args['dataset']}-{name}-{n}" for n in range(1, 10**6)) if not f.exists())


def main(argv=None):
    """Exit code 2 and one sentence for what the user can mend."""
    try:
        run(parse(argv))
    except (UserError, data.DataError) as e:
        # An error in a loading process arrives wrapped in that process's traceback; its last line is the sentence.
        print("train.py:", str(e).strip().splitlines()[-1].removeprefix("data.DataError: "), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
