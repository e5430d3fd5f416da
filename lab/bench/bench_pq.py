"""PQ of a 1024x2048 image with 60 segments, beside the bare histogram that it needs."""
import torch

from lab.ap import AveragePrecision
from lab.bench.common import best, street_pair
from pq import PanopticQuality


def torchmetrics_seconds(prediction, truth, categories):
    """Seconds of torchmetrics for the same image; None where it is not installed."""
    try:
        from torchmetrics.detection import PanopticQuality as Theirs
    except ImportError:
        return None

    def pairs(segments):                                       # [1, H, W, 2]; category 19 is void
        category = torch.cat([torch.tensor([19]), categories])[segments]
        return torch.stack([category, segments], -1)[None]
    theirs = Theirs(things=set(range(10, 19)), stuffs={*range(10), 19}, return_per_class=True)
    a, b = pairs(prediction), pairs(truth)
    return best(lambda: theirs(a, b), repeats=3)


def measure():
    """PQ of one large image, AP of one large image, AP of 2,000 images of 20 cells."""
    prediction, truth, categories = street_pair()
    isthing = torch.arange(19) >= 10

    def quality():
        metric = PanopticQuality(isthing)
        metric.update(prediction, categories, truth, categories)
        return metric.compute()
    seconds = best(quality)
    floor = best(lambda: torch.bincount((prediction * 61 + truth).flatten()))
    print(f"PQ, 1024x2048, 60 segments   {1e3 * seconds:8.1f} ms")
    print(f"bare index and bincount      {1e3 * floor:8.1f} ms      "
          f"ours takes {seconds / floor:.2f} times as long (bar: 4)")
    assert seconds <= 4 * floor
    slow = torchmetrics_seconds(prediction, truth, categories)
    if slow is None:
        print("torchmetrics is not installed: no comparison")
    else:
        print(f"torchmetrics                 {1e3 * slow:8.1f} ms      "
              f"{slow / seconds:.0f} times ours (bar: 100)")
        assert slow >= 100 * seconds

    masks = prediction == torch.arange(11, 61)[:, None, None]                       # [50, H, W]
    found = masks, torch.linspace(1, 0, 50), categories[10:]

    def large():
        AveragePrecision(19).update(*found, truth, categories, isthing=isthing)
    print(f"mask AP, 1024x2048, 50 detections, 60 segments    {1e3 * best(large, 3):8.1f} ms")
    y, x = torch.meshgrid(torch.arange(96), torch.arange(96), indexing="ij")
    cells = (y // 20 * 5 + x // 20 + 1).clamp(max=20)
    shifted = cells.roll(2, 0) == torch.arange(1, 21)[:, None, None]

    def many():
        metric = AveragePrecision(1, kind="mask")
        for _ in range(2000):
            metric.update(shifted, torch.linspace(1, 0, 20), torch.zeros(20), cells,
                          gt_categories=torch.zeros(20))
        return metric.compute()
    print(f"mask AP, 2000 images 96x96 of 20 cells            {best(many, 1):8.1f} s")
