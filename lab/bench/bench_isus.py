"""Crops of 512x1024 a second of one loading process, from 1024x2048 PNGs; and their sizes."""
import tempfile
import time
from pathlib import Path

import torch

from isus import CropSampler, build_index
from lab import readers, worlds
from lab.bench.common import best, write_cityscapes
from lab.street import StreetScenes

def speed(count=40):
    """Milliseconds of the index, of decoding, of a crop in each mode."""
    with tempfile.TemporaryDirectory() as root:
        write_cityscapes(root, StreetScenes(8, size=(1024, 2048), seed=7))
        dataset = readers.Cityscapes(root, "train")
        start = time.perf_counter()
        table = build_index(dataset)
        each = (time.perf_counter() - start) / len(dataset)
        print(f"index                        {1e3 * each:8.1f} ms a label, once; 2,975 of them: "
              f"{2975 * each / 60:.1f} min for one process")
        path = sorted(Path(root, "leftImg8bit").rglob("*.png"))[0]
        image, label = best(lambda: readers.read_image(path), 5), best(lambda: dataset.labels(0), 5)
        print(f"decoding an image            {1e3 * image:8.1f} ms")
        print(f"reading a label              {1e3 * label:8.1f} ms")
        slowest = 0.0
        for mode in ("isus", "cus", "uniform"):
            sampler = CropSampler(dataset, table, mode=mode, size=(512, 1024), short_side=1024,
                                  batch=1)
            seconds = best(lambda: [sampler.batch(k) for k in range(count)], 1) / count
            print(f"{mode:28s} {1e3 * seconds:8.1f} ms a crop, {1 / seconds:.1f} crops a second "
                  f"and core (bar: 8); {(image + label) / seconds:.0%} is reading")
            slowest = max(slowest, seconds)
        assert 1 / slowest >= 8


def sizes():
    """What CUS and ISUS choose on the toy street, with the recipe's range of scales."""
    scenes = worlds.world("street", "train", 60)
    scenes.fill()
    table = build_index(scenes)
    isthing = torch.tensor([c.isthing for c in scenes.categories])
    for mode in ("cus", "isus"):
        sampler = CropSampler(scenes, table, mode=mode, size=(128, 256), scale=(0.8, 1.25),
                              scale_things=(0.8, 1.25), canonical=56, batch=1)
        targets = [sampler.batch(k)[1][0] for k in range(400)]
        chosen = [t for t in targets
                  if t.instance and isthing[t.categories[t.instance - 1]]]
        box = torch.stack([t.full_boxes[t.instance - 1] for t in chosen])
        sigma = torch.tensor([t.scale for t in chosen])
        size = (box[:, 2:] - box[:, :2]).prod(1).sqrt()
        print(f"{mode:6s} {len(chosen)} crops for a thing: median size {size.median():.1f} px, "
              f"above 56 px {(size > 56).float().mean():.0%}; sigma median {sigma.median():.2f}, "
              f"mean {sigma.mean():.2f}, at its upper limit {(sigma > 1.2499).float().mean():.0%}")


def measure():
    """Speed, then sizes."""
    speed()
    sizes()
