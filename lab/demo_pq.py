"""The demo of pq.py: the cliff of PQ at an IoU of 1/2, on a sidewalk that shrinks pixel by
pixel."""

from pathlib import Path

import numpy as np
import torch

from lab.draw import save
from pq import PanopticQuality


def draw_street(shift, H=256, W=512):
    """Segments [H, W] 1 sky 2 building 3 road 4 sidewalk 5 car; the sidewalk ends `shift` pixels
    too early."""
    y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    segments = torch.where(y > 60 + 25 * ((x // 64 * 37) % 5) // 4, 2, 1)
    segments[y > 0.55 * H] = 3 + (x + shift < 60 + 0.9 * (H - y)).long()[y > 0.55 * H]
    segments[((x - 330) / 70) ** 2 + ((y - 160) / 38) ** 2 < 1] = 5
    return segments


def cliff(steps=241, out="figures"):
    """What PQ and PQ-dagger say while a sidewalk shrinks in `steps` steps. Prints a table, draws
    pq.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["font.size"] = 13

    truth, rows = draw_street(0), []
    for shift in torch.linspace(0, 120, steps).tolist():
        metric = PanopticQuality([False] * 4 + [True])
        metric.update(draw_street(shift), range(5), truth, range(5))
        rows.append(
            [metric.compute()["per_category"][3][key] for key in ("iou", "pq", "pq_dagger")]
            + [shift]
        )
    rows = np.array(rows)  # [shifts, 4]
    at = {iou: rows[np.abs(rows[:, 0] - iou).argmin()] for iou in (46, 49, 51, 62)}

    print(f"{'the paper says':>60} | measured on our sidewalk")
    for name, iou in (("traffic light", 46), ("pole", 49), ("", 51), ("sidewalk", 62)):
        said = (
            f"Seamless, Figure 3: {name:13} IoU .{iou} -> PQ_c {'.62' if iou == 62 else 0}"
            if name
            else ""
        )
        print(f"{said:>60} | IoU {at[iou][0]:.1f} -> PQ_c {at[iou][1]:.1f}, PQ†_c {at[iou][2]:.1f}")
    cars = torch.zeros(80, 100, dtype=torch.int64)  # twenty small cars, and two large ones that are
    cars[:40] = (
        1
        + torch.arange(10).repeat_interleave(10)
        + 10 * torch.arange(2).repeat_interleave(20)[:, None]
    )
    cars[40:] = 21 + torch.arange(2).repeat_interleave(50)  # taken for one
    metric = PanopticQuality([True])
    metric.update(cars.clamp(max=21), [0] * 21, cars, [0] * 22)
    lost = ", ".join(
        f"{name} {metric.compute()[name] - 100:.1f}" for name in ("PQ_th", "Acc_th", "Prec_th")
    )
    print(
        f"{'IBS, Table 1, crops: PQ_th +1.1, Acc_th -3.8, Prec_th -4.6':>60} | 2 of 22 cars taken for one: {lost}"
    )

    colours = (
        np.array([[120, 170, 215], [95, 95, 100], [128, 64, 128], [225, 60, 215], [25, 35, 150]])
        / 255
    )
    figure = plt.figure(figsize=(10, 4.7), dpi=110, layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1, 1.15))
    for k, iou in enumerate((51, 49)):
        segments, axes = draw_street(at[iou][3]), figure.add_subplot(grid[k, 0])
        image, wrong = colours[segments.numpy() - 1], (segments != truth).numpy()
        image[wrong] = 0.35 * image[wrong] + 0.65  # errors in light
        axes.imshow(image)
        axes.set_title(
            "sidewalk IoU {:.1f}:  PQ$_c$ {:.1f},  PQ$^†_c$ {:.1f}".format(*at[iou]), fontsize=13
        )
        axes.set_axis_off()
    axes, above = figure.add_subplot(grid[:, 1]), rows[:, 0] > 50
    for part, label in ((above, "PQ$_c$"), (~above, None)):
        axes.plot(rows[part, 0], rows[part, 1], color="tab:red", lw=3, label=label)
    axes.plot(rows[:, 0], rows[:, 2], color="tab:blue", lw=2, ls="--", label="PQ$^†_c$")
    for iou, label, y in ((49, "the two images", 16), (51, "", 21)):
        axes.plot(at[iou][0], at[iou][1], "o", color="tab:red", ms=9)
        axes.annotate(label, at[iou][:2], (52, y), arrowprops={"arrowstyle": "->"})
    axes.set(xlim=(20, 100), ylim=(-3, 103), xlabel="IoU of the sidewalk with its ground truth (%)")
    axes.set_title("one stuff category, one image", fontsize=13)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    save(figure, Path(out, "pq.png"))
    plt.close(figure)
