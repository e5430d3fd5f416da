"""Measurements behind the claims of speed; pq on one core.     python tests/bench.py [pq seamless ...]

One function per subject; without arguments all of them run. Each prints its numbers and fails where one misses its bar.
"""
import argparse
import math
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))


def best(function, repeats=9):
    """Shortest wall time of some runs, in seconds, after one to warm up: the run that others disturbed least."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def street_pair(H=1024, W=2048, seed=0):
    """A picture of Cityscapes' size: 10 stuff segments in stripes, 50 things as ellipses; the prediction is off by some
    pixels and has one segment in twelve wrong. Segments [H, W] twice, categories [60]: stuff 0..9, things 10..18."""
    g = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    gt = 1 + (y * 10 // H)
    for k in range(50):
        cx, cy = torch.rand(2, generator=g) * torch.tensor([W, H])
        rx, ry = 15 + 100 * torch.rand(2, generator=g) ** 2
        gt[((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1] = 11 + k
    pred = gt.roll((4, -7), (0, 1))
    pred[pred % 12 == 5] = 0
    gt[-40:] = 0
    return pred.contiguous(), gt.contiguous(), torch.cat([torch.arange(10), 10 + torch.arange(50) % 9])


def pq():
    """PQ of a 1024x2048 pair with 60 segments against the bare histogram that it needs, and torchmetrics."""
    from pq import AveragePrecision, PanopticQuality
    pred, gt, categories = street_pair()
    isthing = torch.arange(19) >= 10

    def ours():
        metric = PanopticQuality(isthing)
        metric.update(pred, categories, gt, categories)
        return metric.compute()
    seconds, floor = best(ours), best(lambda: torch.bincount((pred * 61 + gt).flatten()))
    print(f"PQ, 1024x2048, 60 segments   {1e3 * seconds:8.1f} ms")
    print(f"bare index and bincount      {1e3 * floor:8.1f} ms      ours takes {seconds / floor:.2f} of it (bar: 4)")
    assert seconds <= 4 * floor
    try:
        from torchmetrics.detection import PanopticQuality as Torchmetrics
    except ImportError:
        print("torchmetrics is not installed: no comparison")
    else:
        def pairs(segments):                                      # [1, H, W, 2]: category and instance; 19 is void
            return torch.stack([torch.cat([torch.tensor([19]), categories])[segments], segments], -1)[None]
        theirs = Torchmetrics(things=set(range(10, 19)), stuffs={*range(10), 19}, return_per_class=True)
        a, b = pairs(pred), pairs(gt)
        slow = best(lambda: theirs(a, b), repeats=3)
        print(f"torchmetrics                 {1e3 * slow:8.1f} ms      {slow / seconds:.0f} times ours (bar: 100)")
        assert slow >= 100 * seconds

    # AP of masks: one large picture, and the 2,000 pictures of 20 cells that AdaptIS reports AP on.
    masks = pred == torch.arange(11, 61)[:, None, None]                                             # [50, H, W]
    detections = masks, torch.linspace(1, 0, 50), categories[10:]
    seconds = best(lambda: AveragePrecision(19).update(*detections, gt, categories, isthing=isthing), 3)
    print(f"mask AP, 1024x2048, 50 detections, 60 segments    {1e3 * seconds:8.1f} ms a picture")
    y, x = torch.meshgrid(torch.arange(96), torch.arange(96), indexing="ij")
    cells = y // 20 * 5 + x // 20 + 1
    found = cells.roll(2, 0) == torch.arange(1, 21)[:, None, None]

    def many():
        metric = AveragePrecision(1, kind="mask")
        for _ in range(2000):
            metric.update(found, torch.linspace(1, 0, 20), torch.zeros(20), cells.clamp(max=20), torch.zeros(20))
        return metric.compute()
    print(f"mask AP, 2000 pictures 96x96 of 20 cells          {best(many, 1):8.1f} s")


def toy_targets(count, height, width, things=12, seed=0):
    """Pictures of noise with random boxes as objects, and their targets: enough to make every head work."""
    import data
    g = torch.Generator().manual_seed(seed)
    crops = []
    for i in range(count):
        segments = 1 + (torch.arange(height)[:, None] * 4 // height).expand(height, width).clone()
        for k in range(things):
            h, w = (16 + (torch.rand(2, generator=g) ** 2 * torch.tensor([height / 2, width / 3]))).long().tolist()
            y, x = int(torch.randint(height - h, (), generator=g)), int(torch.randint(width - w, (), generator=g))
            segments[y:y + h, x:x + w] = 5 + k
        categories = torch.cat([torch.arange(4), 11 + torch.arange(things) % 8])
        sample = data.Sample(torch.rand(3, height, width, generator=g), segments, categories, torch.zeros(4 + things, dtype=torch.bool), str(i))
        crops.append(data.crop(sample, 0, 0, (height, width), image_id=i))
    return crops


def seamless():
    """Training and full-image inference of the Cityscapes model beside torchvision's Mask R-CNN at the same picture size."""
    import torchvision
    from seamless import Seamless, ledger, resnet_fpn, thing_truth
    from train import collate
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    # On a CPU the same code runs on smaller work, to be tried; the numbers of interest are a GPU's.
    batch, crop, full, repeats = (16, (512, 1024), (1024, 2048), 10) if cuda else (1, (128, 256), (256, 512), 1)
    if not cuda:
        torch.set_num_threads(torch.get_num_threads() if torch.get_num_threads() > 1 else 2)
    print(torch.cuda.get_device_name() if cuda else "no GPU: a small trial on the CPU", f"| crops {batch} x {crop}, pictures {full}, torch {torch.__version__}")
    isthing = torch.arange(19) >= 11
    ours = Seamless(isthing, resnet_fpn("resnet50")).to(device, memory_format=torch.channels_last)
    # All 1000 proposals of both networks become candidates, so untrained weights do not make the heads' work vanish.
    peer = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=9, trainable_backbone_layers=5,
                                                              min_size=crop[0], max_size=crop[1]).to(device)
    images, targets = collate(toy_targets(batch, *crop))
    images, targets = images.to(device), [t.to(device) for t in targets]
    theirs = []
    for t in targets:
        ids, boxes, _, category = thing_truth(t, isthing.to(device))
        theirs.append({"boxes": boxes, "labels": category - 10, "masks": (t.segments == ids[:, None, None]).to(torch.uint8)})

    def timed(function):
        if cuda:
            torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats()
        def call():
            function()
            if cuda:
                torch.cuda.synchronize()
        seconds = best(call, repeats)
        return seconds, torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan")

    def training(net, losses):
        optimiser = torch.optim.SGD(net.parameters(), 1e-4)
        net.train()
        def step():
            with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
                total = sum(losses().values())
            optimiser.zero_grad(set_to_none=True)
            total.backward()
            optimiser.step()
        return step

    laid_out = images.contiguous(memory_format=torch.channels_last)
    rows = {"training, seamless": timed(training(ours, lambda: ours.losses(laid_out, targets))),
            "training, torchvision": timed(training(peer, lambda: peer(list(images), theirs)))}
    peer.transform.min_size, peer.transform.max_size = (full[0],), full[1]
    picture = torch.rand(3, *full, device=device)

    @torch.no_grad()
    def inference(call):
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            call()
    ours.eval(), peer.eval()
    rows["inference, seamless"] = timed(lambda: inference(lambda: ours.predict(picture)))
    rows["inference, torchvision"] = timed(lambda: inference(lambda: peer([picture])))
    for i, (name, (seconds, memory)) in enumerate(rows.items()):
        count = batch if i < 2 else 1
        print(f"{name:24s} {1e3 * seconds:9.1f} ms  {count / seconds:7.2f} images/s  {memory:6.1f} GiB")
    parts = ledger(detections=100, extra=1)
    total = sum(row[2] for row in parts.values())
    print(f"time, ours / torchvision: training {rows['training, seamless'][0] / rows['training, torchvision'][0]:.2f}, inference "
          f"{rows['inference, seamless'][0] / rows['inference, torchvision'][0]:.2f}; multiply-adds, with / without the semantic head: "
          f"{total / (total - parts['semantic head'][2]):.2f}")


