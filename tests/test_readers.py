"""The spec of lab/readers.py and lab/predict.py: data sets against tiny hand-written trees, image
files of all modes, damage named in one sentence."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

from data import Category, DataError, Sample, crop
from lab.readers import (Cityscapes, CocoPanoptic, read_image, write_annotation,
                         write_coco_panoptic)
from test_data import loop_box, random_sample


# --- Cityscapes and IDD -----------------------------------------------------------------------

def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array)).save(path)


def tree(root, ids, split="val", city="ulm", name="ulm_000000_000019", ending="gtFine_instanceIds"):
    ids = np.array(ids, np.uint16)
    pixels = np.random.default_rng(0).integers(0, 256, (*ids.shape, 3)).astype(np.uint8)
    save(root / f"leftImg8bit/{split}/{city}/{name}_leftImg8bit.png", pixels)
    save(root / f"gtFine/{split}/{city}/{name}_{ending}.png", ids)
    return root


def decoded(sample):
    """Each pixel's (category, crowd), None where void; segments are checked to be 1..N."""
    found = sorted(set(sample.segments.unique().tolist()) - {0})
    assert found == list(range(1, len(sample.categories) + 1))
    rows = [None, *zip(sample.categories.tolist(), sample.crowd.tolist())]
    return [[rows[k] for k in row] for row in sample.segments.tolist()]


IDS = [[7, 7, 7, 1, 26001, 26001], [7, 23, 0, 26, 26, 26000], [8, 23, 29000, 24, 33000, 4],
       [8, 7, 11, 31002, 25, 33]]
TRAIN_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]  # official


def test_cityscapes(tmp_path):
    """Stuff: one segment a category; things: one an instance; a thing's id below 1000: crowd; what
    is not evaluated: void. Labels are read without the image."""
    for city in ("ulm", "aachen"):
        tree(tmp_path, IDS, city=city, name=f"{city}_000000_000001")
    d = Cityscapes(tmp_path, "val")
    assert [s.name for s in d] == ["aachen_000000_000001", "ulm_000000_000001"]
    assert d.category_ids == TRAIN_IDS and [c.name for c in d.categories if c.isthing] == [
        "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"]
    assert d.categories[0].name == "road"
    assert d.categories[6] == Category("traffic light", False, (250, 170, 30))
    s, number = d[0], {}
    for id, found, k in zip(sum(IDS, []), sum(decoded(s), []), s.segments.flatten().tolist()):
        official = id // 1000 if id >= 1000 else id
        evaluated = official in TRAIN_IDS
        assert found == ((TRAIN_IDS.index(official), id in (24, 25, 26, 33)) if evaluated else None)
        assert number.setdefault(id, k) == k
    for file in tmp_path.glob("leftImg8bit/*/*/*.png"):
        pixels = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
        assert torch.equal((read_image(file) * 255).round().byte(), pixels)
        file.write_bytes(b"")
    assert all(map(torch.equal, d.labels(0), (s.segments, s.categories, s.crowd)))


def test_idd_has_level_3_labels_and_a_test_split_none(tmp_path):
    """255 is void; images of two drives may have the same name."""
    for drive in ("201", "77"):
        tree(tmp_path, [[0, 1, 255, 4], [4000, 12003, 25, 9001]], city=drive, name="frame0029",
             ending="gtFine_instancelevel3Ids")
    d = Cityscapes(tmp_path, "val", table="idd")
    assert sum(c.isthing for c in d.categories) == 9 and d.category_ids == list(range(26))
    assert [s.name for s in d] == ["201_frame0029", "77_frame0029"]
    assert decoded(d[0]) == [[(0, False), (1, False), None, (4, True)],
                             [(4, False), (12, False), (25, False), (9, False)]]
    tree(tmp_path, IDS, split="test")
    next(tmp_path.glob("gtFine/test/*/*.png")).unlink()
    s = Cityscapes(tmp_path, "test")[0]
    assert s.segments.shape == (4, 6) and s.segments.dtype == torch.int64
    assert not s.segments.any() and len(s.categories) == len(s.crowd) == 0
    assert crop(s, 0, 0, (2, 2))[1].boxes.shape == (0, 4)


