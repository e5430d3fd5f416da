"""GPU memory against batch, crop and card, counted on the CPU; takes about a minute a method.

A step of two crops on the CPU; see lab/memory.py. With a GPU, its own peak stands beside."""
import torch

import train
from data import collate
from lab import memory, methods
from lab.bench.common import Device, categories, random_crops
from lab.recipes import RECIPES

CROPS = ((512, 1024), (640, 640), (1024, 1024))  # of Cityscapes, COCO and Mapillary
GIB = 2 ** 30


def build(method):
    """The method with Cityscapes' recipe, without pretrained weights -> (model, optimiser, fit)."""
    body = [f"body.{k}={v}" for k, v in RECIPES[method, "cityscapes"]["body"].items()
            if k.startswith("frozen")]
    words = ["--method", method, "--dataset", "cityscapes", "--root", ".", "--set",
             "body.weights=none", *body]
    args, _ = train.arguments(train.parse(words))
    model = methods.build(method, categories(), args).to(memory_format=torch.channels_last)
    _, optimiser, _ = model.stages(args["fit"])[0]
    trained = {id(p) for group in optimiser.param_groups for p in group["params"]}
    for p in model.parameters():
        p.requires_grad_(id(p) in trained)
    return model, optimiser, args["fit"]


def batch_of(count, size):
    """Images [count, 3, h, w] and Targets with twelve things a crop."""
    images, targets = collate(random_crops(count, *size))
    return images.contiguous(memory_format=torch.channels_last), targets


def line_of(model, optimiser, small=(384, 768), large=(512, 1024)):
    """The memory.Line of a model, from three steps on the CPU."""
    peaks = [memory.peak(model, optimiser, *batch_of(n, size))
             for n, size in ((1, large), (2, large), (2, small))]
    return memory.line_through(*peaks, pixels=[h * w for h, w in (small, large)])


def beside_the_gpu(device, model, optimiser, line):
    """Prints what the GPU itself says of some batches."""
    model.to(device.device).train()
    optimiser.load_state_dict(optimiser.state_dict())          # moves momentum to the weights
    torch.cuda.empty_cache()
    for count in (1, 2, 4, 8):
        images, targets = batch_of(count, CROPS[0])
        images, targets = images.to(device.device), [t.to(device.device) for t in targets]
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            with device.autocast():
                losses = model.losses(images, targets)
            sum(losses.values()).backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            del losses
        seen, kept = torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
        print(f"  {count} crops of 512x1024: {device.name} allocated {seen:.2f} GiB, reserved "
              f"{kept:.2f} GiB; counted {line.bytes(count, 512 * 1024) / GIB:.2f} GiB")


def measure():
    """A table a method; then what to write for the recipe's batch on each card."""
    device = Device()
    for method in ("seamless", "affinity", "ibs", "queries", "adaptis", "maskrcnn"):
        model, optimiser, fit = build(method)
        adam = not isinstance(optimiser, torch.optim.SGD)
        line = line_of(model, optimiser)
        print(f"{method}, {'Adam' if adam else 'SGD'}: fixed {line.fixed / GIB:.2f} GiB, a crop "
              f"{line.crop / GIB:.2f} GiB, a pixel {line.pixel:.0f} bytes", flush=True)
        for size in CROPS:
            pixels = size[0] * size[1]
            each = ", ".join(f"{n}: {line.bytes(n, pixels) / GIB:.1f}" for n in (1, 2, 4, 8, 16))
            most = ", ".join(f"{card} GB: {line.largest(card, pixels)}" for card in memory.CARDS)
            print(f"  {size[0]}x{size[1]}: GiB by batch {each}; largest batch {most}")
        for card in memory.CARDS:
            parts = line.parts(card, 512 * 1024, fit["batch"])
            words = "not even one crop fits" if parts is None else f"--set fit.accumulate={parts}"
            if parts and parts > 1:
                other = memory.rescaled(fit, fit["batch"] // parts, adam)
                words += ", or " + " ".join(f"fit.{k}={v:g}" for k, v in other.items())
            print(f"  {card} GB, recipe of {fit['batch']} crops of 512x1024: {words}", flush=True)
        if device.cuda:
            beside_the_gpu(device, model, optimiser, line)