def cabb():
    """The crop-aware box loss, forward and backward, 8 images of 512 boxes of which a tenth is cut, beside Eq. 1."""
    import cabb_loss
    from cabb_loss import box_loss, free_sides
    cuda, n, crop = torch.cuda.is_available(), 8 * 512, (512, 1024)
    device, g = torch.device("cuda" if cuda else "cpu"), torch.Generator().manual_seed(0)
    torch.set_num_threads(2)

    def rectangles(count, low, high, room):
        size = low * (high / low) ** torch.rand(count, 2, generator=g)
        corner = torch.rand(count, 2, generator=g) * (room - size)
        return torch.cat([corner, corner + size], 1)
    extent = torch.tensor([crop[1], crop[0]])
    gt = rectangles(n, 8, 400, extent)                                    # inside the crop ...
    cut = torch.arange(n) % 10 == 0
    gt[cut] = rectangles(int(cut.sum()), 300, 900, extent)                # ... and every tenth larger, then moved over an edge
    gt[cut] += torch.where(gt[cut, 2:3] > 700, torch.tensor([400.0, 150, 400, 150]), torch.tensor([-250.0, -150, -250, -150]))
    anchors = cabb_loss.visible(gt, crop) + 6 * torch.randn(n, 4, generator=g)
    anchors[:, 2:] = anchors[:, 2:].maximum(anchors[:, :2] + 4)
    deltas, gt, anchors = 0.2 * torch.randn(n, 4, generator=g).to(device), gt.to(device), anchors.to(device)
    free = free_sides(gt, crop)

    def both_ways(loss):
        def call():
            leaf = deltas.clone().requires_grad_()
            loss(leaf, gt, anchors, 1 / 9, crop).sum().backward()
            if cuda:
                torch.cuda.synchronize()
        return call
    ours = plain = math.inf
    for _ in range(10):                                                   # in turns: a ratio wants both under the same conditions
        ours, plain = min(ours, best(both_ways(cabb_loss.cabb_loss), 10)), min(plain, best(both_ways(box_loss), 10))
    print(f"{torch.cuda.get_device_name() if cuda else 'two CPU cores'}: {n} boxes, {free.any(1).float().mean():.1%} of them cut at {int(free.sum())} sides")
    print(f"Eq. 1, forward and backward   {1e3 * plain:8.2f} ms")
    print(f"CABB, forward and backward    {1e3 * ours:8.2f} ms      {ours / plain:.1f} times Eq. 1 "
          + ("(bar: 3 times)" if cuda else "(bar: 10 ms; the paper: about 10 ms a batch on a GPU)"))
    if cuda:                                                              # many small kernels: the compiler can make few of them
        solver = cabb_loss.minimise
        cabb_loss.minimise = torch.compile(solver)
        compiled = best(both_ways(cabb_loss.cabb_loss), 50)
        cabb_loss.minimise = solver
        print(f"CABB, solver compiled         {1e3 * compiled:8.2f} ms      {compiled / plain:.1f} times Eq. 1")
        assert min(ours, compiled) <= 3 * plain
    else:
        assert ours <= 0.010


