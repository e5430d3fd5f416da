"""AdaptIS on cells: backbone and head apart, at two sizes; training and drawing of images."""
import multiprocessing
import time

import torch

import train
from data import collate, crop
from lab import methods, settings
from lab.bench.common import Device, best, training_step
from lab.cells import OverlappingCells


def draw(first):
    """Seconds that one process takes to draw 300 images of cells."""
    torch.set_num_threads(1)
    dataset, start = OverlappingCells(10 ** 6, seed=1), time.perf_counter()
    for i in range(first, first + 300):
        dataset[i]
    return time.perf_counter() - start


def parts(model, size, milliseconds, device):
    """Prints what each part of a prediction takes on an image of size x size pixels."""
    factor = (size // 96) ** 2
    image = OverlappingCells(1, size, (8 * factor, 22 * factor))[0].image.to(device.device)
    batch, selection = image[None].contiguous(memory_format=torch.channels_last), model.selection
    features = model.encoder(batch)
    shared, points = selection.share(features), torch.rand(1, 7, 2, device=device.device) * size
    backbone = milliseconds(lambda: model.encoder(batch))
    once = milliseconds(lambda: selection.share(features))
    head = milliseconds(lambda: selection(features, points, shared)) / 7
    again = milliseconds(lambda: selection(features, points)) / 7
    window, selection.window = selection.window, None
    whole = milliseconds(lambda: selection(features, points, shared)) / 7
    selection.window = window
    print(f"{size}x{size}: backbone {backbone:6.2f} ms an image, the head's shared layer "
          f"{once:5.2f} ms an image, head {head:5.2f} ms a point\n"
          f"         without sharing {again:5.2f} ms a point, on the whole map {whole:6.2f} ms a "
          f"point; predict {milliseconds(lambda: model.predict(image)):.0f} ms (untrained)")


def measure():
    """Milliseconds of the parts, images per second of training and of drawing."""
    torch.set_num_threads(2)
    device, cells = Device(), OverlappingCells(10 ** 6, seed=1)
    values, _ = settings.resolve("cells", "adaptis", train.fit, {})
    torch.manual_seed(0)
    model = methods.build("adaptis", cells.categories, values)
    model = model.to(device.device, memory_format=torch.channels_last).eval()
    print(f"{device.name}; a head on {values['model']['window']} pixels, seven points at once")

    def milliseconds(function):
        def run():
            with torch.no_grad(), device.autocast():
                function()
            device.wait()
        return 1e3 * best(run)
    for size in (96, 384):
        parts(model, size, milliseconds, device=device)
    images, targets = collate([crop(cells[i], 0, 0, (96, 96), image_id=i) for i in range(8)])
    images = images.to(device.device, memory_format=torch.channels_last)
    targets = [t.to(device.device) for t in targets]
    step = training_step(model, torch.optim.Adam(model.parameters(), 1e-3),
                         lambda: model.losses(images, targets), device=device)
    trained = 8 / best(step, 20)
    print(f"training                     {trained:8.0f} images a second (steps of 8 images with "
          f"{model.points} points each)")
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.map(draw, [0, 300])
        drawn = 600 / max(pool.map(draw, [600, 900]))
    print(f"drawing, two processes       {drawn:8.0f} images a second, {drawn / trained:.1f} times "
          "as many (bar on two cores: 10)")
    assert device.cuda or drawn >= 10 * trained
