"""The spec of isus.py: section 2.1 of "Improving Panoptic Segmentation at All Scales" (Porzi et al., CVPR 2021).

Oracles: loops over pixels, whole-number arithmetic for the nearest pixel, F.interpolate, crop(resize(sample)) of data.py, and
counting. A count of n draws with probability p may be off by five of its standard deviations, sqrt(n p (1 - p)).
"""
import dataclasses
import math
import multiprocessing
import os
from collections import Counter
from itertools import islice, product
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader

import data
import isus
import seamless
from isus import (MODES, CropSampler, Index, Target, build_index, class_uniform_choice, mask_boxes, pyramid_level, resize_window,
                  scale_for_level, scaled_crop)

torch.set_num_threads(1)


# --- Material for the tests -----------------------------------------------------------------------------------------------

SKY, CAR, SIGN, ROAD, NEVER, GROUP, TRUCK = range(7)
KINDS = [data.Category(name, name not in ("sky", "road"), (0, 0, 0))
         for name in ("sky", "car", "sign", "road", "never", "group", "truck")]


class Pictures:
    """A list of samples as a data set that remembers which labels were read."""

    def __init__(self, samples, categories=KINDS):
        self.samples, self.categories, self.read = samples, categories, []

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        return self.samples[i]

    def labels(self, i):
        self.read.append(i)
        return self.samples[i].segments, self.samples[i].categories, self.samples[i].crowd


def picture(h, w, *blocks, seed=0):
    """A noisy picture, nowhere black, of rectangles (category, y0, x0, y1, x1) or (..., True) for a crowd; later ones hide
    earlier ones."""
    segments = torch.zeros(h, w, dtype=torch.long)
    for k, (_, y0, x0, y1, x1, *_) in enumerate(blocks, 1):
        segments[y0:y1, x0:x1] = k
    image = 0.1 + 0.9 * torch.rand(3, h, w, generator=torch.Generator().manual_seed(seed))
    return data.Sample(image, segments, torch.tensor([b[0] for b in blocks], dtype=torch.long),
                       torch.tensor([len(b) > 5 for b in blocks], dtype=torch.bool), f"picture {seed}")


def town():
    """Cars wide and tall, signs of one pixel in a corner and of four at a border, a truck larger than the crops, crowds, a
    category that never occurs, one of crowds only, a picture of nothing, and a segment that is hidden altogether."""
    return Pictures([
        picture(24, 32, (SKY, 0, 0, 24, 32), (ROAD, 12, 0, 24, 32), (CAR, 13, 4, 19, 16), (CAR, 9, 20, 21, 26),
                (SIGN, 0, 31, 1, 32), (CAR, 20, 0, 24, 3, True), seed=1),
        picture(30, 20, (ROAD, 0, 0, 30, 20), (GROUP, 4, 4, 12, 12, True), (CAR, 15, 3, 22, 18, True), (SIGN, 28, 0, 30, 2),
                seed=2),
        picture(12, 40, seed=3),
        picture(16, 18, (SKY, 0, 0, 16, 18), (TRUCK, 0, 0, 16, 18), seed=4)])


def random_town(seed, n=6):
    """Pictures of random blocks; some segments are hidden, some are crowds, some pictures hold none."""
    g = torch.Generator().manual_seed(seed)
    def pick(low, high):
        return int(torch.randint(low, high, (), generator=g))
    samples = []
    for i in range(n):
        h, w, blocks = pick(3, 14), pick(3, 14), []
        for _ in range(pick(0, 7)):
            y, x = pick(0, h), pick(0, w)
            blocks.append((pick(0, 7), y, x, pick(y, h) + 1, pick(x, w) + 1) + (True,) * (pick(0, 4) == 0))
        samples.append(picture(h, w, *blocks, seed=10 * seed + i))
    return Pictures(samples)


def loop_box(segments, k):
    """The definition: smallest half-open box around the pixels of k, zeros if there are none."""
    places = [(y, x) for y, row in enumerate(segments.tolist()) for x, v in enumerate(row) if v == k]
    if not places:
        return [0, 0, 0, 0]
    ys, xs = zip(*places)
    return [min(xs), min(ys), max(xs) + 1, max(ys) + 1]


def loop_rows(dataset):
    """(picture, segment, category, crowd, box) of every segment with a pixel, by a loop."""
    return [(i, k, c, crowd, loop_box(s.segments, k)) for i, s in enumerate(dataset.samples)
            for k, (c, crowd) in enumerate(zip(s.categories.tolist(), s.crowd.tolist()), 1) if (s.segments == k).any()]


def index_rows(index):
    return list(zip(index.image.tolist(), index.segment.tolist(), index.category.tolist(), index.crowd.tolist(),
                    index.box.tolist()))


def same_index(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in Index.FIELDS)


def take(sampler, n):
    return list(islice(sampler, n))


def same(a, b):
    """Are two crops the same to the last bit?"""
    return torch.equal(a[0], b[0]) and all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
                                           for x, y in zip(vars(a[1]).values(), vars(b[1]).values()))


def chosen(t):
    """Category of the segment for whose sake the crop was taken."""
    return int(t.categories[t.instance - 1])


def uniform(counts, n, ways):
    """Do `ways` outcomes, in n draws in all, come equally often, within five standard deviations?"""
    p = 1 / ways
    return len(counts) == ways and sum(counts.values()) == n and all(
        abs(c - n * p) <= 5 * math.sqrt(n * p * (1 - p)) for c in counts.values())


def sizes(target):
    """sqrt(w h) of the chosen instance, whole."""
    x1, y1, x2, y2 = target.full_boxes[target.instance - 1].tolist()
    return math.sqrt((x2 - x1) * (y2 - y1))


def random_boxes(n, seed):
    """With sides from a quarter of a pixel to a thousand."""
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=g) * 100
    return torch.cat([corner, corner + 2 ** (12 * torch.rand(n, 2, generator=g) - 2)], 1)


# --- The heuristic "adopted by the network being trained" ------------------------------------------------------------------

@pytest.mark.parametrize("levels, canonical, k0, scale",
                         [(4, 224, 3, 1), (4, 56, 3, 1), (5, 224, 4, 1), (2, 20, 1, 1), (4, 0.1, 3, .002)])
