"""The affinity head: both orders of A Psi at the paper's size; a whole image of 1024x2048."""
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import affinity_head
import seamless
import train
from lab import demo_affinity, methods, settings
from lab.bench.common import Device, best, categories

BAR = 4e9                                                      # bytes that one image may add


def free_memory():
    """Bytes that are free: on the GPU, or on Linux in main memory."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024


def orders():
    """Seconds and peak memory of Q (Q^T Psi) and, where it fits, of (Q Q^T) Psi."""
    sizes = [4096, 16384, 32768, demo_affinity.PAPER["hw"]]
    fitting = [n for n in sizes if 4 * n * n + 2e9 < free_memory()]
    left = demo_affinity.measured("left", fitting)
    right = demo_affinity.measured("right", sizes)
    demo_affinity.print_costs(left, right)
    print("measured                           Q (Q^T Psi)                     (Q Q^T) Psi")
    for n, (seconds, peak) in right.items():
        other = "does not fit"
        if n in left:
            other = (f"{left[n][0]:9.2f} s {left[n][1] / 2 ** 30:9.3f} GiB, "
                     f"{left[n][0] / seconds:.0f} times as long")
        print(f"  {n:6d} pixels              {seconds:7.3f} s {peak / 2 ** 30:7.3f} GiB    {other}")


@torch.no_grad()
def one_image():
    """In a process of its own: 1024x2048 with 100 detections and masks, part by part, and the
    memory that it adds. Untrained scores are all alike, so each cut-off is 0."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    device, size, times = Device(), (1024, 2048), {}
    explicit = {("body", "weights"): "none", ("model", "score_threshold"): 0.0}
    values, _ = settings.resolve("cityscapes", "affinity", train.fit, explicit)
    model = methods.build("affinity", categories(), values).eval()
    model = model.to(device.device, memory_format=torch.channels_last)
    base, image = model.base, torch.rand(1, 3, *size, device=device.device)
    image = image.contiguous(memory_format=torch.channels_last)
    before = demo_affinity.resident()

    def timed(name, function):
        def call():
            timed.out = function()
            device.wait()
        times[name] = best(call, 10 if device.cuda else 2)
        return timed.out
    with device.autocast():
        start = time.perf_counter()
        prediction = model.predict(image[0])
        whole = time.perf_counter() - start
        peak = demo_affinity.resident(peak=True) - before
        if device.cuda:
            peak = torch.cuda.max_memory_allocated()
        features = timed("ResNet-50 and pyramid", lambda: base.body(image))
        found = timed("boxes and masks", lambda: base.detect(features, size)[0])
        logits = timed("semantic head", lambda: base.semantic_head(features))
        psi, channels = timed("potential", lambda: affinity_head.dynamic_potential(
            found, logits[0], base.isthing, image_size=size, variant=model.variant))
        p = timed("affinity head", lambda: model.head(features, [psi])[0])
        timed("argmax at full size",
              lambda: affinity_head.segment(p, channels, found["scores"], size=size))

        def rules():
            pasted = seamless.at_size(found, size, size)
            semantic = F.interpolate(logits.float(), size, mode="bilinear")[0].argmax(0)
            return seamless.fuse(pasted["masks"], pasted["scores"], pasted["categories"],
                                 semantic=semantic, isthing=base.isthing, score_threshold=0.0)
        timed("Seamless's fusion instead", rules)
    print(f"1024x2048, ResNet-50, {len(prediction.instances['scores'])} detections with masks, "
          f"{len(channels)} channels, {device.name}")
    for name, seconds in times.items():
        print(f"  {name:28s} {1e3 * seconds:9.1f} ms")
    ours = sum(times[k] for k in ("potential", "affinity head", "argmax at full size"))
    fusion = times["Seamless's fusion instead"]
    print(f"  potential, head and argmax   {1e3 * ours:9.1f} ms, {ours / fusion:.2f} times the "
          "fusion")
    print(f"the whole image, first time: {whole:.1f} s; memory that it adds {peak / 2 ** 30:.2f} "
          f"GiB (bar: {BAR / 1e9:.0f} GB)")
    assert peak <= BAR or device.cuda


def measure():
    """The costs of A Psi, then one image."""
    orders()
    code = "from lab.bench.bench_affinity import one_image; one_image()"
    subprocess.run([sys.executable, "-c", code], check=True)