def isus():
    """Crops of 512x1024 per second of one loading process, from 1024x2048 PNG files on disk, and what bounds it."""
    import tempfile
    import numpy as np
    from PIL import Image
    import data
    from isus import CropSampler, build_index
    torch.set_num_threads(1)
    official = {"road": 7, "sidewalk": 8, "building": 11, "vegetation": 21, "sky": 23, "person": 24, "car": 26, "truck": 27, "sign": 20}
    with tempfile.TemporaryDirectory() as root:
        scenes, count = data.StreetScenes(8, size=(1024, 2048), seed=7), 40
        for kind in ("leftImg8bit", "gtFine"):
            Path(root, kind, "train", "town").mkdir(parents=True)
        for i, s in enumerate(scenes):
            ids = np.zeros(s.segments.shape, np.uint16)
            for k, c in enumerate(s.categories.tolist(), 1):
                name = scenes.categories[c].name
                ids[s.segments.numpy() == k] = official[name] * (1000 if name in ("person", "car", "truck") else 1) + (k if name in ("person", "car", "truck") else 0)
            Image.fromarray((s.image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)).save(Path(root, "leftImg8bit", "train", "town", f"town_{i}_leftImg8bit.png"))
            Image.fromarray(ids).save(Path(root, "gtFine", "train", "town", f"town_{i}_gtFine_instanceIds.png"))
        dataset = data.Cityscapes(root, "train")
        start = time.perf_counter()
        index = build_index(dataset)
        print(f"index                        {1e3 * (time.perf_counter() - start) / len(dataset):8.1f} ms a label, once; 2,975 of them: "
              f"{2975 * (time.perf_counter() - start) / len(dataset) / 60:.1f} min for one process")
        picture = best(lambda: data.read_picture(dataset.files[0][1]), 5)
        label = best(lambda: dataset.labels(0), 5)
        print(f"decoding a picture           {1e3 * picture:8.1f} ms\nreading a label              {1e3 * label:8.1f} ms")
        for mode in ("isus", "cus", "uniform"):
            sampler = CropSampler(dataset, (512, 1024), mode, 1024, index=index)
            for k in range(3):
                sampler.crop(k)
            start = time.perf_counter()
            for k in range(count):
                sampler.crop(k)
            seconds = (time.perf_counter() - start) / count
            print(f"{mode:28s} {1e3 * seconds:8.1f} ms a crop, {1 / seconds:.1f} crops a second and core (bar: 8); {(picture + label) / seconds:.0%} is reading")
            assert 1 / seconds >= 8


