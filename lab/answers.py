"""What lab/exercise.py looks for, and a solution of each exercise. Try before you read it."""
from dataclasses import dataclass
from typing import Callable, Optional

import torch

import isus
from data import Category, Sample, crop
from lab.demo_isus import Crops, spread
from lab.worlds import world
from pq import PanopticQuality


@dataclass(frozen=True)
class Answer:
    """change: (old, new) texts of one solution. fail: tests that must notice the reader's change;
    hold: tests that must not. measure: a function -> a number (None: the tests alone decide);
    `what` it is; right(before, now): is it as asked; wanted: what was asked. why: the sentence
    that the reader is left with."""
    change: tuple
    fail: tuple = ()
    hold: tuple = ()
    why: str = ""
    measure: Optional[Callable] = None
    what: str = ""
    right: Optional[Callable] = None
    wanted: str = ""


ANSWERS = {}

# --- data.py ----------------------------------------------------------------------------------
LOOPS = "test_a_crop_is_what_loops_over_its_pixels_find"
COLLATE = "test_collate_pads_with_black_and_void"


def one_crop(rows, window, size=None):
    """The Target of a crop at the upper left of a label `rows`; segments 1, 2, ... have the
    categories 0, 1, ..."""
    segments = torch.tensor(rows)
    n = int(segments.max())
    sample = Sample(torch.zeros(3, *segments.shape), segments, torch.arange(n),
                    torch.zeros(n, dtype=torch.bool), "")
    return crop(sample, 0, 0, window, size=size)[1]


ANSWERS["data", 1] = Answer(
    change=(("full[:, :2] < 0, full[:, 2:] > torch", "full[:, :2] <= 0, full[:, 2:] >= torch"),),
    fail=(LOOPS,), hold=(COLLATE,),
    measure=lambda: int(one_crop([[0, 0, 0, 0], [0, 1, 1, 0]], (2, 3)).truncated.sum()),
    what="sides marked as cut, of a thing that ends at the crop's right and lower edge",
    right=lambda before, now: now == 2, wanted="They must be the two that touch.",
    why="An object that ends where the crop ends is whole: a free side would teach nothing of it.")
ANSWERS["data", 2] = Answer(
    change=(("sample.segments[rows[slice(*y), None], columns[slice(*x)]]",
             'torch.nn.functional.interpolate(\n            sample.segments[None, None].float(), '
             '(new_h, new_w),\n            mode="bilinear")[0, 0, slice(*y), slice(*x)].round()'
             '.long()'),),
    fail=(LOOPS,), hold=(COLLATE,),
    measure=lambda: int((one_crop([[1, 1, 3, 3]], (2, 8), (2, 8)).categories == 1).sum()),
    what="segments of category 1 in a crop of a label with the categories 0 and 2",
    right=lambda before, now: now > before, wanted="Bilinear resizing finds one.",
    why="Half way between segments 1 and 3 lies 2, another object. Numbers of segments are names.")
ANSWERS["data", 3] = Answer(
    change=(("x1, x2 = (torch.searchsorted(columns, boxes[:, i].long()) for i in (0, 2))",
             "x1, y1, x2, y2 = mask_boxes(sample.segments[rows][:, columns], len(boxes)).T.long()"),
            ("    y1, y2 = (torch.searchsorted(rows, boxes[:, i].long()) for i in (1, 3))\n", "")),
    fail=(LOOPS,), hold=(COLLATE,),
    measure=lambda: one_crop([[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1]], (1, 3),
                             (1, 3)).full_boxes[0, 0].item(),
    what="left side of a thing with a thin tip, when half the resolution shows nothing of the tip",
    right=lambda before, now: now > before, wanted="The tip must be lost.",
    why="A tip that is narrower than a new pixel has no centre below it.")

# --- pq.py ------------------------------------------------------------------------------------


