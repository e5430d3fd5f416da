"""The spec of lab/readers.py and lab/predict.py: data sets against tiny hand-written trees, image
files of all modes, damage named in one sentence."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import Category, DataError, Prediction, Sample, crop
from lab.predict import predict_files
from lab.readers import (Cityscapes, CocoPanoptic, read_image, write_annotation,
                         write_coco_panoptic)
from lab.runs import World
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


def test_ids_beyond_a_byte_survive(tmp_path):
    segments = torch.arange(1, 65801).view(200, 329)           # green and blue are needed
    entry = write_annotation(tmp_path, "many", segments, [1] * 65800)
    rgb = np.array(Image.open(tmp_path / "many.png")).astype(int)
    assert np.array_equal(rgb @ [1, 256, 256 ** 2], segments.numpy())
    assert len(entry["segments_info"]) == 65800 and entry["image_id"] == "many"


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


# --- Damage: one sentence with the file and the remedy ----------------------------------------
def city_tree(root, table="cityscapes", ids=IDS, ending="gtFine_instanceIds"):
    tree(root, ids, ending=ending)
    return dict(read=lambda: Cityscapes(root, "val", table), root=root, labels=root / "gtFine",
                folder=root / "leftImg8bit", image=next(root.glob("leftImg8bit/*/*/*")),
                label=next(root.glob("gtFine/*/*/*")))


def idd_tree(root):
    return city_tree(root, "idd", [[0, 1, 255], [4, 4000, 9001]], "gtFine_instancelevel3Ids")


def coco_tree(root):
    coco(root)
    labels = root / "annotations/panoptic_val2017"
    return dict(read=lambda: CocoPanoptic(root, "val2017"), root=root, folder=root / "val2017",
                labels=labels, json=labels.with_suffix(".json"), label=labels / "0001.png",
                image=root / "val2017/0001.jpg")


def put(content, kind="PNG"):
    """Replaces a file by nothing (a folder), by text or by an image; "half" of it remains."""
    def damage(path):
        half = path.read_bytes()[:path.stat().st_size // 2]
        path.unlink()
        if content is None:
            path.mkdir()
        elif isinstance(content, str):
            path.write_bytes(half if content == "half" else content.encode())
        else:
            Image.fromarray(content).save(path, kind)
    return damage


def link(path):
    path.unlink()
    path.symlink_to("nowhere")


def move(path):
    path.rename(path.with_name("moved"))


def edit(change):
    def damage(path):
        content = json.loads(path.read_text())
        change(content, content["categories"][0], *content["annotations"])
        path.write_text(json.dumps(content))
    return "json", damage


FILES = [
    ("root", move, "must hold"), ("folder", move, "must hold"), ("labels", move, "unpack"),
    ("image", put("half"), "no readable image"), ("image", put(""), "copy it again"),
    ("image", link, "is missing"), ("image", put(None), "is a folder"),
    ("image", put(np.zeros((5, 7), np.uint8)), "(5, 7)"), ("label", Path.unlink, "unpack"),
    ("label", put("[]"), "copy it again"), ("label", put("half"), "no readable image"),
    ("label", put(None), "is a folder"),
    ("label", put(np.zeros((4, 6), np.float32), "TIFF"), "mode F")]
LABELS = [("label", put(np.full((4, 6), 40, np.uint16)), "id 40,"),
          ("label", put(np.full((4, 6), 40001, np.uint16)), "id 40001,"),
          ("label", put(np.zeros((4, 6, 3), np.uint8)), "mode RGB")]
JSON = [
    ("json", Path.unlink, "unpack"), ("json", put("["), "no readable JSON"),
    ("json", put("[1]"), "no panoptic JSON"), ("json", put(None), "no readable JSON"),
    *((*edit(lambda c, *_, k=k: c.pop(k)), k) for k in ("images", "annotations", "categories")),
    *((*edit(lambda c, first, *_, k=k: first.pop(k)), k) for k in ("id", "name", "isthing")),
    (*edit(lambda c, first, *_: first.update(id=1)), "two of one id"),
    (*edit(lambda c, first, *_: first.update(isthing="no")), "isthing no"),
    (*edit(lambda c, first, *_: first.update(color=[1, 2, 999])), "999"),
    (*edit(lambda c, first, a, b: b.pop("segments_info")), "segments_info"),
    (*edit(lambda c, first, a, b: b.update(image_id=9)), "image 9"),
    (*edit(lambda c, first, a, b: b.update(a)), "two labels"),
    (*edit(lambda c, *_: c["annotations"].clear()), "no image"),
    (*edit(lambda c, first, a, b: b["segments_info"].pop()), "does not list"),
    *((*edit(lambda c, first, a, b, k=k, v=v: b["segments_info"][0].update({k: v})), words)
      for k, v, words in (("category_id", 77, "category 77"), ("id", "1", "id 1 in"),
                          ("id", -1, "id -1"), ("id", 2, "id 2"))),
    ("label", put(np.zeros((13, 17), np.uint8)), "mode L")]


@pytest.mark.parametrize("build, part, damage, words", [
    *((build, *row) for build in (city_tree, idd_tree) for row in FILES + LABELS),
    *((coco_tree, *row) for row in FILES + JSON)])
def test_damage_is_named_in_one_sentence(tmp_path, build, part, damage, words):
    t = build(tmp_path / "data")
    assert len(list(t["read"]()))
    damage(t[part])
    with pytest.raises(DataError) as error:
        list(t["read"]())
    text = str(error.value)
    assert words in text and str(tmp_path / "data") in text and "\n" not in text, text
    assert part != "image" or t["image"].name in text


# --- Images of your own -----------------------------------------------------------------------
SEEN = [[0, 102], [153, 255]]
GREY = np.array(SEEN, np.uint8)
RGB = np.stack([GREY, GREY.T, 255 - GREY], -1)
BLEND = [[255, 194], [194, 255]]                               # 255 - a (255 - v) / 255 for a = v


@pytest.mark.parametrize("name, pixels, mode, want", [
    ("a.png", GREY, "L", SEEN), ("a.png", GREY, "1", [[0, 0], [255, 255]]),
    ("a.png", RGB, "P", SEEN), ("a.tif", RGB, "CMYK", SEEN),
    ("a.png", GREY.astype(np.uint16) * 257, "I;16", SEEN),
    ("a.tif", GREY / np.float32(255), "F", SEEN), ("a.tif", GREY * np.float32(1), "F", "0 to 255"),
    ("a.tif", GREY * np.float32("nan"), "F", "nan"),
    ("a.pgm", GREY.astype(np.int32) * 257, "I", SEEN), ("a.tif", GREY * 1, "I", "32 bits"),
    ("a.png", np.dstack([GREY] * 2), "LA", BLEND), ("a.png", np.dstack([RGB, GREY]), "RGBA", BLEND),
    ("turned.png", GREY, "L", [[153, 0], [255, 102]]), ("first.gif", GREY, "L", SEEN),
    ("huge.png", np.zeros((10001, 10000), np.uint8), "L", "megapixels")])
def test_images_of_all_modes_are_read_or_refused(tmp_path, name, pixels, mode, want):
    """Their red channel. Transparent pixels are seen before white."""
    how, image = dict(exif=Image.Exif()), Image.fromarray(pixels).convert(mode)
    if name == "turned.png":                                   # by a quarter
        how["exif"][274] = 6
    if name == "first.gif":
        how = dict(save_all=True, append_images=[Image.fromarray(255 - pixels)])
    image.save(tmp_path / name, **how)
    if isinstance(want, str):
        with pytest.raises(DataError, match=f"{name} .*{want}"):
            read_image(tmp_path / name)
    else:
        image = read_image(tmp_path / name)
        assert image.dtype == torch.float32 and image.shape == (3, 2, 2)
        assert (image[0] * 255).round().tolist() == want


class Sky(torch.nn.Module):
    """All is sky."""

    def predict(self, image, size=None):
        none = dict(boxes=torch.zeros(0, 4), masks=torch.zeros(0, *size).bool(),
                    scores=torch.zeros(0), categories=torch.zeros(0).long())
        return Prediction(torch.ones(size).long(), torch.tensor([2]), torch.ones(1), none)


def test_predictions_of_equal_names_are_kept_apart_and_bad_images_named_at_the_end(tmp_path):
    paths = [tmp_path / part for part in ("a/x.png", "b/bad.png", "b/x.png", "gone.png", "X.jpg")]
    for k, path in enumerate(paths[:3] + paths[4:]):
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (5 + k, 3)).save(path)
    put("half")(paths[1])
    with pytest.raises(DataError, match="3 of 5 .*b/bad.png is no readable .*gone.png is missing"):
        predict_files(Sky(), paths, CATEGORIES, World("cpu"), tmp_path / "out")
    sizes = {p.name: Image.open(p).size for p in (tmp_path / "out").glob("*.png")}
    assert sizes == {"x.png": (5, 3), "x-2.png": (7, 3), "X-3.png": (8, 3)}
    content = json.loads((tmp_path / "out/panoptic.json").read_text())
    assert [a["image_id"] for a in content["annotations"]] == ["x", "x-2", "X-3"]