def test_the_level_of_a_box_is_the_formula(levels, canonical, k0, scale):
    """k = max(1, min(levels, floor(k0 + log2(sqrt(w h) / canonical)))), in plain Python numbers."""
    boxes = random_boxes(200, 0) * scale
    expected = [max(1, min(levels, math.floor(k0 + math.log2(math.sqrt((x2 - x1) * (y2 - y1)) / canonical))))
                for x1, y1, x2, y2 in boxes.tolist()]
    found = pyramid_level(boxes, levels, canonical, k0)
    assert found.dtype == torch.int64 and found.tolist() == expected and len(set(expected)) == levels


def test_levels_begin_at_their_lower_end_and_are_clamped():
    """224 belongs to level 3, a little less to level 2; the smallest and the largest levels have no outer end."""
    sides = torch.tensor([0.0, 1.0, 111.9, 112.0, 223.9, 224.0, 447.9, 448.0, 100000.0])
    boxes = torch.cat([torch.zeros(9, 2), sides[:, None].expand(9, 2)], 1)
    assert pyramid_level(boxes).tolist() == [1, 1, 1, 2, 2, 3, 3, 4, 4]
    assert pyramid_level(torch.zeros(0, 4)).shape == (0,)


@pytest.mark.parametrize("levels, canonical, k0", [(4, 224, 3), (4, 56, 3), (5, 100, 4), (1, 30, 1)])
def test_the_sampler_and_the_network_agree_on_levels(levels, canonical, k0):
    """Section 2.1: "according to the heuristic adopted by the network being trained"."""
    boxes = random_boxes(500, 1)
    assert torch.equal(pyramid_level(boxes, levels, canonical, k0), seamless.pyramid_level(boxes, levels, canonical, k0))


@pytest.mark.parametrize("levels, canonical, k0", [(4, 224, 3), (4, 56, 3), (5, 224, 4), (6, 30, 1), (2, 0.3, 2), (1, 64, 1)])
def test_the_resized_instance_is_assigned_to_the_level(levels, canonical, k0):
    """Section 2.1: "a scaling factor such that the selected instance will be assigned to the selected level"."""
    g = torch.Generator().manual_seed(0)
    for box, level in product(random_boxes(25, 2), range(1, levels + 1)):
        sigma = scale_for_level(box, level, (1e-9, 1e9), g, levels, canonical, k0)
        assert isinstance(sigma, float) and pyramid_level(box[None] * sigma, levels, canonical, k0).item() == level


def test_sigma_follows_the_shape_of_thin_and_of_tiny_boxes():
    """The size of a box is sqrt(w h) whatever its sides are, a fraction of a pixel included."""
    g = torch.Generator().manual_seed(0)
    for w, h in [(0.01, 5.0), (5.0, 0.01), (0.02, 0.02), (2000.0, 0.05)]:
        for level in range(1, 5):
            sigma = scale_for_level(torch.tensor([0, 0, w, h]), level, (1e-9, 1e9), g)
            assert 1 <= sigma * math.sqrt(w * h) / (224 * 2 ** (level - 3)) < 2


@pytest.mark.parametrize("level", range(1, 5))
def test_sizes_are_log_uniform_within_the_level(level):
    """Choice of the file: a size is drawn in the whole octave, which also the first and the last level have one of."""
    g, box, n = torch.Generator().manual_seed(level), torch.tensor([5.0, 6.0, 45.0, 96.0]), 1500
    octave = [math.log2(scale_for_level(box, level, (1e-9, 1e9), g) * 60 / 224) + 3 - level for _ in range(n)]
    assert 0 < min(octave) < 0.01 and 0.99 < max(octave) < 1
    assert uniform(Counter(int(8 * v) for v in octave), n, 8)


@pytest.mark.parametrize("level", range(1, 5))
def test_sigma_is_clamped_to_r_th(level):
    """Section 2.1: "we clamp sigma to a limited range r_th", and exactly; within the range nothing changes."""
    clamped = Counter()
    for seed, box in enumerate(8 * random_boxes(100, 3)):
        free = scale_for_level(box, level, (1e-9, 1e9), torch.Generator().manual_seed(seed))
        found = scale_for_level(box, level, (0.4, 3.0), torch.Generator().manual_seed(seed))
        assert found == (0.4 if free < 0.4 else 3.0 if free > 3.0 else free)
        clamped[found if found in (0.4, 3.0) else "free"] += 1
    assert len(clamped) == 3
    assert scale_for_level(torch.zeros(4), level, (0.4, 3.0), torch.Generator()) == 3.0             # nothing at all


@pytest.mark.parametrize("level, levels", [(0, 4), (5, 4), (-1, 4), (2, 1)])
def test_a_level_that_is_none_is_refused(level, levels):
    with pytest.raises(ValueError, match=f"level {level} is none .* 1 to {levels}"):
        scale_for_level(torch.tensor([0.0, 0, 9, 9]), level, (0.5, 2), torch.Generator(), levels)


# --- What the sampler must know beforehand ----------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(4))
def test_boxes_are_the_smallest_around_each_segment(seed):
    for s in random_town(seed).samples:
        n = len(s.categories)
        boxes = mask_boxes(s.segments, n)
        assert boxes.dtype == torch.float32 and boxes.shape == (n, 4)
        assert boxes.tolist() == [loop_box(s.segments, k) for k in range(1, n + 1)]


@pytest.mark.parametrize("make", [town, *[lambda seed=seed: random_town(seed) for seed in range(4)]])
def test_the_index_has_a_row_for_every_segment_with_a_pixel(make):
    """In the order of pictures and segments; each label is read once."""
    dataset = make()
    index = build_index(dataset)
    assert index_rows(index) == loop_rows(dataset) and dataset.read == list(range(len(dataset)))
    assert index.size.tolist() == [list(s.segments.shape) for s in dataset.samples]
    assert [getattr(index, name).dtype for name in Index.FIELDS] == [torch.int64] * 3 + [torch.bool, torch.float32, torch.int64]