# --- COCO's format ----------------------------------------------------------------------------

CATEGORIES = [Category("grass", False, (1, 2, 3)), Category("cow", True, (4, 5, 6)),
              Category("sky", False, (7, 8, 9))]


def coco(root, split="val2017", **options):
    """A tiny data set, labels written by write_coco_panoptic -> the samples it was made of."""
    samples = []
    for i in range(2):
        s, categories = random_sample(i), torch.tensor([1, 0, 1, 2, 1])
        s = Sample(s.image, s.segments, categories, s.crowd & (categories == 1), "")
        _, t = crop(s, 0, 0, (13, 17))
        samples.append(Sample(None, t.segments, t.categories, t.crowd, f"{i:04d}"))
        save(root / split / f"{i:04d}.jpg", np.full((13, 17, 3), 40 * i, np.uint8))
    rows = ((s.name, s.segments, s.categories, s.crowd) for s in samples)
    write_coco_panoptic(root / "annotations" / f"panoptic_{split}", rows, CATEGORIES, **options)
    return samples


def test_coco_panoptic_round_trip(tmp_path):
    """Then an independent reader: id = R + 256 G + 256^2 B, areas and boxes by loops."""
    samples = coco(tmp_path, category_ids=[200, 7, 31], image_ids={"0000": 42})
    d = CocoPanoptic(tmp_path, "val2017")
    assert len(d) == 2 and d.categories == CATEGORIES and d.category_ids == [200, 7, 31]
    assert d.image_ids == {"0000": 42, "0001": "0001"}
    content = json.loads((tmp_path / "annotations/panoptic_val2017.json").read_text())
    assert content["images"][0] == {"id": 42, "file_name": "0000.png", "height": 13, "width": 17}
    assert content["categories"][1] == {"id": 7, "name": "cow", "isthing": 1, "color": [4, 5, 6]}
    for s, r, a in zip(samples, d, content["annotations"]):
        assert torch.equal(s.segments, r.segments) and torch.equal(s.categories, r.categories)
        assert torch.equal(s.crowd, r.crowd) and r.name == s.name and r.image.shape == (3, 13, 17)
        png = np.array(Image.open(tmp_path / "annotations/panoptic_val2017" / a["file_name"]))
        ids = (png.astype(int) @ [1, 256, 256 ** 2]).tolist()
        assert ids == s.segments.tolist() and len(a["segments_info"]) == len(s.categories)
        for k, info in enumerate(a["segments_info"], 1):
            x1, y1, x2, y2 = loop_box(ids, k)
            assert info == {"id": k, "category_id": [200, 7, 31][s.categories[k - 1]],
                            "area": sum(ids, []).count(k), "bbox": [x1, y1, x2 - x1, y2 - y1],
                            "iscrowd": int(s.crowd[k - 1])}
    assert abs(float(r.image.mean()) - 40 / 255) < .01


def test_ids_beyond_a_byte_survive_and_files_may_be_written_apart(tmp_path):
    """65800 segments need the green and the blue channel. A segment without pixels is not listed;
    numpy arrays are as good as tensors."""
    segments = torch.arange(1, 65801).view(200, 329)
    entry = write_annotation(tmp_path, "many", segments, [1] * 65800)
    rgb = np.array(Image.open(tmp_path / "many.png")).astype(int)
    assert np.array_equal(rgb @ [1, 256, 256 ** 2], segments.numpy())
    assert len(entry["segments_info"]) == 65800 and entry["image_id"] == "many"
    entry = write_annotation(tmp_path / "p", "x", np.array([[0, 3], [1, 1]]), [0, 2, 1, 1])
    assert [(i["id"], i["category_id"]) for i in entry["segments_info"]] == [(1, 0), (3, 1)]