def jump():
    """PQ of a thing of IoU .51 minus that of a thing of IoU .49."""
    found = []
    for share in (49, 51):
        metric, truth = PanopticQuality([True]), torch.ones(1, 100, dtype=torch.int64)
        metric.update((torch.arange(100)[None] < share).long(), [0], truth, gt_categories=[0])
        found.append(metric.compute()["PQ"])
    return found[1] - found[0]


ANSWERS["pq", 1] = Answer(
    change=(("match, pairs = same & (iou > 0.5)", "match, pairs = same & (iou >= 0.5)"),),
    fail=("test_tp_fp_fn_by_hand", "test_all_measures_agree_with_a_loop_over_segments"),
    hold=("test_the_cliff",),
    why='"Each has at most one match" is no longer true: both halves of a thing match it.')
ANSWERS["pq", 2] = Answer(
    change=(("pred_categories, spurious.double())\n",
             "pred_categories, spurious.double())\n"
             "        alone = (pred_area > 0) & ~pairs.any(1)\n"
             '        self.sums["pairs"].index_add_(0, pred_categories, alone.double() / 2)\n'),
            ('("pairs", pairs.sum(0)),',
             '("pairs", pairs.sum(0) + ((gt_area > 0) & ~crowd & ~pairs.any(0)) / 2),')),
    fail=("test_pq_dagger_ignores_stuff_without_a_partner",),
    hold=("test_tp_fp_fn_by_hand", "test_pq_sq_rq_equal_the_official_evaluation"),
    why="Stuff that is invented or missed now costs something, as it does in PQ.")
ANSWERS["pq", 3] = Answer(
    change=(('("iou", torch.where(match, iou, 0)', '("iou", torch.where(match, 2 * iou - 1, 0)'),),
    fail=("test_the_cliff",), hold=("test_confusion_agrees_with_a_loop",),
    measure=jump, what="PQ at an IoU of 0.51 minus PQ at an IoU of 0.49",
    right=lambda before, now: 0 <= now < 5, wanted="It must be less than 5.",
    why="The price: masks of every IoU are worth less, or one truth may have two matches.")

# --- isus.py ----------------------------------------------------------------------------------
FROZEN = "test_the_crops_of_a_seed_stay_what_they_are"
UNIFORM = "test_categories_are_uniform_and_then_images_that_contain_them"


class TwoCars(torch.utils.data.Dataset):
    """One image with a small car and one that is eight times as large, far from each other."""
    categories = [Category("car", True, (0, 0, 0))]

    def __len__(self):
        return 1

    def __getitem__(self, i):
        segments = torch.zeros(48, 256, dtype=torch.int64)
        segments[20:24, 4:8], segments[8:40, 220:252] = 1, 2
        return Sample(torch.zeros(3, 48, 256), segments, torch.tensor([0, 0]),
                      torch.tensor([False, False]), "")

    def labels(self, i):
        """Segments, categories, crowd."""
        sample = self[i]
        return sample.segments, sample.categories, sample.crowd


def as_asked():
    """The share of crops that are placed at a car of 4 to 64 pixels, the sizes of the four levels
    here."""
    cars = TwoCars()
    sampler = isus.CropSampler(cars, isus.build_index(cars), size=(32, 32), canonical=16,
                               scale_things=(0.01, 100))
    targets = [sampler.crop(k)[1] for k in range(200)]
    boxes = torch.stack([t.full_boxes[t.instance - 1] for t in targets if t.instance])
    size = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
    return ((size > 3) & (size < 66)).float().mean().item()


def sizes():
    """How many sizes a sign has that is brought to level 3 a hundred times."""
    generator, sign = torch.Generator().manual_seed(0), torch.tensor([0.0, 0, 28, 112])
    return len({isus.scale_for_level(sign, 3, (0.01, 100), generator) for _ in range(100)})


def bits():
    """The entropy of the levels of all things in 200 crops of ISUS, scales 0.25 to 4."""
    streets = world("street", "train", 12)
    crops = Crops(streets, isus.build_index(streets), "isus", (0.25, 4.0), count=200)
    return spread(crops.levels())[0]


