"""One contract for all methods, box losses and samplers: void and crowd teach nothing, empty input
gives 0 with gradients, numbering does not matter, autocast works, predictions are well formed."""
import dataclasses
from functools import partial

import pytest
import torch

import cabb_loss
import data
import ibs
import isus
import seamless
import train
from lab import methods, worlds

SMALL = {"seamless": ["model.rois=16", "model.proposals=20"],
         "two": ["model.rois=16", "model.proposals=20"],
         "maskrcnn": ["model.rois=16", "model.proposals=20", "model.anchor_scale=2"],
         "affinity": ["model.rois=16", "model.proposals=20", "model.channels=8"],
         "adaptis": ["model.window=(64, 96)", "model.points=2", "model.width=8",
                     "model.patience=3", "model.per_round=3"],
         "ibs": ["model.channels=8", "model.width=8"],
         "queries": ["model.channels=8", "model.queries=5"]}
METHODS = list(methods.METHODS)


@pytest.fixture(scope="module")
def scenes():
    return worlds.world("street", "val", 3)


@pytest.fixture(scope="module")
def model(request, scenes):
    flags = train.parse(["--method", request.param, "--set", "body.name=tiny", "body.width=16",
                         *SMALL[request.param]])
    torch.manual_seed(0)
    return methods.build(request.param, scenes.categories, train.arguments(flags)[0])


every_method = pytest.mark.parametrize("model", METHODS, indirect=True)


def crops(scenes, count=2):
    return data.collate([data.crop(scenes[i], 96, 160, (64, 96), image_id=i) for i in range(count)])


def losses(model, images, targets, seed=0):
    torch.manual_seed(seed)
    return model.losses(images, targets)


@every_method
def test_losses_are_finite_scalars_with_gradients_also_of_one_image_in_bf16(model, scenes):
    found = losses(model.train(), *crops(scenes))
    assert found and all(v.ndim == 0 and torch.isfinite(v) for v in found.values())
    model.zero_grad()
    sum(found.values()).backward()
    missing = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is None}
    assert missing <= {"proposal"}                             # AdaptIS trains it in a second stage
    fit = dict(steps=101, lr=0.1, lr_body=0.1, decay=0.0, decay_norms=True)
    assert sum(steps for _, _, steps in model.stages(fit)) == 101
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.isfinite(v) for v in losses(model.eval(), *crops(scenes, 1)).values())


@every_method
@pytest.mark.parametrize("what", ["void", "crowd"])
def test_void_and_crowd_teach_nothing(model, scenes, what):
    """The losses are 0, and gradients exist: DistributedDataParallel waits for none. Exempt are the
    categories of Mask R-CNN and of queries, which call all that is not matched "no object"."""
    images, targets = crops(scenes)
    if what == "void":
        none = torch.zeros(0)
        targets = [dataclasses.replace(
            t, segments=torch.zeros_like(t.segments), categories=none.long(), crowd=none.bool(),
            boxes=none.view(0, 4), full_boxes=none.view(0, 4), truncated=none.view(0, 4).bool())
            for t in targets]
    else:
        targets = [dataclasses.replace(t, crowd=torch.ones_like(t.crowd)) for t in targets]
    found = losses(model.train(), images, targets)
    model.zero_grad()
    sum(found.values()).backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    exempt = ("loss_objectness", "loss_classifier", "class")
    for name, value in found.items():
        assert name in exempt or value.item() == 0, name


@every_method
def test_the_numbering_of_segments_does_not_matter(model, scenes):
    images, targets = crops(scenes)
    first = losses(model.train(), images, targets)
    turned = []
    for t in targets:
        order = torch.arange(len(t.categories)).flip(0)
        number = torch.cat([torch.zeros(1, dtype=torch.long), order + 1])
        rows = {k: getattr(t, k)[order] for k in ("categories", "crowd", "boxes", "full_boxes",
                                                  "truncated")}
        turned.append(dataclasses.replace(t, segments=number[t.segments], **rows))
    second = losses(model, images, turned)
    for name in first:
        if name != "masks":                                    # AdaptIS draws objects by number
            assert second[name].item() == pytest.approx(first[name].item(), rel=1e-4), name


@every_method
@pytest.mark.parametrize("size", [None, (70, 101)])
def test_a_prediction_is_well_formed(model, scenes, size):
    image = scenes[0].image[:, 96:160, 160:256]
    torch.manual_seed(0)
    found = model.eval().predict(image, size)
    (height, width), n = size or (64, 96), len(found.categories)
    assert found.segments.shape == (height, width) and found.segments.dtype == torch.int64
    assert {0, *found.segments.unique().tolist()} == {*range(n + 1)}
    isthing = torch.tensor([c.isthing for c in scenes.categories])
    stuff = found.categories[~isthing[found.categories]]
    assert len(stuff) == len(stuff.unique()) and len(found.scores) == n
    assert ((found.scores >= 0) & (found.scores <= 1)).all()
    d = len(found.instances["scores"])
    for key, shape in (("boxes", (d, 4)), ("masks", (d, height, width)), ("categories", (d,))):
        assert found.instances[key].shape == shape


# --- Box losses -------------------------------------------------------------------------------
BOX_LOSSES = [cabb_loss.cabb_loss, cabb_loss.box_loss, seamless.smooth_l1_box_loss]


@pytest.mark.parametrize("loss", BOX_LOSSES)
def test_a_box_loss_is_0_at_the_truth_and_takes_no_boxes(loss):
    anchors = torch.tensor([[0., 0., 8., 8.], [4., 4., 12., 20.]])
    truth = torch.tensor([[1., 2., 9., 9.], [3., 4., 14., 18.]])
    found = loss(cabb_loss.encode(truth, anchors), truth, anchors, 0.1, (32, 32))
    assert found.shape == (2,) and found.abs().max() < 1e-6
    none = torch.zeros(0, 4, requires_grad=True)
    empty = loss(none, truth[:0], anchors[:0], 0.1, (32, 32), torch.zeros(0, 4).bool())
    assert empty.shape == (0,) and empty.sum().requires_grad


# --- Samplers ---------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", [*train.SAMPLERS])
def test_a_sampler_yields_whole_batches_that_depend_on_seed_and_step_alone(mode, scenes):
    dataset = worlds.Drawn(scenes)
    dataset.fill(1)                                            # a shared tensor is an open file
    assert not any(torch.is_tensor(v) and v.is_shared() for k in dataset.kept.values() for v in k)
    kind = ibs.PairedCropSampler if mode == "paired" else partial(isus.CropSampler, mode=mode)
    make = partial(kind, dataset, isus.build_index(dataset), size=(48, 64), seed=3, jitter=0.2)
    first = iter(make(batch=4, start=0))
    next(first)
    images, targets = next(first)
    again, same = next(iter(make(batch=4, start=1)))
    assert images.shape[0] == len(targets) == 4 and torch.equal(images, again)
    for a, b in zip(targets, same):
        assert torch.equal(a.segments, b.segments) and a.image_id == b.image_id
        assert a.segments.shape == images.shape[2:] and a.segments.max() == len(a.categories)
    halves = [make(batch=2, start=1, rank=rank, world=2).batch(1)[1] for rank in (0, 1)]
    ids = sorted(t.image_id for half in halves for t in half)
    assert ids == sorted(t.image_id for t in targets)          # two processes share the same crops
