"""Balls and crates before a wall: the world of affinity_head.py's demo, and imperfect detections.

Many objects look alike and hide each other. `scene(i)` depends on i alone: the demo trains on
images 0, 1, ... and tests on images from 10,000,000 on.
"""
import torch
import torch.nn.functional as F

from data import Category, Target, mask_boxes, new_numbers

CATEGORIES = [Category("wall", False, (204, 204, 204)), Category("floor", False, (153, 153, 153)),
              Category("ball", True, (31, 119, 180)), Category("crate", True, (255, 127, 14))]
ISTHING = torch.tensor([c.isthing for c in CATEGORIES])
PAINT = torch.tensor([[.8, .2, .2], [.2, .5, .8], [.9, .7, .2], [.3, .7, .3], [.6, .3, .7],
                      [.85, .85, .85], [.25, .25, .3]])


def uniform(generator, low, high, *shape):
    """Random numbers in low..high, a tensor of `shape`."""
    return low + (high - low) * torch.rand(shape, generator=generator)


def draw(generator, size=(128, 192), count=(5, 10)):
    """An image [3, H, W] of `size` with `count` (from, to) objects, and its Target."""
    def u(low, high, *shape):
        return uniform(generator, low, high, *shape)

    h, w = size
    y, x = torch.meshgrid(torch.arange(h) + .5, torch.arange(w) + .5, indexing="ij")
    segments = 1 + (y > h * u(.3, .5) + w * u(-.1, .1) * (x / w - .5)).long()
    image = torch.where(segments == 1, u(.45, .8, 3, 1, 1), u(.2, .5, 3, 1, 1))
    image = image * (1 - .1 * ((x // 12 + y // 8 * (segments == 1)) % 2 == 0))
    categories = [0, 1]
    for k in range(int(u(*count))):
        cx, cy, a, b, turn = u(0, w), u(.25 * h, h), u(10, 30), u(10, 30), u(-.4, .4)
        crate = bool(u(0, 1) < .5)
        s = (x - cx) * turn.cos() + (y - cy) * turn.sin()      # the object's own axes
        t = (y - cy) * turn.cos() - (x - cx) * turn.sin()
        r = ((s / a) ** 2 + (t / a) ** 2).sqrt()
        if crate:
            r = torch.maximum((s / a).abs(), (t / b).abs())
        shade = 1 + u(-.4, .4) * s / a + u(-.4, .4) * t / a - .5 * (r > .88)
        image = torch.where(r < 1, PAINT[int(u(0, 7))][:, None, None] * shade, image)
        segments = torch.where(r < 1, k + 3, segments)
        categories.append(3 if crate else 2)
    image = image + .04 * torch.randn(3, h, w, generator=generator)
    visible = torch.bincount(segments.flatten(), minlength=len(categories) + 1)[1:] > 0
    segments, categories = new_numbers(visible)[segments], torch.tensor(categories)[visible]
    boxes, no = mask_boxes(segments, len(categories)), torch.zeros(len(categories), 4).bool()
    return image.clamp(0, 1), Target(segments, categories, no[:, 0], boxes, boxes, no)


def degrade(target, generator, stride=4):
    """What imperfect heads say -> logits [4, h, w] and detections (boxes, scores, categories).

    Logits: the truth, blurred by three cells and mixed up by smooth noise. Boxes: the true ones;
    each side is off by up to a quarter of the box's width or height, as often outwards as inwards,
    so that no constant factor corrects them. A fifth of them is found twice, with other errors and
    a lower score."""
    h, w = (n // stride for n in target.segments.shape)
    c = len(ISTHING)
    v = F.one_hot(target.categories[target.segments - 1], c).movedim(-1, 0)[None].float()
    v = F.avg_pool2d(F.pad(F.avg_pool2d(v, stride), (1,) * 4, mode="replicate"), 3, 1)
    noise = torch.randn(1, c, h // 6, w // 6, generator=generator)
    logits = (v + .02).log() + .8 * F.interpolate(noise, (h, w), mode="bilinear")
    things = torch.where(ISTHING[target.categories])[0]
    twice = things[torch.rand(len(things), generator=generator) < .2]
    chosen = torch.cat([things, twice])
    boxes = target.boxes[chosen]
    size = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    boxes = boxes + uniform(generator, -.25, .25, *boxes.shape) * size
    scores = torch.cat([uniform(generator, .75, 1, len(things)),
                        uniform(generator, .5, .75, len(twice))])
    return logits[0], {"boxes": boxes, "scores": scores, "categories": target.categories[chosen]}


def scene(i, size=(128, 192), count=(5, 10)):
    """Image i -> image [3, H, W], Target, logits [4, H / 4, W / 4], detections."""
    generator = torch.Generator().manual_seed(i)
    image, target = draw(generator, size, count)
    return image, target, *degrade(target, generator)
