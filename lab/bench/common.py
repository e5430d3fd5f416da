"""What the measurements share: a stop watch, the device, images and labels made up for them."""
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data import Category, Sample, crop

OFFICIAL = {"road": 7, "sidewalk": 8, "building": 11, "vegetation": 21, "sky": 23, "person": 24,
            "car": 26, "truck": 27, "sign": 20}                # label ids of Cityscapes


class Device:
    """The GPU with bf16, or the CPU in float32. On a GPU `wait` waits for all work."""

    def __init__(self):
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.cuda else "cpu")
        threads = torch.get_num_threads()
        self.name = torch.cuda.get_device_name() if self.cuda else f"{threads} threads of a CPU"
        self.name += f", torch {torch.__version__.split('+')[0]}"

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.cuda)

    def wait(self):
        if self.cuda:
            torch.cuda.synchronize()


def best(function, repeats=9):
    """The shortest wall time of `repeats` calls in seconds, after one to warm up: the one that
    other programs disturbed least."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def street_pair(height=1024, width=2048, seed=0):
    """An image of Cityscapes' size -> predicted segments, true segments [H, W], categories [60].

    Ten stuff segments (categories 0..9) are stripes, 50 things (10..18) are ellipses. The
    prediction is shifted by some pixels, and one segment in twelve is missing."""
    g = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    truth = 1 + y * 10 // height
    for k in range(50):
        cx, cy = torch.rand(2, generator=g) * torch.tensor([width, height])
        rx, ry = 15 + 100 * torch.rand(2, generator=g) ** 2
        truth[((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1] = 11 + k
    prediction = truth.roll((4, -7), (0, 1))
    prediction[prediction % 12 == 5] = 0
    truth[-40:] = 0
    categories = torch.cat([torch.arange(10), 10 + torch.arange(50) % 9])
    return prediction.contiguous(), truth.contiguous(), categories


def categories(count=19, stuff=11):
    """`count` categories, the first `stuff` of them stuff: as many as Cityscapes has."""
    return [Category(str(k), k >= stuff, (0, 0, 0)) for k in range(count)]


def random_crops(count, height, width, things=12, seed=0):
    """`count` crops (image, Target) of noise with rectangles as things: every head has work."""
    g, crops = torch.Generator().manual_seed(seed), []
    for i in range(count):
        stripes = 1 + torch.arange(height)[:, None] * 4 // height
        segments = stripes.expand(height, width).clone()
        for k in range(things):
            most = torch.tensor([height / 2, width / 3])
            h, w = (16 + torch.rand(2, generator=g) ** 2 * most).long().tolist()
            y = int(torch.randint(height - h, (), generator=g))
            x = int(torch.randint(width - w, (), generator=g))
            segments[y:y + h, x:x + w] = 5 + k
        numbers = torch.cat([torch.arange(4), 11 + torch.arange(things) % 8])
        image, crowd = torch.rand(3, height, width, generator=g), torch.zeros(4 + things).bool()
        sample = Sample(image, segments, numbers, crowd, name=str(i))
        crops.append(crop(sample, 0, 0, (height, width), image_id=i))
    return crops


def training_step(model, optimiser, losses, device):
    """A function that does one step: losses() -> {name: scalar}, backward, update."""
    def step():
        with device.autocast():
            total = sum(losses().values())
        optimiser.zero_grad(set_to_none=True)
        total.backward()
        optimiser.step()
        device.wait()
    model.train()
    return step


def write_cityscapes(root, scenes, split="train"):
    """Writes toy street scenes in the layout of Cityscapes: 8-bit images, 16-bit instance ids.

    A sign is stuff there. Category `road` of number 7 has pixels 7, the 12th person 24012."""
    images, labels = (Path(root, kind, split, "town") for kind in ("leftImg8bit", "gtFine"))
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    for i in range(len(scenes)):
        sample = scenes[i]
        ids = np.zeros(sample.segments.shape, np.uint16)
        for k, c in enumerate(sample.categories.tolist(), 1):
            name = scenes.categories[c].name
            thing = name in ("person", "car", "truck")
            number = 1000 * OFFICIAL[name] + k if thing else OFFICIAL[name]
            ids[sample.segments.numpy() == k] = number
        pixels = (sample.image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        name = f"town_{i:06d}_000000"
        Image.fromarray(pixels).save(images / f"{name}_leftImg8bit.png")
        Image.fromarray(ids).save(labels / f"{name}_gtFine_instanceIds.png")