ANSWERS["isus", 1] = Answer(
    change=(("torch.rand((), generator=generator, dtype=torch.float64).item()", "0.5"),),
    fail=(FROZEN,), hold=("test_the_resized_instance_is_assigned_to_the_level", UNIFORM),
    measure=sizes, what="sizes of a sign that is brought to level 3 a hundred times",
    right=lambda before, now: now == 1, wanted="It must be one.",
    why="Chosen things then have four sizes. All others are seen only where they come along.")
ANSWERS["isus", 2] = Answer(
    change=(('place="category", levels=4', 'place="instance", levels=4'),),
    fail=(FROZEN,), hold=("test_the_crop_shows_the_chosen_segment", UNIFORM), measure=as_asked,
    what="share of crops placed at a thing of a size that a level asks for (cars of 1 and 8)",
    right=lambda before, now: before < 0.8 < now, wanted="It must rise: no other is shown.",
    why="Places are uniform in the category's pixels. So the crop mostly shows the largest "
        "instance, at a scale that another one may have decided.")
ANSWERS["isus", 3] = Answer(
    change=(("level = int(torch.randint(1, self.levels + 1, (), generator=g))",
             "level = self.levels"),),
    hold=(UNIFORM,), measure=bits, what="bits, the entropy of the levels of all things in crops",
    right=lambda before, now: now > before + 0.15, wanted="It must gain 0.15 bits.",
    why="A crop shows eight things, and one was chosen: small ones come along with any. One more "
        "equal way is to choose the highest level always.")

# --- cabb_loss.py -----------------------------------------------------------------------------
MINIMUM = "test_o1_reaches_the_global_minimum"
ANSWERS["cabb_loss", 1] = Answer(
    change=(("return free if truncated is None else free & truncated", "return free"),),
    fail=("test_a_side_is_free_if_it_is_marked_and_at_the_edge",), hold=(MINIMUM,),
    why="A car that ends where the crop ends is whole; a free side lets its box grow at no cost.")
ANSWERS["cabb_loss", 2] = Answer(
    change=(("    t_min, t_pred = bound.log(), pred.log()\n",
             "    return torch.maximum(omega_min, omega_pred)\n"
             "    t_min, t_pred = bound.log(), pred.log()\n"),),
    fail=(MINIMUM, "test_one_box_by_hand"),
    hold=("test_a_box_inside_the_crop_costs_the_standard_loss",),
    why="A hinge keeps the predicted size. The nearest box trades centre against size.")
ANSWERS["cabb_loss", 3] = Answer(
    change=((".maximum(t_hat - math.log(2)),    # regime 4\n"
             "                       t_pred.maximum(near_hat)])",
              ".maximum(t_hat - math.log(2))])"),
            (",\n                        t_hat.minimum(near_pred)])", "])")),
    fail=(MINIMUM,), hold=("test_a_box_inside_the_crop_costs_the_standard_loss",),
    why="Those near the set, a bit too small: centre and size are both in their quadratic part.")

# --- seamless.py ------------------------------------------------------------------------------
HARDEST = "test_the_hardest_quarter_of_the_known_pixels_is_learnt"
FUSION = "test_fusion_equals_the_pixel_by_pixel_algorithm"
ANSWERS["seamless", 1] = Answer(
    change=(("inside = (anchors[:, :2] >= 0).all(1) & (anchors[:, 2] <= w) & (anchors[:, 3] <= h)",
             "inside = torch.ones_like(level, dtype=torch.bool)"),),
    fail=("test_the_proposal_head_gives_each_anchor_its_five_channels",),
    hold=("test_the_proposal_losses_equal_the_sum_over_anchors",),
    why="Half of an anchor that reaches beyond the crop sees nothing; cut boxes begin there.")
ANSWERS["seamless", 2] = Answer(
    change=(("target, fraction=0.25)", "target, fraction=1.0)"),), fail=(HARDEST,), hold=(FUSION,),
    why="Small categories suffer: their few pixels weigh little in a mean over all pixels.")
