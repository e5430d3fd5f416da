"""Training and full-image inference of the Cityscapes network beside torchvision's Mask R-CNN."""
import torch
import torchvision

from data import collate, thing_truth
from lab.bench.common import Device, best, random_crops, training_step
from seamless import Seamless, resnet_fpn


def networks(device, short, long):
    """Seamless and torchvision's Mask R-CNN, both with ResNet-50, nothing frozen, untrained."""
    isthing = torch.arange(19) >= 11
    ours = Seamless(isthing, resnet_fpn("resnet50"))
    theirs = torchvision.models.detection.maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=9, trainable_backbone_layers=5,
        min_size=short, max_size=long)
    return (ours.to(device.device, memory_format=torch.channels_last), theirs.to(device.device),
            isthing.to(device.device))


def measure():
    """Seconds, images per second and GPU memory. On a CPU the work is smaller: a trial only."""
    torch.set_num_threads(2)
    device = Device()
    batch, crop, full, repeats = 1, (128, 256), (256, 512), 1
    if device.cuda:
        batch, crop, full, repeats = 16, (512, 1024), (1024, 2048), 10
    print(f"{device.name}: {batch} crops of {crop}, images of {full}")
    ours, theirs, isthing = networks(device, *crop)
    images, targets = collate(random_crops(batch, *crop))
    images, targets = images.to(device.device), [t.to(device.device) for t in targets]
    truth = []
    for t in targets:
        numbers, boxes, _, category = thing_truth(t, isthing)
        masks = (t.segments == numbers[:, None, None]).to(torch.uint8)
        truth.append({"boxes": boxes, "labels": category - 10, "masks": masks})
    rows = {}

    def add(name, images, function):
        if device.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        seconds = rows[name] = best(function, repeats)
        memory = torch.cuda.max_memory_allocated() / 2 ** 30 if device.cuda else float("nan")
        print(f"{name:24s} {1e3 * seconds:9.1f} ms  {images / seconds:7.2f} images/s  "
              f"{memory:6.1f} GiB")

    def step(model, losses):
        return training_step(model, torch.optim.SGD(model.parameters(), 1e-4), losses, device)
    laid_out = images.contiguous(memory_format=torch.channels_last)
    add("training, seamless", batch, step(ours, lambda: ours.losses(laid_out, targets)))
    add("training, torchvision", batch, step(theirs, lambda: theirs(list(images), truth)))
    theirs.transform.min_size, theirs.transform.max_size = (full[0],), full[1]
    image = torch.rand(3, *full, device=device.device)
    for model, name in ((ours.eval(), "seamless"), (theirs.eval(), "torchvision")):
        @torch.no_grad()
        def infer(call=model.predict if model is ours else lambda x: model([x])):
            with device.autocast():
                call(image)
            device.wait()
        add(f"inference, {name}", 1, infer)
    for what in ("training", "inference"):
        ratio = rows[f"{what}, seamless"] / rows[f"{what}, torchvision"]
        print(f"{what}: ours takes {ratio:.2f} times as long")