def scales():
    """What CUS and ISUS choose on the toy street, with the recipe's range of scales: sizes of the chosen things and sigma."""
    import data
    from isus import CropSampler, Kept, build_index
    streets = Kept(data.StreetScenes(60, seed=1))
    index, isthing = build_index(streets), torch.tensor([c.isthing for c in streets.categories])
    for mode in ("cus", "isus"):
        sampler = CropSampler(streets, (128, 256), mode, r_th=(0.8, 1.25), r_st=(0.8, 1.25), index=index, canonical=56)
        targets = [sampler.crop(k)[1] for k in range(400)]
        chosen = [t for t in targets if t.instance and isthing[t.categories[t.instance - 1]]]
        box, sigma = torch.stack([t.full_boxes[t.instance - 1] for t in chosen]), torch.tensor([t.scale for t in chosen])
        size = (box[:, 2:] - box[:, :2]).prod(1).sqrt()
        print(f"{mode:6s} {len(chosen)} crops for a thing: median size {size.median():.1f} px, above 56 px {(size > 56).float().mean():.0%}; "
              f"sigma median {sigma.median():.2f}, mean {sigma.mean():.2f}, at its upper limit {(sigma > 1.2499).float().mean():.0%}")


def draw_cells(first):
    """Seconds that one process takes to draw 300 pictures of cells."""
    from adaptis import OverlappingCells
    torch.set_num_threads(1)
    dataset, start = OverlappingCells(10**6, seed=1), time.perf_counter()
    for i in range(first, first + 300):
        dataset[i]
    return time.perf_counter() - start