@pytest.mark.parametrize("split, pngs, js, images", [
    ("val2017", "annotations/panoptic_val2017", "../panoptic_val2017.json", "val2017"),
    *(("validation", f"validation/{v}panoptic", f"panoptic_{year}.json", "validation/images")
      for v, year in (("v2.0/", 2020), ("v1.2/", 2018), ("", 2018)))])
def test_coco_and_vistas_layouts_are_read(tmp_path, split, pngs, js, images):
    """Two segments of one stuff category become one; crowd is kept; so are official numbers."""
    ids = np.array([[70000, 70000, 0], [513, 2, 2]])
    infos = [{"id": 70000, "category_id": 9, "iscrowd": 1}, {"id": 513, "category_id": 5},
             {"id": 2, "category_id": 5}]
    rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
    save(tmp_path / pngs / "b.png", rgb)
    save(tmp_path / images / "b.jpg", np.zeros((2, 3, 3), np.uint8))
    (tmp_path / pngs / js).write_text(json.dumps({
        "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 3, "file_name": "b.jpg"}],
        "annotations": [{"image_id": 3, "file_name": "b.png", "segments_info": infos}],
        "categories": [{"id": 9, "name": "cow", "isthing": 1},
                       {"id": 5, "name": "sky", "isthing": 0}]}))
    d = CocoPanoptic(tmp_path, split)
    assert d[0].segments.tolist() == [[1, 1, 0], [2, 2, 2]] and d[0].categories.tolist() == [0, 1]
    assert d[0].crowd.tolist() == [True, False] and d[0].name == "b" and len(d) == 1
    assert d.category_ids == [9, 5] and d.image_ids == {"b": 3}
    assert all(len(c.colour) == 3 and max(c.colour) < 256 for c in d.categories)


# --- Refusals: one sentence with the file and the remedy --------------------------------------

LABEL = "gtFine/val/ulm/ulm_000000_000019_gtFine_instanceIds.png"
JS, JPG = "annotations/panoptic_val2017.json", "val2017/0001.jpg"


def ids(value):
    return lambda path: save(path, np.full((4, 6), value, np.uint16))


def replace(old, new):
    return lambda path: path.write_bytes(path.read_bytes().replace(old, new))


@pytest.mark.parametrize("file, damage, words", [
    (LABEL, lambda p: p.unlink(), [LABEL, "unpack gtFine"]),
    (LABEL, lambda p: save(p, np.array(IDS, np.uint16).T), [LABEL, "(6, 4)", "(4, 6)"]),
    (LABEL, ids(34), [" 34,"]), (LABEL, ids(34000), [" 34000,"]),
    (LABEL, lambda p: p.write_bytes(b""), [LABEL, "copy it again"]),
    (LABEL, lambda p: p.write_bytes(p.read_bytes()[:60]), [LABEL, "copy it again"]),
    (JPG, lambda p: p.unlink(), ["0001.jpg is missing"]),
    (JS, lambda p: p.unlink(), [JS, "unpack"]),
    (JS, lambda p: p.write_text("["), [JS, "no readable JSON"]),
    (JS, lambda p: p.write_text("[1]"), [JS, "no panoptic JSON"]),
    (JS, replace(b'"images"', b'"pictures"'), [JS, "images"]),
    (JS, replace(b'{"id": 1,', b'{"id": 9,'), ["0000.png", " 1:"]),
    (JS, replace(b'"category_id": 0', b'"category_id": 77'), [".png", " 77:"])])
def test_damage_is_named_in_one_sentence(tmp_path, file, damage, words):
    tree(tmp_path, IDS)
    coco(tmp_path)
    damage(tmp_path / file)
    with pytest.raises(DataError) as error:
        list(Cityscapes(tmp_path, "val") if file == LABEL else CocoPanoptic(tmp_path, "val2017"))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
