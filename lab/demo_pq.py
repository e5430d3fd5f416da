"""The demo of pq.py: the cliff of PQ at an IoU of 1/2, on a sidewalk that shrinks step by step, and
what PQ and the pixels say of two cars that are taken for one."""
from pathlib import Path

import numpy as np
import torch

from lab.draw import new_figure, save
from pq import PanopticQuality

SKY, BUILDING, ROAD, SIDEWALK, CAR = range(1, 6)               # the segments
COLOURS = np.array([[120, 170, 215], [95, 95, 100], [128, 64, 128], [225, 60, 215],
                    [25, 35, 150]]) / 255


def draw_street(shift, H=256, W=512):
    """Segments [H, W] of a street whose sidewalk ends `shift` pixels too early."""
    y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    segments = torch.where(y > 60 + 25 * ((x // 64 * 37) % 5) // 4, BUILDING, SKY)
    sidewalk = x + shift < 60 + 0.9 * (H - y)
    segments = torch.where(y > 0.55 * H, torch.where(sidewalk, SIDEWALK, ROAD), segments)
    car = ((x - 330) / 70) ** 2 + ((y - 160) / 38) ** 2 < 1
    return torch.where(car, CAR, segments)


def shrink(steps):
    """The sidewalk shrinks by 0 to 120 pixels -> rows [steps, 4]: IoU, PQ, PQ-dagger, shift."""
    truth, rows = draw_street(0), []
    for shift in torch.linspace(0, 120, steps).tolist():
        metric = PanopticQuality([False] * 4 + [True])
        metric.update(draw_street(shift), range(5), truth, gt_categories=range(5))
        sidewalk = metric.compute()["per_category"][SIDEWALK - 1]
        rows.append([*(sidewalk[key] for key in ("iou", "pq", "pq_dagger")), shift])
    return np.array(rows)


def two_cars_as_one():
    """Twenty small cars are right, two large ones are taken for one -> the metrics, in percent."""
    cars = torch.zeros(80, 100, dtype=torch.int64)
    small = torch.arange(10).repeat_interleave(10)
    cars[:40] = 1 + small + 10 * torch.arange(2).repeat_interleave(20)[:, None]
    cars[40:] = 21 + torch.arange(2).repeat_interleave(50)
    metric = PanopticQuality([True])
    metric.update(cars.clamp(max=21), [0] * 21, cars, gt_categories=[0] * 22)
    return metric.compute()


def cliff(steps=241, out="figures"):
    """What PQ and PQ-dagger say while a sidewalk shrinks in `steps` steps. Prints a table, draws
    pq.png."""
    rows = shrink(steps)
    at = {}                                                    # the nearest on the same side of 50
    for iou in (46, 49, 51, 62):
        side = rows[(rows[:, 0] > 50) == (iou > 50)]
        at[iou] = side[np.abs(side[:, 0] - iou).argmin()]
    print(f"{'the paper says':>60} | measured on our sidewalk")
    for name, iou, said in (("traffic light", 46, "0"), ("pole", 49, "0"), ("", 51, ""),
                            ("sidewalk", 62, ".62")):
        text = f"Seamless, Figure 3: {name:13} IoU .{iou} -> PQ_c {said}" if name else ""
        found, pq, dagger, _ = at[iou]
        print(f"{text:>60} | IoU {found:.1f} -> PQ_c {pq:.1f}, PQ†_c {dagger:.1f}")
    text, result = "IBS, Table 1, crops: PQ_th +1.1, Acc_th -3.8, Prec_th -4.6", two_cars_as_one()
    lost = ", ".join(f"{name} {result[name] - 100:.1f}" for name in ("PQ_th", "Acc_th", "Prec_th"))
    print(f"{text:>60} | 2 of 22 cars taken for one: {lost}")
    draw_cliff(rows, at, out)


def draw_cliff(rows, at, out):
    """pq.png: two predictions beside the cliff, and both curves."""
    truth = draw_street(0)
    figure = new_figure(3.6)
    grid = figure.add_gridspec(2, 2, width_ratios=(1, 1.15))
    for k, iou in enumerate((51, 49)):
        found, pq, dagger, shift = at[iou]
        segments, axes = draw_street(shift), figure.add_subplot(grid[k, 0])
        image, wrong = COLOURS[segments.numpy() - 1], (segments != truth).numpy()
        image[wrong] = 0.35 * image[wrong] + 0.65          # errors in light
        axes.imshow(image)
        axes.set_title(f"sidewalk IoU {found:.1f}:  PQ$_c$ {pq:.1f},  PQ$^†_c$ {dagger:.1f}")
        axes.set_axis_off()
    axes, above = figure.add_subplot(grid[:, 1]), rows[:, 0] > 50
    for part, label in ((above, "PQ$_c$"), (~above, None)):
        axes.plot(rows[part, 0], rows[part, 1], color="tab:red", lw=3, label=label)
    axes.plot(rows[:, 0], rows[:, 2], color="tab:blue", lw=2, ls="--", label="PQ$^†_c$")
    for iou, label, y in ((49, "the two images", 16), (51, "", 21)):
        axes.plot(at[iou][0], at[iou][1], "o", color="tab:red", ms=9)
        axes.annotate(label, at[iou][:2], (52, y), arrowprops={"arrowstyle": "->"})
    axes.set(xlim=(20, 100), ylim=(-3, 103))
    axes.set(xlabel="IoU of the sidewalk with its ground truth (%)")
    axes.set_title("one stuff category, one image")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    save(figure, Path(out, "pq.png"))