ANSWERS["seamless", 3] = Answer(
    change=(("scores.argsort(descending=True, stable=True)", "scores.argsort(stable=True)"),),
    fail=(FUSION,), hold=(HARDEST,),
    why="A weak detection takes its pixels first, and the sure one is then rejected.")

# --- ibs.py -----------------------------------------------------------------------------------
FOCAL = "test_the_loss_is_the_focal_loss_towards_zero_and_so_is_its_gradient"
OTHERS = "test_no_crop_is_its_own_target_nor_one_of_the_same_image"
MEAN = "test_the_mean_of_two_kernels_hides_what_one_of_them_costs"
ANSWERS["ibs", 1] = Answer(
    change=(("allowed = image_ids[:, None] != image_ids ",
             "allowed = ~torch.eye(len(image_ids), dtype=torch.bool, device=image_ids.device) "),),
    fail=(OTHERS,), hold=(FOCAL,),
    why="Two crops of one image may show one car, and the loss then asks for its absence.")
ANSWERS["ibs", 2] = Answer(
    change=(("        if target >= 0 and thing.any():",
             "        thing = torch.ones_like(thing)\n        if target >= 0 and thing.any():"),
            ("weights or [thing.float() for", "weights or [torch.ones(len(thing)) for")),
    fail=(FOCAL,), hold=(MEAN, OTHERS),
    why="Nearly every crop shows road: it is wrong to ask that no other crop does.")
ANSWERS["ibs", 3] = Answer(
    change=(("mask_logits(e[thing], f", "mask_logits(e[thing].mean(0, keepdim=True), f"),),
    fail=(MEAN,), hold=(OTHERS,),
    why="The mean of 10 and -30 is -10, which looks innocent: what one embedding claims is lost.")

# --- affinity_head.py -------------------------------------------------------------------------
ANSWERS["affinity_head", 1] = Answer(
    change=(("F.elu(phi(q))", "F.relu(phi(q))"),),
    fail=("test_a_new_head_is_nearly_the_identity_and_learns_everywhere",),
    hold=("test_the_affinity_is_applied_as_if_the_dense_matrix_existed",),
    why="All affinities are then at least 0, and where they are 0 nothing learns.")
ANSWERS["affinity_head", 2] = Answer(
    change=(("things = torch.where(box_gate(boxes, size, image_size), things, 0) ",
             "things = things "),),
    fail=("test_each_variant_is_its_formula_at_every_pixel",),
    hold=("test_the_head_adds_the_dense_affinity_of_its_factors",),
    why="Without boxes each of two cars claims the other: the semantic part is the same for both.")
ANSWERS["affinity_head", 3] = Answer(
    change=(("target, isthing, scale=10.0)", "target, isthing, scale=1.0)"),),
    fail=("test_the_floor_of_the_loss_is_that_of_a_perfect_potential",),
    hold=("test_the_match_by_hand",),
    why="Even a perfect potential would then cost log(1 + (K - 1) / e).")

# --- adaptis.py -------------------------------------------------------------------------------
ANSWERS["adaptis", 1] = Answer(
    change=(("        if self.window is not None:\n", "        if False:\n"),),
    fail=("test_mask_does_not_depend_on_the_image_far_away",), hold=("test_adain_is_its_formula",),
    why="AdaIN's mean depends on an object's share of the map, which is smaller in larger images.")
ANSWERS["adaptis", 2] = Answer(
    change=(("focus.detach().sum((1, 2))", "focus.sum((1, 2))"),),
    fail=("test_gradient_of_p_is_stopped",),
    hold=("test_nfl_is_its_formula_and_so_are_fl_and_bce",),
    why="The loss could then fall by making P large, that is by making more pixels wrong.")
ANSWERS["adaptis", 3] = Answer(
    change=(("turns = [int(torch.stack(means).argmax())]", "turns = [0]"),),
    fail=("test_rounds_are_those_of_the_slow_algorithm",),
    hold=("test_each_pixel_goes_to_the_surest",),
    why="A bad first mask takes pixels, and no later one can have them back.")