@pytest.mark.parametrize("make", [town, *[lambda seed=seed: random_town(seed) for seed in range(4)]])
def test_the_index_finds_pictures_and_rows_of_a_category(make):
    """Crowds count for nothing there; categories that do not occur and pictures without segments have no rows."""
    dataset = make()
    index, rows = build_index(dataset), loop_rows(dataset)
    assert index.present.tolist() == sorted({c for _, _, c, crowd, _ in rows if not crowd})
    for c in range(9):
        assert index.images_with(c).tolist() == sorted({i for i, _, kind, crowd, _ in rows if kind == c and not crowd})
        for i in range(len(dataset)):
            of = [r for r, (j, _, kind, crowd, _) in enumerate(rows) if (j, kind, crowd) == (i, c, False)]
            assert index.rows(i, c).tolist() == of
    for i, s in enumerate(dataset.samples):
        assert index.rows(i).tolist() == [r for r, row in enumerate(rows) if row[0] == i]
        assert torch.equal(index.boxes(i, len(s.categories)), data.mask_boxes(s.segments, len(s.categories)))


def test_a_helper_process_reads_the_same_index():
    assert same_index(build_index(town(), workers=1), build_index(town()))


def test_an_index_of_nothing_is_refused():
    """No picture, only void, only hidden segments, only crowds: one sentence says that there is nothing to sample."""
    hidden = picture(5, 6, (SKY, 0, 0, 5, 6), (CAR, 0, 0, 5, 6))
    hidden.segments.zero_()
    for samples in ([], [picture(5, 6)], [hidden], [picture(5, 6, (CAR, 1, 1, 3, 3, True))]):
        with pytest.raises(ValueError, match=f"none of the {len(samples)} labels has a segment .* nothing to sample"):
            build_index(Pictures(samples))


class Filed(Pictures):
    """Pictures with label files as those on disk have, one picture without a label, one whose file is missing."""

    def __init__(self, folder, samples, categories=KINDS):
        super().__init__(samples, categories)
        self.files = []
        for i in range(len(samples)):
            label = folder / f"{i}.png"
            if not label.exists() and i != 1:
                label.write_text("label")
            self.files.append((f"name{i}", folder / f"{i}.jpg", (label, None, folder / "nowhere.png", label)[i % 4]))


def use(dataset, cache, capsys):
    """Builds or loads an index -> (was it loaded?, what it said). A loaded or rebuilt one is always right."""
    index = build_index(dataset, cache)
    assert index_rows(index) == loop_rows(dataset)
    assert dataset.read in ([], list(range(len(dataset))))
    assert os.listdir(os.path.dirname(cache)) == [os.path.basename(cache)]                          # no temporary file
    return dataset.read == [], capsys.readouterr().err


def test_a_kept_index_reads_no_label(tmp_path, capsys):
    """The folder of the cache is made where it is missing; neither call has anything to say."""
    cache = str(tmp_path / "new" / "folder" / "index.pt")
    assert use(Filed(tmp_path, town().samples), cache, capsys) == (False, "")
    assert use(Filed(tmp_path, town().samples), cache, capsys) == (True, "")
    wrapper = Pictures(town().samples)
    wrapper.dataset = Filed(tmp_path, town().samples)
    use(wrapper, str(tmp_path / "new" / "wrapped" / "index.pt"), capsys)
    wrapper.read = []
    assert use(wrapper, str(tmp_path / "new" / "wrapped" / "index.pt"), capsys) == (True, "")


def rename(dataset, folder):
    dataset.categories = [*KINDS[:-1], data.Category("lorry", True, (0, 0, 0))]


def become_stuff(dataset, folder):
    dataset.categories = [*KINDS[:-1], data.Category("truck", False, (0, 0, 0))]


def fewer(dataset, folder):
    dataset.samples, dataset.files = dataset.samples[:-1], dataset.files[:-1]


def later(dataset, folder):
    os.utime(folder / "0.png", (5, 5))


