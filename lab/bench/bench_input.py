"""Which waits for the other, the network or its data? Crops of 512x1024 a second, by workers."""
import math
import os
import tempfile
import time

import torch
from torch.utils.data import DataLoader

from data import collate
from isus import CropSampler, build_index
from lab import cache, readers
from lab.bench.common import Device, best, random_crops, training_step, write_cityscapes
from lab.street import StreetScenes
from seamless import Seamless, resnet_fpn

SIZE, BAR = (512, 1024), 30  # crops of SIZE a second from the cache, on two cores of its own


def sampler_of(dataset, table):
    """Crops of Cityscapes' recipe, one a batch."""
    return CropSampler(dataset, table, size=SIZE, short_side=1024, batch=1)


def loaded(sampler, workers, count=24, repeats=4):
    """Crops a second that reach this process: the best of `repeats` counts, for other programs
    disturb some."""
    crops, rates = iter(DataLoader(sampler, batch_size=None, num_workers=workers)), []
    for _ in range(4 * workers):                               # those that were made in advance
        next(crops)
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(count):
            next(crops)
        rates.append(count / (time.perf_counter() - start))
    return max(rates)


def core_seconds(sampler, count=24):
    """Seconds of one core that a crop takes. Other programs change them little."""
    sampler.batch(0)
    start = time.process_time()
    for k in range(count):
        sampler.batch(k)
    return (time.process_time() - start) / count


def network(device):
    """Crops of SIZE that a training step of Seamless (ResNet-50) takes a second. On a CPU it is
    measured with a crop of a quarter, and divided by four."""
    batch, size = (16, SIZE) if device.cuda else (1, (256, 512))
    model = Seamless(torch.arange(19) >= 11, resnet_fpn("resnet50", frozen=2, frozen_norm=True))
    model.to(device.device, memory_format=torch.channels_last)
    images, targets = collate(random_crops(batch, *size))
    images = images.to(device.device, memory_format=torch.channels_last)
    targets = [t.to(device.device) for t in targets]
    trained = [p for p in model.parameters() if p.requires_grad]
    step = training_step(model, torch.optim.SGD(trained, 1e-4),
                         lambda: model.losses(images, targets), device)
    return batch / best(step, 10 if device.cuda else 2) * size[0] * size[1] / (SIZE[0] * SIZE[1])


def measure():
    """Decoding and the cache, by workers; then the network beside them."""
    device, cores = Device(), len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as root:
        write_cityscapes(root, StreetScenes(8, size=(1024, 2048), seed=7))
        decoding = readers.Cityscapes(root, "train")
        table, kept = build_index(decoding), cache.Decoded(decoding, f"{root}/cache")
        for i in range(len(kept)):
            kept[i]                                            # decodes and writes
        rates, seconds = {}, {}
        for name, dataset in (("PNG", decoding), ("--cache", kept)):
            sampler = sampler_of(dataset, table)
            seconds[name] = core_seconds(sampler)
            for workers in sorted({1, 2, cores}):
                rates[name, workers] = loaded(sampler, workers)
                print(f"{name:8s} {workers:3d} workers  {rates[name, workers]:6.1f} crops a second"
                      f"   {1e3 * seconds[name]:5.1f} ms of a core a crop", flush=True)
    takes = network(device)
    print(f"network  {device.name}: takes {takes:.2f} crops a second")
    for name, each in seconds.items():
        fastest = max(rate for (n, _), rate in rates.items() if n == name)
        who = "the network waits for data" if fastest < takes else "data waits for the network"
        print(f"{name:8s} {who}; the network keeps {math.ceil(takes * each)} workers busy, this "
              f"machine has {cores} cores")
    fast, slow = rates["--cache", 2], rates["PNG", 2]
    print(f"--cache: two workers deliver {fast:.1f} crops a second, {fast / slow:.1f} times those "
          f"from PNGs (bar: {BAR} on two cores without other work)")
    assert fast >= BAR