def adaptis():
    """AdaptIS on cells: backbone and head apart, at two sizes; training and drawing of pictures on two cores."""
    import multiprocessing
    from adaptis import OverlappingCells, segment_panoptic, toy_model
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "two threads of a CPU"
    fast = device.type == "cuda" or (hasattr(torch.cpu, "_is_avx512_bf16_supported") and torch.cpu._is_avx512_bf16_supported())
    torch.set_num_threads(2)
    torch.manual_seed(0)
    print(f"on {name}, {'bf16' if fast else 'float32'}; a head on 64x64 pixels, seven points at once")

    def timed(function):
        def run():
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=fast):
                function()
            if device.type == "cuda":
                torch.cuda.synchronize()
        return 1e3 * best(run)
    model = toy_model().to(device, memory_format=torch.channels_last).eval()
    for size in (96, 384):
        image = OverlappingCells(1, size, (8 * (size // 96) ** 2, 22 * (size // 96) ** 2))[0].image.to(device)[None].contiguous(memory_format=torch.channels_last)
        features = model.encoder(image)
        shared, points = model.selection.share(features), torch.rand(1, 7, 2, device=device) * size
        backbone, once = timed(lambda: model.encoder(image)), timed(lambda: model.selection.share(features))
        head, again = timed(lambda: model.selection(features, points, shared)), timed(lambda: model.selection(features, points))
        model.selection.window, window = None, model.selection.window
        whole = timed(lambda: model.selection(features, points, shared))
        model.selection.window = window
        picture = timed(lambda: segment_panoptic(model, image[0]))
        print(f"{size}x{size}: backbone {backbone:6.2f} ms a picture, the head's shared layer {once:5.2f} ms a picture, head {head / 7:5.2f} ms a point\n"
              f"         without sharing {again / 7:5.2f} ms a point, on the whole map {whole / 7:6.2f} ms a point; "
              f"segment_panoptic {picture:.0f} ms (weights untrained)")
    model.train()
    optimiser, data = torch.optim.Adam(model.parameters(), 1e-3), OverlappingCells(10**6, seed=1)
    samples = [data[i] for i in range(8)]
    for s in samples:
        s.segments, s.categories, s.crowd = s.segments.to(device), s.categories.to(device), s.crowd.to(device)
    images = torch.stack([s.image for s in samples]).to(device, memory_format=torch.channels_last)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=fast):
            loss = sum(model.losses(images, samples).values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    trained = 8 / best(step, 20)
    print(f"training                     {trained:8.0f} pictures a second (steps of 8 pictures with 6 points each)")
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.map(draw_cells, [0, 300])
        drawn = 600 / max(pool.map(draw_cells, [600, 900]))
    print(f"drawing, two processes       {drawn:8.0f} pictures a second, {drawn / trained:.1f} times as many (bar on two cores: 10)")
    assert device.type == "cuda" or drawn >= 10 * trained


def affinity():
    """The affinity head: both orders of A Psi at the paper's size, and a whole picture of 1024x2048 through a ResNet-50."""
    import subprocess
    import affinity_head
    hw, channels, instances = 200 * 325, 128, 153                          # 800x1300 at stride 4; C; D + N_st
    cheap, dense = affinity_head.multiply_adds(hw, channels, instances)
    print(f"800x1300, d = 4, C = 128, D = 100, N_st = 53         paper | here, computed\n"
          f"  A in float32                                   15.7 GB | {4 * hw**2 / 2**30:.1f} GiB\n"
          f"  Q (Q^T Psi), operations (2 a multiply-add)    5 billion | {2 * cheap / 1e9:.2f} billion, {cheap / 1e9:.2f} G multiply-adds\n"
          f"  (Q Q^T) Psi, multiply-adds                             | {dense / 1e9:.0f} G, so {100 * (1 - cheap / dense):.1f}% fewer (paper: 99.8%)")
    if torch.cuda.is_available():
        room, where = torch.cuda.mem_get_info()[0], torch.cuda.get_device_name()
    else:
        room, where = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in open("/proc/meminfo")}["MemAvailable"], "two threads of a CPU"
    sizes = [n for n in (4096, 16384, 32768, hw) if 4 * n * n + 2e9 < room]
    right, left = affinity_head.measured("right", [4096, 16384, 32768, hw]), affinity_head.measured("left", sizes)
    print(f"measured on {where}     Q (Q^T Psi)                      (Q Q^T) Psi")
    for n, (seconds, peak) in right.items():
        other = f"{left[n][0]:9.2f} s {left[n][1] / 2**30:9.3f} GiB, {left[n][0] / seconds:.0f} times as long" if n in left else "   does not fit"
        print(f"  {n:6d} pixels                     {seconds:7.3f} s {peak / 2**30:7.3f} GiB    {other}")
    print(subprocess.run([sys.executable, __file__, "affinity_picture"], capture_output=True, text=True, check=True).stdout, end="")


def affinity_picture(bar=4.0):
    """In a process of its own: a 1024x2048 picture with 100 detections and masks, part by part, and the memory that it adds."""
    import affinity_head
    import data
    import seamless
    import train
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    torch.set_num_threads(2)
    torch.manual_seed(0)
    categories = [data.Category(str(i), i >= 11, (0, 0, 0)) for i in range(19)]
    # Untrained scores are all alike: every cut-off at 0, so that a hundred detections come through.
    args = train.settings({"dataset": "cityscapes", "method": "affinity", "weights": "none", "score_threshold": 0.0})
    model = train.Affinity(categories, args).eval().to(device, memory_format=torch.channels_last)
    base, size, times = model.base, (1024, 2048), {}
    base.region_head.score_threshold = 0.0
    image = torch.rand(1, 3, *size, device=device).contiguous(memory_format=torch.channels_last)
    before = affinity_head.resident()

    def timed(name, function):
        def run():
            out = function()
            if cuda:
                torch.cuda.synchronize()
            return out
        out, seconds = run(), []
        for _ in range(10 if cuda else 2):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        times[name] = min(seconds)
        return out
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=cuda):
        start = time.perf_counter()
        prediction = model.predict(image[0])
        whole = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() if cuda else affinity_head.resident(peak=True) - before
        count = len(prediction.instances["scores"])
        features = timed("ResNet-50 and pyramid", lambda: base.body(image))
        found = timed("boxes and masks", lambda: base.detect(features, size)[0])
        logits = timed("semantic head", lambda: base.semantic_head(features))
        psi, channels = timed("potential", lambda: model.potential(found, logits[0]))
        p = timed("affinity head", lambda: model.head(features, [psi])[0])
        timed("argmax at full size", lambda: affinity_head.segment(p, channels, found["scores"], size))
        def rules():
            return seamless.fuse(seamless.paste_masks(found["masks"], found["boxes"], size), found["scores"], found["categories"],
                                 seamless.resize_logits(logits.float(), size)[0].argmax(0), base.isthing, 0.0)
        timed("Seamless's fusion instead", rules)
    print(f"1024x2048, ResNet-50, {count} detections with masks, {len(channels)} channels, {torch.cuda.get_device_name() if cuda else 'float32 on the CPU'}")
    for name, seconds in times.items():
        print(f"  {name:28s} {1e3 * seconds:9.1f} ms")
    mine, fusion = sum(times[k] for k in ("potential", "affinity head", "argmax at full size")), times["Seamless's fusion instead"]
    print(f"  potential, head and argmax   {1e3 * mine:9.1f} ms, {mine / fusion:.2f} times the fusion\n"
          f"the whole picture, first time: {whole:.1f} s; memory that it adds {peak / 2**30:.2f} GiB (bar: {bar:.0f} GB)")
    assert peak <= bar * 1e9 or cuda


def ibs(bar=1.15):
    """What intra-batch supervision adds to a training step, in time and in memory that is kept for the backward pass."""
    import train
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    # The toy as it is trained, and Cityscapes's network on crops that a CPU can hold.
    work = {"parking": (6, (80, 160), 2), "cityscapes": (8, (512, 1024), 12) if cuda else (2, (256, 512), 12)}
    print(torch.cuda.get_device_name() if cuda else "on one core", f"| torch {torch.__version__}")
    worst = 0.0
    for dataset, (batch, crop, things) in work.items():
        for family in ("kernels", "queries"):
            args = train.settings({"dataset": dataset, "method": "ibs", "embeddings": family, "weights": "none"})
            torch.manual_seed(0)
            model = train.Unified(train.ibs.Parking.categories if dataset == "parking" else [train.data.Category(str(i), i >= 11, (0, 0, 0)) for i in range(19)], args)
            model = model.to(device, memory_format=torch.channels_last).train()
            if dataset == "parking":
                lot = train.ibs.Parking(batch, seed=1)
                crops = [train.isus.scaled_crop(lot[i], lot.size, 30, 40, crop, image_id=i) for i in range(batch)]
            else:
                crops = toy_targets(batch, *crop, things=things)
            images, targets = train.collate(crops)
            images, targets = images.to(device, memory_format=torch.channels_last), [t.to(device) for t in targets]
            seconds, memory = {0.0: [], args["ibs_weight"]: []}, {}

            def step(weight):
                model.ibs_weight = weight
                kept = {}                                     # storages that autograd keeps, each once
                def keep(t):
                    kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
                    return t
                if cuda:
                    torch.cuda.reset_peak_memory_stats(), torch.cuda.synchronize()
                start = time.perf_counter()
                with torch.autocast(device.type, torch.bfloat16, enabled=cuda), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                    total = sum(model.losses(images, targets).values())
                model.zero_grad(set_to_none=True)
                total.backward()
                if cuda:
                    torch.cuda.synchronize()
                return time.perf_counter() - start, torch.cuda.max_memory_allocated() if cuda else sum(kept.values())
            for repeat in range(25 if cuda or dataset == "parking" else 5):       # in turn, so that both meet the same machine
                for weight in seconds:
                    t, memory[weight] = step(weight)
                    seconds[weight] += [t] if repeat else []
            (off, on), (less, more) = (min(v) for v in seconds.values()), memory.values()
            print(f"  {dataset:10s} {family:8s} {batch} crops of {crop[0]}x{crop[1]}: {1e3 * off:8.1f} -> {1e3 * on:8.1f} ms, {on / off:.3f} times; "
                  f"{less / 2**20:8.1f} -> {more / 2**20:8.1f} MiB, {more / less:.3f} times")
            worst = max(worst, on / off, more / less)
    print(f"the largest of these ratios: {worst:.3f} (bar: {bar})")
    assert worst <= bar
    print("one picture of 1024x2048        parameters  multiply-adds")
    for family in ("kernels", "queries"):
        args = train.settings({"dataset": "cityscapes", "method": "ibs", "embeddings": family, "weights": "none"})
        parts = train.ibs.ledger(train.Unified([train.data.Category(str(i), i >= 11, (0, 0, 0)) for i in range(19)], args))
        for part, (p, w) in parts.items():
            print(f"  {family:8s} {part:21s} {p / 1e6:7.2f} M  {w / 1e9:9.1f} G")
        print(f"  {family:8s} {'all':21s} {sum(p for p, _ in parts.values()) / 1e6:7.2f} M  {sum(w for _, w in parts.values()) / 1e9:9.1f} G")


SUBJECTS = {"pq": pq, "seamless": seamless, "cabb": cabb, "isus": isus, "scales": scales, "adaptis": adaptis, "affinity": affinity, "ibs": ibs}
PARTS = {"affinity_picture": affinity_picture}                             # run by a subject, each in a process of its own

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="*", metavar="subject", help=", ".join(SUBJECTS))
    chosen = parser.parse_args().subjects or list(SUBJECTS)
    if chosen[0] in PARTS:
        sys.exit(PARTS[chosen[0]]())
    if unknown := [name for name in chosen if name not in SUBJECTS]:
        parser.error(f"no such subject: {', '.join(unknown)}; there are {', '.join(SUBJECTS)}")
    torch.set_num_threads(1)
    for name in chosen:
        print(f"--- {name}: {SUBJECTS[name].__doc__.splitlines()[0]}")
        SUBJECTS[name]()