def longer(dataset, folder):
    stat = os.stat(folder / "3.png")
    (folder / "3.png").write_text("another label")
    os.utime(folder / "3.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))


def other_name(dataset, folder):
    dataset.files[3] = ("other", *dataset.files[3][1:])


def appear(dataset, folder):
    (folder / "nowhere.png").write_text("a label after all")


def other_seed(dataset, folder):
    dataset.seed = 1


def inside(dataset, folder):
    dataset.dataset = SimpleNamespace(files=[("inner", None, folder / "0.png")])


@pytest.mark.parametrize("change", [rename, become_stuff, fewer, later, longer, other_name, appear, other_seed, inside])
def test_a_kept_index_of_another_data_set_is_built_anew(tmp_path, capsys, change):
    """A change of categories, number, or label files' names, sizes and times; one line says so, and the new one is kept."""
    cache = str(tmp_path / "kept" / "index.pt")
    use(Filed(tmp_path, town().samples), cache, capsys)
    for loaded in (False, True):
        dataset = Filed(tmp_path, town().samples)
        if change not in (later, longer, appear) or not loaded:
            change(dataset, tmp_path)
        found, said = use(dataset, cache, capsys)
        assert found == loaded
        assert said.count("\n") == (not loaded) and (loaded or cache in said and "another data set" in said)


@pytest.mark.parametrize("damage", [b"", b"no index", "half", "other keys"])
def test_a_damaged_index_is_built_anew(tmp_path, capsys, damage):
    cache = str(tmp_path / "kept" / "index.pt")
    use(Filed(tmp_path, town().samples), cache, capsys)
    with open(cache, "rb") as f:
        content = f.read()
    if damage == "other keys":
        torch.save({"weights": torch.zeros(3)}, cache)
    else:
        with open(cache, "wb") as f:
            f.write(content[:len(content) // 2] if damage == "half" else damage)
    found, said = use(Filed(tmp_path, town().samples), cache, capsys)
    assert not found and said.count("\n") == 1 and cache in said and "damaged" in said
    assert use(Filed(tmp_path, town().samples), cache, capsys) == (True, "")


@pytest.mark.parametrize("terminal, shown", [(True, ["7", "9", "11", "12"]), (False, ["7", "12"])])
def test_a_long_reading_shows_how_far_it_is(capsys, monkeypatch, terminal, shown):
    """Nothing in the first two seconds; then at most two numbers a second, in a file one a minute, and one line in the end."""
    now = iter(100 + 0.3 * k for k in range(99))                          # a label takes 0.3 s by this clock
    monkeypatch.setattr(isus, "time", SimpleNamespace(monotonic=lambda: next(now)))
    monkeypatch.setattr(isus.sys.stderr, "isatty", lambda: terminal, raising=False)
    build_index(Pictures(town().samples * 3))                             # 12 labels: 3.6 s
    said = capsys.readouterr().err
    assert [part.split(": ")[1].split(" ")[0] for part in said.split("\r")[1:]] == shown
    assert said.count("\n") == 1 and said.endswith("4 s\n")
    build_index(Pictures(town().samples))
    assert capsys.readouterr().err == ""


def test_random_numbers_of_others_are_left_alone():
    """Neither the index nor a crop draws from the global generator: a run that resumes goes on with the numbers it had."""
    before = torch.random.get_rng_state()
    build_index(town(), workers=1)
    take(CropSampler(town(), (9, 11)), 3)
    assert torch.equal(before, torch.random.get_rng_state())


def reader(rank, folder, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = []
    for cache in (folder / "both.pt", folder / "both.pt", folder / ("both.pt", "missing.pt")[rank]):
        dataset = town()
        index = build_index(dataset, str(cache), rank, 2)
        found.append((dataset.read, index_rows(index)))
        dist.barrier()
    queue.put((rank, found))
    dist.destroy_process_group()


def test_two_ranks_share_the_reading(tmp_path):
    """Every label is read once in all, both get the whole index. Both load it or none: if one machine has lost it, all read."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=reader, args=(rank, tmp_path, queue), daemon=True) for rank in range(2)]
    for p in processes:
        p.start()
    try:
        found = dict(queue.get(timeout=30) for _ in processes)
    finally:
        for p in processes:
            p.join(5)
            p.kill()
    for (read0, rows0), (read1, rows1) in zip(found[0], found[1]):
        assert rows0 == rows1 == loop_rows(town())
    reads = [[sorted(read) for read, _ in found[rank]] for rank in range(2)]
    assert reads == [[[0, 2], [], [0, 2]], [[1, 3], [], [1, 3]]]
    assert sorted(os.listdir(tmp_path)) in (["both.pt"], ["both.pt", "store"])                     # rank 0 alone writes


# --- A window of a resized picture ------------------------------------------------------------------------------------------

def windows(size):
    """Windows (top, left, h, w) of a picture of `size`: within, whole, over each edge, around everything, outside."""
    h, w = size
    return [(1, 2, 5, 6), (0, 0, h, w), (-3, -2, h + 7, w + 9), (-4, 1, 9, 4), (h - 3, w - 2, 9, 4), (2, -5, 3, 9),
            (h - 1, w - 1, 1, 1), (0, 0, 1, 1), (h, 0, 4, 4), (0, w, 4, 4), (-4, 0, 4, 4), (0, -4, 4, 4), (h + 9, w + 9, 4, 4),
            (-9, -9, 4, 4), (-9, w + 3, 30, 5)]


def resized_then_sliced(image, size, top, left, window):
    big = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
    out = torch.zeros(3, *window)
    for y, x in product(range(window[0]), range(window[1])):
        if 0 <= top + y < size[0] and 0 <= left + x < size[1]:
            out[:, y, x] = big[:, top + y, left + x]
    return out


@pytest.mark.parametrize("size", [(19, 23), (38, 46), (41, 77), (95, 24), (11, 13), (7, 5), (30, 9), (19, 40), (12, 23), (1, 1)])
def test_a_window_is_what_resizing_and_slicing_give(size):
    """As F.interpolate(mode="bilinear", antialias=True): larger, smaller, one side each, unchanged; black outside."""
    image = picture(19, 23).image
    for top, left, h, w in windows(size):
        found = resize_window(image, size, top, left, (h, w))
        assert found.shape == (3, h, w)
        torch.testing.assert_close(found, resized_then_sliced(image, size, top, left, (h, w)), atol=1e-5, rtol=0)


def test_an_unchanged_size_leaves_every_bit():
    image = picture(19, 23).image
    assert torch.equal(resize_window(image, (19, 23), 0, 0, (19, 23)), image)
    whole = resize_window(image, (38, 23), 0, 0, (38, 23))
    assert torch.equal(resize_window(image, (38, 23), 3, 2, (9, 9)), whole[:, 3:12, 2:11])


@pytest.mark.parametrize("old, new", [(2048, 3333), (2048, 1111), (3000, 5999), (50, 2999)])
def test_a_window_far_from_the_origin_is_exact(old, new):
    """Noise shows errors of a ten-thousandth of a pixel where coordinates are in the thousands."""
    image = torch.rand(3, 2, old, generator=torch.Generator().manual_seed(0))
    found = resize_window(image, (2, new), 0, new - 60, (2, 60))
    expected = F.interpolate(image[None], (2, new), mode="bilinear", antialias=True)[0, :, :, -60:]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


# --- A crop of a resized sample ---------------------------------------------------------------------------------------------

def crop_pairs(size, flip, seed):
    """(crop by isus, crop of the resized sample by data.py), windows of all kinds, each segment chosen once."""
    for s in random_town(seed).samples + town().samples[:2]:
        h, w = s.segments.shape
        size = (round(h * size[0]), round(w * size[1])) if isinstance(size[0], float) else size
        big = data.resize(s, size)
        big = data.flip(big) if flip else big
        for n, (top, left, *window) in enumerate(windows(size)):
            k = n % (len(s.categories) + 1)
            yield s, big, top, left, window, (scaled_crop(s, size, top, left, window, None, flip, 3, k, 1.5),
                                              data.crop(big, top, left, window, 3, k, 1.5))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [(24, 32), (30, 61), (40, 32), (70, 90)])
def test_a_crop_of_a_larger_sample_is_cropping_the_resized_one(size, flip):
    """Segments, categories, crowds, all boxes, truncation and the chosen instance exactly; black and void outside."""
    for *_, ((image, found), (expected_image, expected)) in crop_pairs(size, flip, 0):
        torch.testing.assert_close(image, expected_image, atol=1e-5, rtol=0)
        assert same((image, found), (image, expected))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [(5, 7), (3, 40), (24, 9), (1, 1), (2, 3)])
def test_a_crop_of_a_smaller_sample_has_its_segments_and_encloses_its_boxes(size, flip):
    """Segments and visible boxes exactly; a whole box is the one of the native label, from the first row or column whose
    centre falls on it to the last, so that it encloses the one that the resized label has."""
    for s, _, top, left, (h, w), ((image, found), (expected_image, expected)) in crop_pairs(size, flip, 1):
        torch.testing.assert_close(image, expected_image, atol=1e-5, rtol=0)
        for name in ("segments", "categories", "crowd", "boxes", "image_id", "instance", "scale"):
            assert torch.equal(torch.as_tensor(getattr(found, name)), torch.as_tensor(getattr(expected, name))), name
        assert (found.full_boxes[:, :2] <= expected.full_boxes[:, :2]).all()
        assert (found.full_boxes[:, 2:] >= expected.full_boxes[:, 2:]).all()
        show = [[(2 * v + 1) * old // (2 * new) for v in range(new)] for old, new in zip(s.segments.shape, size)]
        full = []
        number = {int(new): int(old) for old, new in zip(*visible(s, size, top, left, h, w, flip, found.segments))}
        for k in range(1, len(found.categories) + 1):
            x1, y1, x2, y2 = loop_box(s.segments, number[k])
            ys, xs = [y for y, v in enumerate(show[0]) if y1 <= v < y2], [x for x, v in enumerate(show[1]) if x1 <= v < x2]
            xs = [size[1] - 1 - x for x in xs] if flip else xs
            full.append([min(xs) - left, min(ys) - top, max(xs) + 1 - left, max(ys) + 1 - top])
        assert found.full_boxes.tolist() == full
        assert found.truncated.tolist() == [[a < 0, b < 0, c > w, d > h] for a, b, c, d in full]


def visible(s, size, top, left, h, w, flip, segments):
    """Old and new numbers of all pixels that the window shows, by the exact nearest pixel."""
    (height, width), old, new = s.segments.shape, [], []
    for y, x in product(range(max(top, 0), min(top + h, size[0])), range(max(left, 0), min(left + w, size[1]))):
        u = size[1] - 1 - x if flip else x
        k = int(s.segments[(2 * y + 1) * height // (2 * size[0]), (2 * u + 1) * width // (2 * size[1])])
        if k:
            old.append(k)
            new.append(int(segments[y - top, x - left]))
    return old, new


def test_native_boxes_may_be_given_or_found():
    dataset = random_town(3)
    index = build_index(dataset)
    for i, s in enumerate(dataset.samples):
        for flip, size, (top, left, *window) in product((False, True), [(30, 20), (4, 5)], windows((12, 12))[:6]):
            boxes = index.boxes(i, len(s.categories))
            assert same(scaled_crop(s, size, top, left, window, boxes, flip), scaled_crop(s, size, top, left, window, None, flip))


def test_a_target_is_the_one_of_data():
    """The same fields in the same order with the same defaults; it moves between devices whole."""
    def describe(c):
        return [(f.name, f.default) for f in dataclasses.fields(c)]
    assert describe(Target) == describe(data.Target)
    _, here = CropSampler(town(), (6, 8)).crop(0)
    there = here.to("meta")
    assert isinstance(there, Target) and here.segments.device.type == "cpu"
    for name, value in vars(there).items():
        assert value.device.type == "meta" if isinstance(value, torch.Tensor) else value == getattr(here, name)


# --- 2.1, steps 1 and 2 -----------------------------------------------------------------------------------------------------

def test_classes_are_uniform_and_then_pictures_that_contain_them():
    """Section 2.1: "1) sample a semantic class with uniform probability; 2) load an image that contains that class"."""
    index, g, n = build_index(town()), torch.Generator().manual_seed(0), 4000
    draws = Counter(class_uniform_choice(index, g) for _ in range(n))
    kinds = Counter(c for c, _ in draws.elements())
    assert set(kinds) == {SKY, CAR, SIGN, ROAD, TRUCK} and uniform(kinds, n, 5)          # no category of crowds only
    for c, images in {SKY: {0}, CAR: {0}, SIGN: {0, 1}, ROAD: {0, 1}, TRUCK: {3}}.items():
        of = Counter({i: m for (kind, i), m in draws.items() if kind == c})
        assert set(of) == images and uniform(of, kinds[c], len(images))


# --- Crop k depends on (seed, k) alone --------------------------------------------------------------------------------------

WIDE = dict(r_th=(1e-3, 1e3), canonical=32)                               # nothing clamps here, so that no two sigmas are alike


@pytest.mark.parametrize("mode", MODES)
def test_a_crop_depends_on_seed_and_number_alone(mode):
    """A new sampler, another order, a start in the middle: the same crop, so that a resumed run continues exactly."""
    def noise(image, generator):
        return image + torch.rand((), generator=generator)
    def make(**kw):
        return CropSampler(town(), (9, 11), mode, s0=20, seed=7, augment=noise, **kw)
    crops = take(make(), 8)
    assert all(same(a, b) for a, b in zip(crops, take(make(), 8)))
    assert all(same(make(start=k).crop(k), crops[k]) for k in (5, 2, 7))
    assert all(same(a, b) for a, b in zip(take(make(start=3), 5), crops[3:]))
    assert not any(same(a, b) for i, a in enumerate(crops) for b in crops[:i])


@pytest.mark.parametrize("mode", MODES)
def test_another_seed_gives_other_crops(mode):
    """And no shifted sequence either."""
    a, b = (take(CropSampler(town(), (9, 11), mode, seed=seed, **WIDE), 6) for seed in (0, 1))
    assert not any(same(x, y) for x, y in product(a, b))


@pytest.mark.parametrize("mode", MODES)
def test_ranks_interleave_to_the_sequence_of_one(mode):
    dataset = town()
    index = build_index(dataset)
    one = take(CropSampler(dataset, (9, 11), mode, start=2, index=index), 9)
    for rank in range(3):
        of = take(CropSampler(dataset, (9, 11), mode, start=2, rank=rank, world=3, index=index), 3)
        assert all(same(a, b) for a, b in zip(of, one[rank::3]))


def test_workers_deliver_the_sequence_in_order():
    """DataLoader with two workers, on the second of two ranks, from crop 5 on."""
    dataset = town()
    one = take(CropSampler(dataset, (9, 11), start=5), 14)
    sampler = CropSampler(dataset, (9, 11), start=5, rank=1, world=2)
    found = take(DataLoader(sampler, batch_size=None, num_workers=2), 7)
    assert all(same(a, b) for a, b in zip(found, one[1::2], strict=True))


# --- 2.1, steps 3 and 4: ISUS ------------------------------------------------------------------------------------------------

def many(n, mode="isus", dataset=None, crop_size=(9, 11), **kw):
    return [t for _, t in take(CropSampler(dataset or town(), crop_size, mode, **kw), n)]


@pytest.mark.parametrize("s0, levels, k0", [(0, 4, 3), (40, 4, 3), (0, 3, 2)])
def test_the_levels_of_chosen_instances_are_uniform(s0, levels, k0):
    """Section 2.1: "we also sample a random instance of that class from the image and a random feature pyramid level"; nothing
    clamps here, so that the level shows in the whole box of the instance, tiny, large or at the border."""
    targets = many(500, s0=s0, levels=levels, k0=k0, **WIDE)
    assert all(t.instance > 0 for t in targets)
    things = [t for t in targets if KINDS[chosen(t)].isthing]
    size = torch.tensor([sizes(t) for t in things])
    found = pyramid_level(torch.stack([0 * size, 0 * size, size, size], 1), levels, 32, k0)
    assert uniform(Counter(found.tolist()), len(things), levels)
    low, high = 32 * 2 ** (1 - k0), 32 * 2 ** (levels + 1 - k0)
    assert low * 0.8 < size.min() < low * 1.1 and high * 0.9 < size.max() < high * 1.1


def test_instances_of_a_class_are_uniform():
    """The wide and the tall car of picture 0; never the crowd of cars, whatever its size."""
    targets = many(500, dataset=Pictures([town()[0]]), **WIDE)
    boxes = torch.stack([t.full_boxes[t.instance - 1] for t in targets if chosen(t) == CAR])
    w, h = (boxes[:, 2:] - boxes[:, :2]).T
    assert uniform(Counter((w > h).tolist()), len(boxes), 2)
    shape = torch.maximum(w / h, h / w)                                   # 12 : 6 natively, the crowd 4 : 3
    assert (shape > 1.7).all() and (shape < 2.4).all()


@pytest.mark.parametrize("mode", ["isus", "cus"])
def test_the_chosen_segment_is_visible_and_its_class_uniform(mode):
    """Step 4: "a random crop from an area of the image where the selected class is visible", of stuff as of things, and of no
    crowd; the classes of the crops are uniform, for step 1 says so."""
    r = dict(r_th=(0.5, 100), r_st=(1, 3), canonical=32)
    targets = many(400, mode, **r)
    for t in targets:
        assert t.instance > 0 and (t.segments == t.instance).any() and not t.crowd[t.instance - 1]
    assert uniform(Counter(chosen(t) for t in targets), 400, 5)
    assert all(t.image_id in {SKY: [0], CAR: [0], SIGN: [0, 1], ROAD: [0, 1], TRUCK: [3]}[chosen(t)] for t in targets)


@pytest.mark.parametrize("crop_size", [(1, 1), (4, 40), (40, 4), (64, 64)])
def test_crops_of_any_size_show_the_chosen_instance(crop_size):
    """One pixel, narrow ones, and larger ones than the picture: a sign of one pixel, a truck larger than the crop, and all."""
    for t in many(100, crop_size=crop_size, r_th=(0.7, 30), r_st=(0.7, 2), canonical=32):
        assert t.segments.shape == crop_size and (t.segments == t.instance).any() and t.instance > 0


def test_sigma_stays_in_its_ranges():
    """Section 2.1: r_th for things, r_st for stuff, where it is uniform; sigma is recorded, and whole boxes follow it."""
    targets = many(500, r_th=(1.1, 1.6), r_st=(2, 4), canonical=32, s0=48)
    things, stuff = ([t for t in targets if KINDS[chosen(t)].isthing == kind] for kind in (True, False))
    assert all(1.1 <= t.scale <= 1.6 for t in things) and {1.1, 1.6} < {t.scale for t in things}
    assert all(2 <= t.scale < 4 for t in stuff) and uniform(Counter(int(2 * t.scale) for t in stuff), len(stuff), 4)
    dataset, rows = town(), loop_rows(town())
    for t in targets:
        rescale = 48 / min(dataset[t.image_id].segments.shape)
        native = torch.tensor([box for i, _, c, _, box in rows if (i, c) == (t.image_id, chosen(t))]).float()
        found = t.full_boxes[t.instance - 1]
        sides = (native[:, 2:] - native[:, :2]) * rescale * t.scale                      # of all segments of that class
        assert ((found[2:] - found[:2] - sides).abs().amax(1) <= 1.5).any()


@pytest.mark.parametrize("mode", ["cus", "uniform", "full"])
def test_other_modes_draw_sigma_uniformly_whatever_the_class(mode):
    """"Uniformly sample sigma from a range r_st"; r_th has no say."""
    scales = [t.scale for t in many(300, mode, r_th=(7, 8), r_st=(0.5, 2.0))]
    assert all(0.5 <= v < 2 for v in scales) and uniform(Counter(int(4 * v) for v in scales), 300, 6)


@pytest.mark.parametrize("mode", ["uniform", "full"])
def test_pictures_are_uniform_without_classes(mode):
    """All pictures, also one without a segment; no label is read for it, and no instance is chosen."""
    dataset = town()
    targets = many(300, mode, dataset)
    assert uniform(Counter(t.image_id for t in targets), 300, 4)
    assert not any(t.instance for t in targets) and not dataset.read


def test_a_given_index_is_used():
    """Nothing is read then, whatever the mode; whole boxes are the same with and without."""
    index = build_index(town())
    for mode in MODES:
        dataset = town()
        with_index = take(CropSampler(dataset, (9, 11), mode, index=index), 10)
        assert not dataset.read
        assert all(same(a, b) for a, b in zip(with_index, take(CropSampler(town(), (9, 11), mode), 10)))


# --- Sizes, places, mirrors ---------------------------------------------------------------------------------------------------

def test_the_shorter_side_is_s0_times_sigma():
    """Step 2: "re-scale it such that its shortest side matches a predefined size s0"; whole pictures without a window."""
    dataset = town()
    for s0 in (0, 15, 50):
        for image, t in take(CropSampler(dataset, None, "full", s0=s0), 40):
            h, w = dataset[t.image_id].segments.shape
            factor = (s0 / min(h, w) if s0 else 1) * t.scale
            assert list(image.shape) == [3, round(h * factor), round(w * factor)] and t.segments.shape == image.shape[1:]
            if s0:
                assert min(image.shape[1:]) == round(s0 * t.scale)


def test_a_picture_never_shrinks_to_nothing():
    for image, t in take(CropSampler(town(), None, "full", r_st=(0.001, 0.01)), 20):
        assert image.shape == (3, 1, 1)


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_whole_pictures_are_the_resized_samples(flip):
    dataset = town()
    for image, t in take(CropSampler(dataset, None, "full", r_st=(1, 3), flip=flip), 30):
        big = data.resize(dataset[t.image_id], tuple(image.shape[1:]))
        big = data.flip(big) if flip else big
        expected_image, expected = data.crop(big, 0, 0, image.shape[1:], t.image_id, 0, t.scale)
        torch.testing.assert_close(image, expected_image, atol=1e-5, rtol=0)
        assert same((image, t), (image, expected)) and not t.truncated.any()


def test_half_of_the_crops_are_mirrored():
    sample = town()[0]
    images = [image for image, _ in take(CropSampler(Pictures([sample]), None, "full", r_st=(1, 1), flip=0.3), 300)]
    mirrored = sum(torch.equal(image, sample.image.flip(-1)) for image in images)
    assert mirrored + sum(torch.equal(image, sample.image) for image in images) == 300
    assert abs(mirrored - 90) <= 5 * math.sqrt(300 * 0.3 * 0.7)


def test_a_window_stays_in_the_picture():
    """Where the resized picture is larger than the crop; these have no void and no black pixel."""
    dataset = Pictures([town()[0], town()[1], town()[3]])
    for mode in ("isus", "cus", "uniform"):
        for image, t in take(CropSampler(dataset, (14, 15), mode, r_th=(1, 9), r_st=(1, 3), canonical=32), 80):
            assert (t.segments > 0).all() and (image > 0).all()


@pytest.mark.parametrize("mode", ["isus", "cus", "uniform"])
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_smaller_pictures_are_padded_at_the_right_and_below(mode, flip):
    dataset = Pictures([town()[0], town()[1], town()[3]])
    for image, t in take(CropSampler(dataset, (41, 40), mode, r_th=(0.8, 1.2), r_st=(0.8, 1.2), flip=flip), 30):
        h, w = (round(n * t.scale) for n in dataset[t.image_id].segments.shape)
        assert (t.segments[:h, :w] > 0).all() and not t.segments[h:].any() and not t.segments[:, w:].any()
        assert (image[:, :h, :w] > 0).all() and not image[:, h:].any() and not image[:, :, w:].any()
        assert not t.truncated.any()


def numbered(h, w, *blocks):
    """A picture whose pixels tell where they are: (y w + x + 1) / 1000."""
    s = picture(h, w, *blocks)
    return dataclasses.replace(s, image=((torch.arange(h * w) + 1.0) / 1000).view(1, h, w).repeat(3, 1, 1))


def places(images, w, column=0):
    """Where the pixels [0, column] of crops of a numbered picture come from, counted."""
    return Counter(divmod(round(1000 * float(image[0, 0, column])) - 1, w) for image in images)


@pytest.mark.parametrize("y, x, flip", [(2, 3, 0.0), (2, 3, 1.0), (0, 0, 1.0), (4, 6, 1.0), (1, 6, 0.0)])
def test_all_corners_whose_window_shows_the_pixel_are_alike(y, x, flip):
    """Step 4: "a random crop from an area of the image where the selected class is visible", here one pixel."""
    dataset, n = Pictures([numbered(5, 7, (SIGN, y, x, y + 1, x + 1))]), 300
    for mode in ("cus", "isus")[:2 if y == 2 else 1]:
        images = [image for image, _ in take(CropSampler(dataset, (3, 4), mode, r_th=(1, 1), r_st=(1, 1), flip=flip), n)]
        corners = {(a, b) for a, b in product(range(3), range(4)) if a <= y < a + 3 and b <= x < b + 4}
        found = places(images, 7, -1 if flip else 0)
        assert set(found) == corners and uniform(found, n, len(corners))


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_uniform_crops_lie_anywhere(flip):
    """A window larger than the picture in one direction has one place there."""
    dataset, n = Pictures([numbered(5, 7, (SIGN, 0, 0, 1, 1))]), 300
    for window, ways in (((3, 4), 12), ((5, 2), 6), ((9, 6), 2)):
        images = [image for image, _ in take(CropSampler(dataset, window, "uniform", r_st=(1, 1), flip=flip), n)]
        assert uniform(places(images, 7, -1 if flip else 0), n, ways)


def test_the_pixel_is_uniform_among_those_of_the_chosen_segments():
    """CUS looks at the class: all its segments but crowds, weighed by their pixels; ISUS at one instance. A crop of one pixel
    tells which pixel it was."""
    s = numbered(6, 9, (ROAD, 0, 0, 6, 9), (CAR, 1, 1, 3, 3), (CAR, 2, 4, 6, 8), (SKY, 3, 5, 5, 6), (CAR, 0, 8, 6, 9, True))
    dataset = Pictures([s])
    crops = {mode: take(CropSampler(dataset, (1, 1), mode, r_th=(1, 1), r_st=(1, 1), flip=0), n)
             for mode, n in (("cus", 1000), ("isus", 400))}
    def shown(mode, kind):
        return places([image for image, t in crops[mode] if chosen(t) == kind], 9)
    for kind, segments in ((ROAD, [1]), (CAR, [2, 3]), (SKY, [4])):
        pixels = {(y, x) for y, x in product(range(6), range(9)) if s.segments[y, x] in segments}
        found = shown("cus", kind)
        assert set(found) == pixels and uniform(found, sum(found.values()), len(pixels))
    found = shown("isus", CAR)
    small = sum(m for (y, x), m in found.items() if s.segments[y, x] == 2)
    assert uniform(Counter(small=small, large=sum(found.values()) - small), sum(found.values()), 2)


def test_an_enlarged_pixel_is_hit_everywhere():
    """Twice as large, a pixel is four: the crop of one pixel shows each of them as often."""
    dataset, n = Pictures([picture(5, 7, (SIGN, 2, 3, 3, 4))]), 400
    found = Counter()
    for image, t in take(CropSampler(dataset, (1, 1), "cus", r_st=(2, 2), flip=0), n):
        assert t.full_boxes.shape == (1, 4)
        found[tuple(t.full_boxes[0].tolist())] += 1
    assert set(found) == {(-a, -b, 2 - a, 2 - b) for a, b in product((0, 1), (0, 1))} and uniform(found, n, 4)


@pytest.mark.parametrize("mode", ["isus", "cus"])
def test_whatever_resizing_keeps_of_the_chosen_is_visible(mode):
    """Stripes of one pixel in a picture of a third of its size: a row that is lost is not aimed at, one that remains is shown."""
    stripes = [(SIGN, y, 1, y + 1, 12) for y in range(0, 12, 2)]
    dataset = Pictures([picture(12, 13, (NEVER, 0, 0, 12, 13, True), *stripes),
                        picture(14, 11, *[(CAR, 0, x, 14, x + 1) for x in range(11)])])
    kept = {i: set(data.resize(s, tuple(round(n * 0.37) for n in s.segments.shape)).segments.unique().tolist()) - {0}
            for i, s in enumerate(dataset.samples)}
    counts = Counter()
    for t in many(200, mode, dataset, (2, 2), r_th=(0.37, 0.37), r_st=(0.37, 0.37)):
        counts[t.image_id, t.instance > 0] += 1
    if mode == "cus":                                                     # some stripe of the class always remains
        assert set(counts) == {(0, True), (1, True)}
    else:                                                                 # a stripe is chosen first, which may be lost
        for i, share in ((0, len(kept[0] - {1}) / 6), (1, len(kept[1]) / 11)):
            n = counts[i, True] + counts[i, False]
            assert 0 < share < 1 and abs(counts[i, True] - n * share) <= 5 * math.sqrt(n * share * (1 - share))


def test_a_segment_that_resizing_loses_is_looked_for_where_it_was():
    """A white pixel in the dark at a third of the size: no pixel of the label is left, but its glow is in the crop."""
    for y, x in product((0, 1, 7, 11), (0, 3, 6, 12)):
        s = picture(12, 13, (SIGN, y, x, y + 1, x + 1))
        s.image.zero_()[:, y, x] = 1
        lost = not data.resize(s, (4, 4)).segments.any()
        for image, t in take(CropSampler(Pictures([s]), (1, 1) if not lost else (2, 2), r_th=(0.31, 0.31)), 5):
            assert (t.instance == 0) == lost and image.max() > 0


def test_colours_are_changed_by_the_given_function():
    """`augment(image, generator)` gets the crop's image and its result is the crop's; all else stays."""
    plain, shapes = take(CropSampler(town(), (9, 11)), 5), []
    def augment(image, generator):
        assert isinstance(generator, torch.Generator)
        shapes.append(image.shape)
        return 1 - image
    found = take(CropSampler(town(), (9, 11), augment=augment), 5)
    assert shapes == [(3, 9, 11)] * 5
    assert all(same((1 - a[0], a[1]), b) for a, b in zip(plain, found))


# --- Wrong input ends in a sentence -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("wrong, sentence", [
    (dict(mode="paired"), "mode 'paired' is none of isus, cus, uniform, full"),
    (dict(crop_size=(0, 9)), "crop_size .* at least one pixel"), (dict(crop_size=(9, -1)), "crop_size .* at least one pixel"),
    (dict(crop_size=(9,)), "crop_size .* a height and a width"),
    (dict(r_th=(2, 0.5)), "r_th = .* the smaller first"), (dict(r_st=(2, 0.5)), "r_st = .* the smaller first"),
    (dict(r_th=(0, 1)), "r_th = .* positive"), (dict(r_st=(-1, 1)), "r_st = .* positive"),
    (dict(r_th=(1, math.inf)), "r_th = .* range"), (dict(r_st=(math.nan, 1)), "r_st = .* range"),
    (dict(s0=-1), "s0.* -1"), (dict(levels=0), "levels"), (dict(canonical=0), "canonical"),
    (dict(flip=1.1), "flip.* 1.1"), (dict(flip=-0.1), "flip.* -0.1"), (dict(start=-1), "-1"),
    (dict(rank=2, world=2), "rank 2 of 2"), (dict(rank=-1), "rank -1 of 1")])
def test_what_cannot_be_sampled_is_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        CropSampler(**{"dataset": town(), "crop_size": (9, 11), **wrong})


def test_the_ends_of_all_ranges_are_allowed():
    t = many(3, crop_size=(1, 1), r_th=(1, 1), r_st=(1, 1), levels=1, canonical=0.5, flip=0, rank=1, world=2)
    assert all(v.scale == 1 for v in t)


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_data_set_is_refused(mode):
    with pytest.raises(ValueError, match="has no picture"):
        CropSampler(Pictures([]), (9, 11), mode)


@pytest.mark.parametrize("mode", MODES)
def test_an_index_of_another_number_of_pictures_is_refused(mode):
    with pytest.raises(ValueError, match="index .* 4 .*data set.* 3"):
        CropSampler(Pictures(town().samples[:3]), (9, 11), mode, index=build_index(town()))


# --- What it is for -----------------------------------------------------------------------------------------------------------

def loop_entropy(counts):
    return sum(-n / sum(counts) * math.log2(n / sum(counts)) for n in counts if n)


@pytest.mark.parametrize("counts", [[7, 7, 7, 7], [0, 5, 0], [1], [3, 0, 1, 900, 12]])
def test_entropy_is_counted_in_bits(counts):
    """log2 of the number of bins if all are alike, and 0, not -0, if one has everything."""
    found = isus.entropy(torch.tensor(counts))
    assert found == pytest.approx(loop_entropy(counts), abs=1e-5) and math.copysign(1, found) == 1


def test_isus_smooths_the_distribution_of_scales():
    """Section 2.1: "in the long run, ISUS will have the effect of smoothing out the object scale distribution": of ALL things
    in the crops, not only of the chosen ones, the levels have more entropy than in uniform crops of the same streets."""
    street = data.StreetScenes(12, (96, 192))
    dataset = Pictures(list(street), street.categories)
    isthing, index, found = torch.tensor([c.isthing for c in street.categories]), build_index(dataset), {}
    for mode in ("uniform", "cus", "isus"):
        boxes = torch.cat([t.boxes[isthing[t.categories]] for _, t in
                           take(CropSampler(dataset, (72, 96), mode, r_th=(0.25, 4), canonical=28, index=index), 300)])
        found[mode] = loop_entropy(torch.bincount(pyramid_level(boxes, canonical=28)).tolist())
    assert found["isus"] > found["uniform"] + 0.1 and found["isus"] > found["cus"] + 0.05, found
