"""What intra-batch supervision adds to a training step: time, and memory kept for backward."""
import time

import torch

import train
from data import collate, crop
from lab import methods, settings
from lab.bench.common import Device, categories, random_crops
from lab.ledger import ledger
from lab.parking import Parking

BAR = 1.15


def build(method, dataset, names):
    """The method's network with the recipe of the data set, untrained."""
    values, _ = settings.resolve(dataset, method, train.fit, {("body", "weights"): "none"})
    torch.manual_seed(0)
    return methods.build(method, names, values)


class KeptMemory:
    """Counts the bytes of the storages that autograd keeps for the backward pass, each once."""

    def __init__(self):
        self.sizes = {}

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    def hooks(self):
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)

    def total(self):
        return sum(self.sizes.values())


def step(model, weight, images, targets, device):
    """One forward and backward pass with this weight of IBS -> (seconds, bytes)."""
    model.ibs_weight, kept = weight, KeptMemory()
    if device.cuda:
        torch.cuda.reset_peak_memory_stats()
    device.wait()
    start = time.perf_counter()
    with device.autocast(), kept.hooks():
        total = sum(model.losses(images, targets).values())
    model.zero_grad(set_to_none=True)
    total.backward()
    device.wait()
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated() if device.cuda else kept.total()


def compare(dataset, method, crops, names, device, repeats):
    """Steps with and without IBS in turns, so that both meet the same machine -> worst ratio."""
    model = build(method, dataset, names)
    model = model.to(device.device, memory_format=torch.channels_last).train()
    images, targets = collate(crops)
    images = images.to(device.device, memory_format=torch.channels_last)
    targets = [t.to(device.device) for t in targets]
    seconds, memory = {0.0: [], model.ibs_weight: []}, {}
    for repeat in range(repeats):
        for weight in seconds:
            elapsed, memory[weight] = step(model, weight, images, targets=targets, device=device)
            seconds[weight] += [elapsed] if repeat else []     # the first is a warm-up
    (off, on), (less, more) = (min(v) for v in seconds.values()), memory.values()
    size = "x".join(map(str, images.shape[2:]))
    print(f"  {dataset:10s} {method:8s} {len(crops)} crops of {size}: {1e3 * off:8.1f} -> "
          f"{1e3 * on:8.1f} ms, {on / off:.3f} times; {less / 2 ** 20:8.1f} -> "
          f"{more / 2 ** 20:8.1f} MiB, {more / less:.3f} times")
    return max(on / off, more / less)


def measure():
    """The toy as it is trained, and the network of Cityscapes on crops that a CPU can hold."""
    device, lot = Device(), Parking(6, seed=1)
    toy = [crop(lot[i], 30, 40, (80, 160), image_id=i) for i in range(6)]
    count, size = (8, (512, 1024)) if device.cuda else (2, (256, 512))
    real = random_crops(count, *size, things=12)
    print(device.name)
    worst = 0.0
    for method in ("ibs", "queries"):
        worst = max(worst, compare("parking", method, toy, names=lot.categories, device=device,
                                   repeats=25),
                    compare("cityscapes", method, real, names=categories(), device=device,
                            repeats=25 if device.cuda else 5))
    print(f"the largest of these ratios: {worst:.3f} (bar: {BAR})")
    assert worst <= BAR
    print("one image of 1024x2048          parameters  multiply-adds")
    for method in ("ibs", "queries"):
        parts = ledger(build(method, "cityscapes", categories()))
        parts["all"] = tuple(sum(column) for column in zip(*parts.values()))
        for part, (parameters, products) in parts.items():
            print(f"  {method:8s} {part:21s} {parameters / 1e6:7.2f} M  {products / 1e9:9.1f} G")
