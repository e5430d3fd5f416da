"""The claims of affinity_head.py as an executable spec: Q. Li, X. Qi, P. H. S. Torr, "Unifying Training and Inference for
Panoptic Segmentation" (CVPR 2020), sections 3.4.1 to 3.5 and appendices A.3, B, C.

It was written from the paper and from the docstrings, before anyone who wrote it had seen the code.  Every oracle is the
definition in plain loops, the dense HW x HW matrix, brute force, finite differences, or a case computed by hand."""
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import box_iou

import affinity_head as ah
from affinity_head import IGNORE

ISTHING = torch.tensor([False, True, False, True, False])   # things 1, 3; stuff 0, 2, 4


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def rand(g, *shape):
    return torch.rand(*shape, generator=g, dtype=torch.float64)


def randn(g, *shape):
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def some_boxes(g, n, width, height, least=1.0):
    """Boxes that may reach a little beyond the picture, at least `least` pixels wide and high."""
    a, size = rand(g, n, 2) * 1.1 - .1, rand(g, n, 2) * .7
    a, size = a * torch.tensor([width, height]), size * torch.tensor([width, height]) + least
    return torch.cat([a, a + size], 1)


# --- 3.4.1 Dynamic potential head ------------------------------------------------------------------------------------

def cells(low, high, n, d):
    """Of n cells of d pixels, those that an interval has: their centres are in it, or else its middle is in theirs."""
    return ([j for j in range(n) if low <= (j + .5) * d < high] or
            [j for j in range(n) if j * d <= (low + high) / 2 < (j + 1) * d])


def potential_by_loop(semantic, boxes, scores, categories, isthing, stride, masks, variant):
    rows, (_, h, w), kinds = [], semantic.shape, []
    for k, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        ys, xs, c = cells(y1, y2, h, stride), cells(x1, x2, w, stride), int(categories[k])
        kinds.append(c)
        for i, j in itertools.product(range(h), range(w)):
            v, value = semantic[c, i, j], semantic.new_zeros(())
            if i in ys and j in xs:
                if variant == "A":
                    value = v + masks[k, i, j]
                elif masks is None:
                    value = scores[k] * v
                else:
                    value = scores[k] * (v * masks[k, i, j] if variant == "B" else v + masks[k, i, j])
            rows.append(value)
    for c in range(len(isthing)):
        if not isthing[c]:
            kinds.append(c)
            rows += [semantic[c, i, j] for i, j in itertools.product(range(h), range(w))]
    return torch.stack(rows).view(-1, h, w) if rows else semantic.new_zeros(0, h, w), kinds


def potential_case(seed, detections=4, size=(5, 7), stride=4):
    g, (h, w) = seeded(seed), size
    return dict(semantic=randn(g, 5, h, w).softmax(0), boxes=some_boxes(g, detections, w * stride, h * stride, stride),
                scores=rand(g, detections), categories=torch.tensor([1, 3, 3, 1, 1])[:detections],
                masks=rand(g, detections, h, w), isthing=ISTHING, stride=stride)


VARIANTS = [("A", True), ("B", True), ("B", False), ("C", True), ("C", False)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("variant, masked", VARIANTS)
def test_each_variant_is_its_formula_at_every_pixel(variant, masked, seed):
    """3.4.1: B is s V M, C is s (V + M), both s V without masks, A is V + M of logits; all in the box only."""
    case = potential_case(seed, stride=(4, 4, 3)[seed]) | dict(variant=variant)
    if variant == "A":
        case |= dict(semantic=case["semantic"].log(), masks=case["masks"].logit())
    case |= {} if masked else dict(masks=None)
    got, kinds = ah.dynamic_potential(**case)
    want, want_kinds = potential_by_loop(**case)
    assert kinds.tolist() == want_kinds and kinds.dtype == torch.int64
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("variant, masked", VARIANTS)
def test_gradients_reach_semantics_scores_and_masks_as_the_formula_says(variant, masked):
    """3.4.1 and A.4: "gradients from the panoptic segmentation submodule flow to the object detection submodule"."""
    case, weight = potential_case(7), randn(seeded(8), 7, 5, 7)
    leaves = [case[k].requires_grad_() for k in ("semantic", "scores", "masks")]
    case |= dict(variant=variant) | ({} if masked else dict(masks=None))
    got, want = (torch.autograd.grad((f(**case)[0] * weight).sum(), leaves, allow_unused=True)
                 for f in (ah.dynamic_potential, potential_by_loop))
    for name, a, b, leaf in zip(("semantic", "scores", "masks"), got, want, leaves):
        a, b = (torch.zeros_like(leaf) if v is None else v for v in (a, b))
        assert (name == "semantic") <= bool(b.any())
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_detections_come_first_in_their_order_and_then_stuff_by_category():
    """3.4.1: D + N_st channels."""
    case = potential_case(0) | dict(masks=None)
    psi, kinds = ah.dynamic_potential(**case)
    assert kinds.tolist() == [1, 3, 3, 1, 0, 2, 4] and psi.shape == (7, 5, 7)
    assert torch.equal(psi[4:], case["semantic"][[0, 2, 4]])


@pytest.mark.parametrize("variant, masked", VARIANTS)
def test_without_detections_the_potential_is_the_stuff_alone(variant, masked):
    """3.4.1, degenerate: D = 0."""
    case = potential_case(1, detections=0) | dict(variant=variant)
    psi, kinds = ah.dynamic_potential(**case | ({} if masked else dict(masks=None)))
    assert kinds.tolist() == [0, 2, 4] and torch.equal(psi, case["semantic"][[0, 2, 4]])


def test_a_world_without_stuff_has_one_channel_for_each_detection():
    """3.4.1, degenerate: N_st = 0, with detections and without."""
    for d in (0, 3):
        psi, kinds = ah.dynamic_potential(**potential_case(2, d) | dict(isthing=torch.ones(5, dtype=torch.bool)))
        assert psi.shape == (d, 5, 7) and len(kinds) == d


def test_variant_b_and_stride_4_are_the_defaults():
    """3.4.1: variant B is the one for Cityscapes, d = 4."""
    case = potential_case(3)
    assert torch.equal(ah.dynamic_potential(**case | dict(variant="B"))[0],
                       ah.dynamic_potential(**{k: v for k, v in case.items() if k != "stride"})[0])


def test_a_pixel_outside_of_every_box_hears_of_no_detection():
    """3.4.1: the box gates masks too, in all variants."""
    case = potential_case(4, 2) | dict(boxes=torch.tensor([[4., 4, 12, 12], [8., 4, 16, 12]]))
    for variant in "ABC":
        psi = ah.dynamic_potential(**case | dict(variant=variant))[0][:2]
        outside = torch.ones(5, 7, dtype=torch.bool)
        outside[1:3, 1:4] = False
        assert not psi[:, outside].any() and psi[0, 1:3, 1:3].all() and not psi[0, :, 3].any()


def gate(box, size=(3, 5), stride=4):
    rows, columns = ah.box_gate(torch.tensor([box], dtype=torch.float64), size, stride)
    assert rows.shape == (1, size[0]) and columns.shape == (1, size[1]) and rows.dtype == columns.dtype == torch.bool
    return [i for i, v in enumerate(rows[0]) if v], [j for j, v in enumerate(columns[0]) if v]


@pytest.mark.parametrize("box, rows, columns", [
    ((0, 0, 20, 12), [0, 1, 2], [0, 1, 2, 3, 4]),    # the whole map
    ((2, 2, 6, 10), [0, 1], [0]),                    # centres lie at 2, 6, 10, ..: the first is in, the last is not
    ((2.01, 1.99, 6.01, 10.01), [0, 1, 2], [1]),
    ((-50, -50, 2.5, 6.5), [0, 1], [0]),             # over the border
    ((13, 9, 90, 90), [2], [3, 4])])
def test_a_cell_is_in_a_box_if_its_centre_is_and_boxes_are_half_open(box, rows, columns):
    """3.4.1, the vocabulary: x1 y1 x2 y2 half open, the cell (i, j) at ((j + .5) d, (i + .5) d)."""
    assert gate(box) == (rows, columns)


@pytest.mark.parametrize("box, rows, columns", [
    ((2.5, 0, 5.4, 12), [0, 1, 2], [0]), ((2.5, 0, 5.6, 12), [0, 1, 2], [1]),    # middle on the left, right of x = 4
    ((3, 0, 5, 12), [0, 1, 2], [1]),                                             # on it: cells are half open too
    ((0, 6.5, 20, 9.4), [1], [0, 1, 2, 3, 4]), ((0, 6.5, 20, 9.6), [2], [0, 1, 2, 3, 4]),
    ((10.5, 7, 11, 7.5), [1], [2]), ((7, 7, 7, 7), [1], [1]),                    # a dot
    ((0, 0, 1, 1), [0], [0]), ((19, 11, 20, 12), [2], [4])])                     # in the corners of the map
def test_a_box_that_holds_no_centre_keeps_the_cells_where_its_middle_is(box, rows, columns):
    """3.4.1: "an object of three pixels is to have a place on a map of stride 4 too"."""
    assert gate(box) == (rows, columns)


@pytest.mark.parametrize("box", [(-9, 2, -1, 9), (-2, 2, -1, 9), (20.5, 2, 30, 9), (20, 2, 21, 9), (2, -9, 9, -1),
                                 (2, -1, 9, -.5), (2, 12, 9, 30), (2, 12.5, 9, 13), (-9, 2, 0, 9), (2, -1, 9, 0)])
def test_a_box_beside_the_picture_has_no_cell(box):
    """3.4.1, degenerate: even the thin ones."""
    rows, columns = gate(box)
    assert not (rows and columns)


@pytest.mark.parametrize("stride", [1, 2, 3, 8])
def test_the_gate_of_random_boxes_is_that_of_the_definition_at_any_stride(stride):
    """3.4.1: with thin boxes among them."""
    a = rand(seeded(stride), 60, 2) * torch.tensor([7., 5]) * stride
    boxes = torch.cat([a, a + stride * rand(seeded(9), 60, 2) * torch.tensor([[.5], [4.]]).repeat(30, 1)], 1)
    boxes[:, 2:] = boxes[:, 2:].minimum(torch.tensor([7., 5], dtype=torch.float64) * stride)
    rows, columns = ah.box_gate(boxes, (5, 7), stride)
    for k, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        assert torch.nonzero(columns[k])[:, 0].tolist() == cells(x1, x2, 7, stride)
        assert torch.nonzero(rows[k])[:, 0].tolist() == cells(y1, y2, 5, stride)


def test_an_unknown_variant_is_refused_with_the_names_of_the_known_ones():
    """3.4.1: A, B, C and no other."""
    for bad in ("D", "b", "AB", ""):
        with pytest.raises(ValueError, match=r"A.*B.*C"):
            ah.dynamic_potential(**potential_case(0) | dict(variant=bad))


def test_variant_a_without_masks_is_refused_and_another_is_named():
    """3.4.1: variant A is UPSNet's, which has masks."""
    with pytest.raises(ValueError, match=r"(?s)(?=.*masks)(?=.*\bB\b)"):
        ah.dynamic_potential(**potential_case(0) | dict(variant="A", masks=None))


@pytest.mark.parametrize("shape", [(4, 7, 5), (4, 5, 8), (4, 6, 7), (3, 5, 7), (4, 14, 14), (1, 5, 7)])
def test_masks_of_another_size_than_the_map_are_refused(shape):
    """3.4.1: raw masks have to be pasted first; the message says so."""
    with pytest.raises(ValueError, match="paste"):
        ah.dynamic_potential(**potential_case(0) | dict(masks=torch.rand(shape, dtype=torch.float64)))


# --- paste ------------------------------------------------------------------------------------------------------------

def paste_by_loop(masks, boxes, size, stride):
    out, s = torch.zeros(len(masks), *size, dtype=masks.dtype), masks.shape[-1]
    for k, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        for i, j in itertools.product(*map(range, size)):
            u, v = (((p + .5) * stride - a) / (b - a) * s - .5 for p, a, b in ((j, x1, x2), (i, y1, y2)))
            u, v = min(max(u, 0), s - 1), min(max(v, 0), s - 1)
            for y, x in itertools.product(range(s), range(s)):
                out[k, i, j] += max(0, 1 - abs(u - x)) * max(0, 1 - abs(v - y)) * masks[k, y, x]
    return out


@pytest.mark.parametrize("s, stride", [(1, 4), (2, 4), (5, 4), (4, 3)])
def test_a_mask_is_resized_to_its_box_bilinearly_and_goes_on_beyond_it(s, stride):
    """3.4.1: "resized to their actual dimensions and pasted to appropriate spatial locations"."""
    g = seeded(s)
    masks, boxes = rand(g, 4, s, s), some_boxes(g, 4, 6 * stride, 5 * stride)
    got = ah.paste(masks.float(), boxes.float(), (5, 6), stride)
    torch.testing.assert_close(got.double(), paste_by_loop(masks, boxes, (5, 6), stride), rtol=0, atol=2e-6)


def test_autocast_does_not_blur_the_pasting():
    """bf16 has 8 bits: a product of coordinates in it moves the edges of masks."""
    masks, boxes = randn(seeded(0), 3, 28, 28).float(), torch.tensor([[3., 5, 90, 60], [0, 0, 30, 9], [50, 20, 128, 64]])
    with torch.autocast("cpu", torch.bfloat16):
        got = ah.paste(masks, boxes, (16, 32))
    assert torch.equal(got, ah.paste(masks, boxes, (16, 32))) and got.dtype == torch.float32


def test_a_mask_is_pasted_as_pytorch_samples_a_grid():
    """3.4.1, against F.grid_sample with the border repeated; stride 4 by default."""
    g = seeded(3)
    masks, boxes = rand(g, 5, 7, 7), some_boxes(g, 5, 36, 28)
    y, x = ((torch.arange(n, dtype=torch.float64) + .5) * 4 for n in (7, 9))
    u, v = ((2 * (p - boxes[:, k, None]) / (boxes[:, k + 2] - boxes[:, k])[:, None] - 1) for p, k in ((x, 0), (y, 1)))
    grid = torch.stack([u[:, None].expand(5, 7, 9), v[:, :, None].expand(5, 7, 9)], -1)
    want = F.grid_sample(masks[:, None], grid, padding_mode="border", align_corners=False)[:, 0]
    torch.testing.assert_close(ah.paste(masks.float(), boxes.float(), (7, 9)), want.float(), rtol=0, atol=2e-6)


def test_a_mask_as_large_as_its_box_in_cells_is_copied():
    """3.4.1, closed case: cell centres meet mask centres."""
    mask = torch.rand(1, 3, 3, generator=seeded(0))
    assert torch.allclose(ah.paste(mask, torch.tensor([[8., 4, 20, 16]]), (5, 6))[0, 1:4, 2:5], mask[0], atol=1e-6)


def test_pasting_has_the_gradients_of_the_loop():
    """3.4.1: masks are learned through it."""
    boxes, masks, weight = some_boxes(seeded(4), 2, 16, 12), rand(seeded(5), 2, 3, 3).requires_grad_(), randn(seeded(6), 2, 3, 4)
    got, = torch.autograd.grad((ah.paste(masks.float(), boxes.float(), (3, 4)) * weight).sum(), masks)
    want, = torch.autograd.grad((paste_by_loop(masks, boxes, (3, 4), 4) * weight).sum(), masks)
    torch.testing.assert_close(got, want, rtol=0, atol=5e-6)


def test_pasting_nothing_gives_nothing_and_an_empty_box_no_nan():
    """3.4.1, degenerate: D = 0, and a box of no extent (a NaN would pass every gate)."""
    assert ah.paste(torch.rand(0, 7, 7), torch.zeros(0, 4), (5, 6)).shape == (0, 5, 6)
    assert ah.paste(torch.rand(1, 7, 7), torch.tensor([[5., 6, 5, 6]]), (5, 6)).isfinite().all()


# --- 3.4.2 Dense instance affinity head -------------------------------------------------------------------------------

@pytest.mark.parametrize("hw, c, k", [(30, 4, 7), (1, 3, 2), (12, 16, 1), (12, 5, 0)])
def test_the_affinity_is_applied_as_if_the_dense_matrix_existed(hw, c, k):
    """3.4.2: Q (K^T Psi) = (Q K^T) Psi, as a mean over pixels; without keys A = Q Q^T.  K = 0 among them."""
    g = seeded(hw)
    q, keys, psi = randn(g, hw, c), randn(g, hw, c), randn(g, hw, k)
    torch.testing.assert_close(ah.apply_affinity(q, psi, keys), (q @ keys.T) @ psi / hw, rtol=0, atol=1e-12)
    torch.testing.assert_close(ah.apply_affinity(q, psi), (q @ q.T) @ psi / hw, rtol=0, atol=1e-12)


def test_the_affinity_is_linear_in_the_potential():
    """3.4.2: so a varying number of instances is no obstacle."""
    g = seeded(1)
    q, a, b = randn(g, 20, 4), randn(g, 20, 3), randn(g, 20, 3)
    torch.testing.assert_close(ah.apply_affinity(q, 2 * a - 3 * b),
                               2 * ah.apply_affinity(q, a) - 3 * ah.apply_affinity(q, b), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [2, 4, 7])
def test_more_of_the_same_pixels_do_not_change_what_a_pixel_hears(n):
    """3.4.2: a mean over pixels, not a sum; a whole picture after training on crops."""
    g = seeded(n)
    q, keys, psi = randn(g, 20, 4), randn(g, 20, 4), randn(g, 20, 3)
    torch.testing.assert_close(ah.apply_affinity(q.repeat(n, 1), psi.repeat(n, 1), keys.repeat(n, 1)),
                               ah.apply_affinity(q, psi, keys).repeat(n, 1), rtol=0, atol=1e-12)


def test_the_paper_saves_998_of_1000_multiply_adds():
    """3.4.2: 800 x 1300, d = 4, C, D, N_st = 128, 100, 53: 5 billion FLOPS, two for each multiply-add, and 99.8% fewer."""
    small, large = ah.multiply_adds(200 * 325, 128, 153)
    assert small == 2 * 65000 * 128 * 153 == 2_545_920_000 and large == 65000 ** 2 * (128 + 153)
    assert f"{2 * small:.0e}" == "5e+09" and f"{1 - small / large:.1%}" == "99.8%"


SIZES = [(16, 24), (13, 18), (1, 1)]


def features(seed, batch=1, c_in=6, size=(13, 18)):
    """Strides 4 to 32 of a picture, each level half of the one before, rounded up."""
    g, out = seeded(seed), {}
    for stride in (4, 8, 16, 32):
        out[stride] = torch.randn(batch, c_in, *size, generator=g)
        size = [-(-n // 2) for n in size]
    return out


def potential(seed, k, size=(13, 18)):
    return torch.rand(k, *size, generator=seeded(100 + seed))


def loud_head(seed=0, c_in=6, channels=8):
    """A head whose 1x1 convolutions are not small, so that its affinity is as large as the potential."""
    torch.manual_seed(seed)
    head = ah.InstanceAffinityHead(c_in, channels)
    for m in head.modules():
        if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1):
            nn.init.normal_(m.weight, std=1.)
    return head


def convolutions(module, size):
    return [m for m in module.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (size, size)]


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_the_head_adds_the_dense_affinity_of_its_factors_to_the_potential(size):
    """3.4.2: P = Psi + phi_1(Q) phi_0(Q)^T Psi / HW; map sizes that are no multiple of 4, and one cell."""
    head, f, hw = loud_head(), features(0, 2, size=size), size[0] * size[1]
    potentials = [potential(0, 5, size), potential(1, 3, size)]
    queries, keys = head.factors(f)
    assert queries.shape == keys.shape == (2, hw, 8)
    for b, got in enumerate(head(f, potentials)):
        psi = potentials[b].double().view(-1, hw).T
        update = (queries[b].double() @ keys[b].double().T) @ psi / hw
        assert update.abs().max() > 1e-2
        torch.testing.assert_close(got.double(), (psi + update).T.reshape(-1, *size), rtol=2e-6, atol=2e-6)


@torch.no_grad()
def test_one_set_of_weights_serves_any_number_of_instances():
    """3.4.2: "compatible with a dynamic number of input channels", 0 among them, and each image with its own."""
    counts = [0, 1, 5, 153]
    head, f = loud_head(), features(1, 4)
    assert [tuple(p.shape) for p in head(f, [potential(k, k) for k in counts])] == [(k, 13, 18) for k in counts]


@torch.no_grad()
def test_permuted_channels_come_out_permuted():
    """3.4.2: the head knows no order of instances."""
    head, f, psi, order = loud_head(), features(2), potential(2, 6), torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(head(f, [psi[order]])[0], head(f, [psi])[0][order], rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_the_rest_of_the_batch_does_not_matter():
    """3.4.2 and B: Group Normalisation is "less sensitive to batch sizes"."""
    head, f, psis = loud_head(), features(3, 3), [potential(k, k + 1) for k in range(3)]
    for b, together in enumerate(head(f, psis)):
        alone = head({s: v[b:b + 1] for s, v in f.items()}, [psis[b]])[0]
        torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-4)             # float32, and large terms cancel


def test_gradients_reach_every_parameter_of_a_new_head_and_the_potential():
    """3.4.2: "implicitly trained by supervision from the panoptic matching loss"."""
    torch.manual_seed(0)
    head, psi = ah.InstanceAffinityHead(6, 16), potential(4, 5).requires_grad_()
    (head(features(4), [psi])[0] * torch.randn(5, 13, 18)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters()) and psi.grad.all()


@torch.no_grad()
def test_a_new_head_is_nearly_the_identity_because_its_queries_are_small():
    """3.4.2: "forming a residual connection to ease the learning task"; potentials lie in 0..1."""
    torch.manual_seed(0)
    head, f, psi = ah.InstanceAffinityHead(6), features(5), potential(5, 5)
    change, (queries, keys) = (head(f, [psi])[0] - psi).abs().max(), head.factors(f)
    assert 0 < change < .1 and queries.abs().mean() < .15 * keys.abs().mean()


def test_the_head_has_128_channels_and_two_layers_if_nothing_is_said():
    """3.4.2: "we use C = 128 in all experiments"."""
    for module in (ah.InstanceAffinityHead(6), ah.FeatureDecoder(6)):
        assert [c.out_channels for c in convolutions(module, 3)] == [128, 128]
        assert {c.out_channels for c in convolutions(module, 1)} == {128}
    assert len(convolutions(ah.InstanceAffinityHead(6, layers=3), 3)) == 3


@torch.no_grad()
def test_both_factors_are_a_1x1_convolution_of_q_followed_by_elu():
    """3.4.2: "phi_0 and phi_1 are each a 1x1 convolution followed by an activation"; pixels row by row, in float32."""
    head, f, seen = loud_head(), features(6, 2), []
    decoder = next(m for m in head.modules() if isinstance(m, ah.FeatureDecoder))
    phis = [m for m in convolutions(head, 1) if m not in set(decoder.modules())]
    assert len(phis) == 2
    hook = decoder.register_forward_hook(lambda *a: seen.append(a[2]))
    factors = head.factors(f)
    hook.remove()
    wanted = [F.elu(phi(seen[0])).flatten(2).transpose(1, 2) for phi in phis]
    assert any(all(torch.allclose(a, b, atol=1e-5) for a, b in zip(factors, w)) for w in (wanted, wanted[::-1]))
    with torch.autocast("cpu", torch.bfloat16):
        assert all(v.dtype == torch.float32 for v in head.factors(f))


@torch.no_grad()
@pytest.mark.parametrize("point, cell", [((0, 0), (0, 0)), ((3.9, 4), (1, 0)), ((37.5, 20.2), (5, 9)), ((71, 51), (12, 17))])
def test_the_affinity_of_a_point_is_its_row_of_the_dense_matrix(point, cell):
    """3.4.2 and E: A_i. times HW of the first image, for pictures of what a pixel listens to."""
    head, f = loud_head(), features(7, 2)
    queries, keys = head.factors(f)
    row = (queries[0].double() @ keys[0].double().T)[cell[0] * 18 + cell[1]]
    torch.testing.assert_close(head.affinity(f, point).double(), row.view(13, 18), rtol=1e-5, atol=1e-5)
    half = head.affinity(f, (point[0] / 2, point[1] / 2), stride=2)
    torch.testing.assert_close(half, head.affinity(f, point))


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_an_affinity_may_have_either_sign_and_its_factors_never_lose_their_slope(seed):
    """3.4.2: ELU goes down to -1, and a cell that is silent now can still learn: no gradient of a bias is exactly 0."""
    head, f, psi = loud_head(seed), features(seed), potential(seed, 4)
    with torch.enable_grad():
        queries, keys = head.factors(f)
        (head(f, [psi])[0] * psi).sum().backward()
    assert -1 <= queries.min() < 0 < queries.max() and -1 <= keys.min() < 0 < keys.max()
    assert (queries[0] @ keys[0].T).min() < 0
    assert (head.phi0[0].bias.grad != 0).all() and (head.phi1[0].bias.grad != 0).all()


# --- The affinity feature extractor -----------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("size, layers", [((16, 24), 2), ((13, 18), 2), ((13, 18), 1), ((1, 1), 3)])
def test_the_decoder_joins_four_levels_at_stride_4_through_the_same_convolutions(size, layers):
    """3.4.2: 3x3 convolutions shared among levels, Group Normalisation after each, ReLU; enlarged, concatenated, one 1x1."""
    torch.manual_seed(1)
    decoder, f, levels = ah.FeatureDecoder(6, 8, layers), features(8, 2, size=size), []
    threes, norms = convolutions(decoder, 3), [m for m in decoder.modules() if isinstance(m, nn.GroupNorm)]
    one, = convolutions(decoder, 1)
    assert len(threes) == len(norms) == layers
    for norm in norms:
        norm.weight.uniform_(.5, 2), norm.bias.uniform_(-1, 1)
    for x in (f[stride] for stride in (4, 8, 16, 32)):
        for conv, norm in zip(threes, norms):
            x = F.relu(F.group_norm(F.conv2d(x, conv.weight, conv.bias, padding=1), 2, norm.weight, norm.bias, norm.eps))
        levels.append(F.interpolate(x, size=size, mode="bilinear", align_corners=False))
    want = F.conv2d(torch.cat(levels, 1), one.weight, one.bias)
    got = decoder(f)
    assert got.shape == (2, 8, *size)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("level", [4, 8, 16, 32])
def test_the_decoder_listens_to_every_level(level):
    """3.4.2: strides 4 to 32."""
    torch.manual_seed(2)
    decoder, f = ah.FeatureDecoder(6, 8), features(9)
    f[level].requires_grad_()
    decoder(f).square().sum().backward()
    assert f[level].grad.abs().sum() > 0


@pytest.mark.parametrize("channels, groups", [(128, 32), (256, 32), (64, 16), (20, 1), (50, 2), (8, 2), (4, 1)])
def test_group_norm_has_32_groups_or_at_least_four_channels_in_each(channels, groups):
    """B: Group Normalisation; in float32, and its output too, whatever comes in."""
    norm, x = ah.GroupNorm(channels), torch.randn(2, channels, 3, 5, generator=seeded(0))
    assert norm.num_groups == groups and norm.num_channels == channels
    y = norm(x.bfloat16())
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, F.group_norm(x.bfloat16().float(), groups), rtol=0, atol=1e-5)


# --- 3.5 Panoptic matching loss ---------------------------------------------------------------------------------------

def assign(gain):
    """In tensors, whatever array the function works on."""
    out = torch.as_tensor(ah.assign(gain))
    assert out.dtype == torch.int64
    return out


def best_sum(gain):
    """The largest sum over all one-to-one assignments, by looking at each of them."""
    if gain.shape[0] > gain.shape[1]:
        gain = gain.T
    rows = range(len(gain))
    return max(sum(float(gain[r, c]) for r, c in zip(rows, p)) for p in itertools.permutations(range(gain.shape[1]), len(gain)))


@pytest.mark.parametrize("seed", range(8))
def test_no_assignment_has_a_larger_sum(seed):
    """3.5: T* maximises over all of them.  480 matrices with zeros and ties, wide and tall, against all permutations."""
    g = seeded(seed)
    for n in range(60):
        rows, columns = torch.randint(1, 6, (2,), generator=g).tolist()
        gain = rand(g, rows, columns) * (rand(g, rows, columns) > .3)
        if n % 2:
            gain = (gain * 4).round() / 4                                         # ties
        got = assign(gain)
        assert got.shape == (rows,)
        pairs = [(r, c) for r, c in enumerate(got.tolist()) if c != IGNORE]
        assert all(0 <= c < columns for _, c in pairs) and len({c for _, c in pairs}) == len(pairs)
        assert all(gain[r, c] > 0 for r, c in pairs)
        assert sum(float(gain[r, c]) for r, c in pairs) == pytest.approx(best_sum(gain), abs=1e-12)


def test_greed_would_be_wrong():
    """3.5, closed cases: the best pair first gives .9 + .0, the others .8 + .7; chains over three rows."""
    assert assign(torch.tensor([[.9, .8], [.7, .0]])).tolist() == [1, 0]
    assert assign(torch.tensor([[.9, .8, 0], [.8, 0, .5], [.7, 0, 0]])).tolist() == [1, 2, 0]
    assert assign(torch.tensor([[.9], [.95], [.5]])).tolist() == [IGNORE, 0, IGNORE]


@pytest.mark.parametrize("n", [20, 40])
def test_large_assignments_are_optimal_too(n):
    """3.5: a hidden permutation that is better than any other, as every row has its largest gain there."""
    g = seeded(n)
    order, gain = torch.randperm(n, generator=g), rand(g, n, n + 3) * .5
    gain[torch.arange(n), order] += .5
    assert torch.equal(assign(gain), order) and torch.equal(assign(gain.float()), order)


def test_nothing_to_assign_is_no_problem():
    """3.5, degenerate: no rows, no columns, all gains 0."""
    assert assign(torch.zeros(0, 3)).shape == (0,) and assign(torch.zeros(0, 0)).shape == (0,)
    assert assign(torch.zeros(3, 0)).tolist() == assign(torch.zeros(3, 2)).tolist() == [IGNORE] * 3


def target(segments, categories, boxes=None, crowd=None):
    """A target; boxes of what shows by looking at every pixel."""
    n = len(categories)
    if boxes is None:
        boxes = [(0, 0, 0, 0)] * n
        for k in range(n):
            ys, xs = torch.nonzero(segments == k + 1, as_tuple=True)
            if len(ys):
                boxes[k] = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
    return SimpleNamespace(segments=segments, categories=torch.tensor(categories, dtype=torch.int64),
                           crowd=torch.tensor(crowd or [False] * n, dtype=torch.bool),
                           boxes=torch.tensor(boxes, dtype=torch.float32).view(-1, 4))


def match_by_brute_force(t, boxes, categories, isthing):
    (h, w), d, stuff = t.segments.shape, len(boxes), [c for c in range(len(isthing)) if not isthing[c]]
    clipped = torch.stack([b.clamp(0, n) for b, n in zip(boxes.double().unbind(1), (w, h, w, h))], 1)
    iou, n = box_iou(t.boxes.double(), clipped), len(t.categories)
    iou = iou * (t.categories[:, None] == categories)
    things = [k for k in range(n) if isthing[t.categories[k]] and not t.crowd[k]]
    best, choice = 0., {}
    for m in itertools.product(range(-1, d), repeat=len(things)):
        used = [c for c in m if c >= 0]
        value = sum(float(iou[k, c]) for k, c in zip(things, m) if c >= 0)
        if len(set(used)) == len(used) and value > best + 1e-12:
            best, choice = value, dict(zip(things, m))
    return [IGNORE if t.crowd[k] else choice.get(k, IGNORE) if isthing[c] else d + stuff.index(c)
            for k, c in enumerate(t.categories.tolist())]


def scene(seed, detections=4, size=(24, 40)):
    """Rectangles over stuff, with void, a crowd on odd seeds, and detections near the things and elsewhere."""
    g, (h, w) = seeded(seed), size
    segments, kinds = torch.zeros(h, w, dtype=torch.int64), [0, 3, 1, 2, 1, 3]
    segments[3:], segments[h // 2:] = 1, 4
    for k in (2, 3, 5, 6):
        y, x = (int(v * n * .7) for v, n in zip(rand(g, 2).tolist(), size))
        segments[y:y + 8, x:x + 12] = k
    t = target(segments, kinds, crowd=[False] * 4 + [seed % 2 == 1, False])
    boxes = t.boxes[[1, 2, 5, 4, 2]].double() + 3 * randn(g, 5, 4)
    boxes[:, 2:] = boxes[:, 2:].maximum(boxes[:, :2] + 1)
    return t, boxes[:detections], torch.tensor([3, 1, 3, 1, 1])[:detections]


@pytest.mark.parametrize("seed", range(12))
def test_the_match_is_the_best_of_all_matches(seed):
    """3.5: largest sum of box IoUs over one-to-one assignments within the class, against brute force."""
    t, boxes, categories = scene(seed, detections=seed % 6)
    assert ah.match_segments(t, boxes, categories, ISTHING).tolist() == match_by_brute_force(t, boxes, categories, ISTHING)


HALVES = torch.tensor([1, 2]).repeat_interleave(20).expand(24, 40).contiguous()      # two segments side by side


def test_only_a_detection_of_the_same_class_is_a_match():
    """3.5: a perfect box of another class is none."""
    boxes = torch.tensor([[0., 0, 20, 24], [20, 0, 30, 24]])
    t = target(HALVES, [1, 3])
    assert ah.match_segments(t, boxes, torch.tensor([3, 3]), ISTHING).tolist() == [IGNORE, 1]
    assert ah.match_segments(t, boxes, torch.tensor([1, 3]), ISTHING).tolist() == [0, 1]
    assert ah.match_segments(t, boxes, torch.tensor([3, 1]), ISTHING).tolist() == [IGNORE, IGNORE]


@pytest.mark.parametrize("d", [0, 1, 3])
def test_stuff_has_the_channel_of_its_category_whatever_is_detected(d):
    """3.5: D + its place among the stuff."""
    boxes = torch.tensor([[0., 0, 20, 24]]).repeat(d, 1)
    for kinds, channels in (([4, 0], [2, 0]), ([2, 4], [1, 2])):
        got = ah.match_segments(target(HALVES, kinds), boxes, torch.ones(d, dtype=torch.int64), ISTHING)
        assert got.tolist() == [d + c for c in channels] and got.dtype == torch.int64


def test_a_crowd_is_ignored_and_takes_no_detection_from_others():
    """3.5, the vocabulary: crowd is void for training, of stuff too."""
    boxes = torch.tensor([[0., 0, 21, 24]])
    assert ah.match_segments(target(HALVES, [1, 1], crowd=[True, False]), boxes, torch.tensor([1]), ISTHING).tolist() == [-1, 0]
    assert ah.match_segments(target(HALVES, [0, 1], crowd=[True, True]), boxes, torch.tensor([1]), ISTHING).tolist() == [-1, -1]


@pytest.mark.parametrize("truth, beyond, within", [
    ((20, 0, 40, 20), (20, 0, 200, 20), (22, 0, 40, 20)), ((0, 0, 20, 20), (-90, 0, 20, 20), (2, 0, 20, 20)),
    ((0, 4, 20, 24), (0, 4, 20, 46), (0, 6, 20, 24)), ((0, 0, 20, 20), (0, -90, 20, 20), (0, 2, 20, 20))])
def test_a_box_is_clipped_to_the_picture_before_it_is_matched(truth, beyond, within):
    """3.5: the box that reaches beyond is the exact one inside (IoU 1), the other has .9."""
    t, boxes = target(HALVES, [1], boxes=[truth]), torch.tensor([within, beyond]).float()
    assert ah.match_segments(t, boxes, torch.tensor([1, 1]), ISTHING).tolist() == [1]


def test_boxes_that_do_not_overlap_are_no_match():
    """3.5: although the sum would not object; those that only touch, or lie beside the picture, neither."""
    for box in ((20, 0, 40, 24), (0, 24, 20, 30), (-30, 0, 0, 24), (5, 5, 5, 5)):
        got = ah.match_segments(target(HALVES, [1, 2]), torch.tensor([box]).float(), torch.tensor([1]), ISTHING)
        assert got.tolist() == [IGNORE, 1 + 1]


def test_matching_nothing_is_no_problem():
    """3.5, degenerate: no detection, no segment."""
    none, kinds = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    assert ah.match_segments(target(HALVES, [1, 3]), none, kinds, ISTHING).tolist() == [IGNORE, IGNORE]
    assert ah.match_segments(target(HALVES * 0, []), torch.tensor([[0., 0, 9, 9]]), torch.tensor([1]), ISTHING).shape == (0,)


def loss_by_loop(P, boxes, categories, t, isthing, scale=10.):
    """Pixel by pixel, in float64 and with gradients; matched by brute force."""
    match, (h, w), values = match_by_brute_force(t, boxes, categories, isthing), P.shape[1:], []
    for i, j in itertools.product(range(h), range(w)):
        y, x = (int((v + .5) * n / m) for v, n, m in zip((i, j), t.segments.shape, (h, w)))
        k = int(t.segments[y, x])
        if k and match[k - 1] != IGNORE:
            p = scale * P[:, i, j].double()
            values.append((p - p[match[k - 1]]).exp().sum().log())
    return sum(values) / len(values)


@pytest.mark.parametrize("scale", [10., 1., 3.])
@pytest.mark.parametrize("seed", range(4))
def test_the_loss_is_the_mean_cross_entropy_of_pixels_with_a_target(seed, scale):
    """3.5: pixel by pixel with the match of brute force."""
    (t, boxes, categories), P = scene(seed, 5 - seed), rand(seeded(seed), 8 - seed, 6, 10)
    got = ah.panoptic_matching_loss(P, boxes, categories, t, ISTHING, scale=scale)
    assert got.shape == () and float(got) == pytest.approx(float(loss_by_loop(P, boxes, categories, t, ISTHING, scale)), abs=2e-6)


def test_the_scale_is_10_if_nothing_is_said():
    """3.5, the choice."""
    (t, boxes, categories), P = scene(2), rand(seeded(2), 7, 6, 10)
    assert ah.panoptic_matching_loss(P, boxes, categories, t, ISTHING) == \
        ah.panoptic_matching_loss(P, boxes, categories, t, ISTHING, scale=10.)


@pytest.mark.parametrize("size", [(6, 10), (12, 20), (24, 40), (3, 5), (7, 11)])
def test_the_truth_is_read_at_the_centre_of_each_cell(size):
    """3.5: one pixel of a cell holds the truth, all others lie."""
    (h, w), P = size, torch.zeros(3, *size, dtype=torch.float64)
    segments = torch.ones(24, 40, dtype=torch.int64)
    for i, j in itertools.product(range(h), range(w)):
        segments[int((i + .5) * 24 / h), int((j + .5) * 40 / w)] = 2 + (i + j) % 2
        P[1 + (i + j) % 2, i, j] = 1
    got = ah.panoptic_matching_loss(P, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), target(segments, [0, 2, 4]), ISTHING)
    assert float(got) == pytest.approx(math.log(1 + 2 * math.exp(-10)), abs=2e-7)


@pytest.mark.parametrize("seed", range(3))
def test_the_numbers_of_true_segments_do_not_matter(seed):
    """3.5: "the indices merely act to distinguish between each other"."""
    (t, boxes, categories), P = scene(seed), rand(seeded(seed), 7, 6, 10)
    order = torch.randperm(6, generator=seeded(seed + 50))                       # new segment k is the old order[k]
    number = torch.cat([torch.zeros(1, dtype=torch.int64), order.argsort() + 1])
    other = SimpleNamespace(segments=number[t.segments], categories=t.categories[order], crowd=t.crowd[order],
                            boxes=t.boxes[order])
    a, b = (ah.panoptic_matching_loss(P, boxes, categories, v, ISTHING) for v in (t, other))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_detections_may_come_in_any_order(seed):
    """3.5: "the indices of the instances are not fixed or known beforehand"; they move with their channels."""
    (t, boxes, categories), P = scene(seed, 5), rand(seeded(seed), 8, 6, 10)
    order = torch.randperm(5, generator=seeded(seed + 60))
    channels = torch.cat([order, torch.arange(5, 8)])
    a = ah.panoptic_matching_loss(P, boxes, categories, t, ISTHING)
    b = ah.panoptic_matching_loss(P[channels], boxes[order], categories[order], t, ISTHING)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def two_cars():
    """Two true things of class 1 and a void strip; the first detected, the second not, a false alarm of class 3."""
    segments = HALVES.clone()
    segments[:8] = 0
    return target(segments, [1, 1]), torch.tensor([[0., 6, 22, 24], [2, 8, 18, 24]]), torch.tensor([1, 3])


def test_the_loss_falls_as_the_potential_moves_to_the_truth():
    """3.5: step by step, with the true boxes as detections."""
    t, _, kinds = scene(0)
    boxes, kinds = t.boxes[[1, 2]], t.categories[[1, 2]]
    P, match, losses = rand(seeded(0), 5, 6, 10), match_by_brute_force(t, boxes, kinds, ISTHING), []
    truth = torch.zeros_like(P)
    for i, j in itertools.product(range(6), range(10)):
        k = int(t.segments[4 * i + 2, 4 * j + 2])
        if k and match[k - 1] >= 0:
            truth[match[k - 1], i, j] = 1
    losses = [float(ah.panoptic_matching_loss(P + s * truth, boxes, kinds, t, ISTHING)) for s in (0, .2, .5, 1, 2, 4)]
    assert all(a > b + 1e-9 for a, b in zip(losses, losses[1:])) and losses[-1] < 1e-6


def test_pixels_without_a_target_have_no_gradient_and_the_others_that_of_softmax():
    """3.5: void and true things without a detection are ignored; elsewhere scale (softmax - truth) / pixels."""
    (t, boxes, kinds), P = two_cars(), rand(seeded(1), 5, 6, 10).requires_grad_()
    grad, = torch.autograd.grad(ah.panoptic_matching_loss(P, boxes, kinds, t, ISTHING), P)
    assert not grad[:, :2].any() and not grad[:, :, 5:].any()
    want = (10 * P.detach()).softmax(0)
    want[0] -= 1
    torch.testing.assert_close(grad[:, 2:, :5], (10 * want / 20)[:, 2:, :5], rtol=0, atol=1e-6)


def test_a_false_alarm_is_pushed_down_wherever_there_is_a_target():
    """3.5: a detection without a truth is right nowhere, so its channel loses wherever it claims a pixel."""
    (t, boxes, kinds), P = two_cars(), rand(seeded(2), 5, 6, 10).requires_grad_()
    grad, = torch.autograd.grad(ah.panoptic_matching_loss(P, boxes, kinds, t, ISTHING), P)
    assert (grad[1, 2:, :5] > 0).all() and (grad[0, 2:, :5] < 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_of_the_loss_is_that_of_the_loop(seed):
    """3.5: it trains the affinities."""
    (t, boxes, kinds), P = scene(seed), rand(seeded(seed), 7, 6, 10).requires_grad_()
    got, want = (torch.autograd.grad(f(P, boxes, kinds, t, ISTHING), P)[0] for f in (ah.panoptic_matching_loss, loss_by_loop))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("t, d, stuff", [
    (target(HALVES, [1, 3]), 0, 3), (target(HALVES * 0, []), 2, 3), (target(HALVES * 0, []), 0, 3),
    (target(HALVES * 0, [1, 0]), 2, 3), (target(HALVES, [1, 0], crowd=[True, True]), 2, 3), (target(HALVES, [1, 3]), 0, 0),
    (target(HALVES, [1, 3], boxes=[(0, 0, 1, 1)] * 2), 2, 3)],
    ids=["no detection", "no truth", "neither", "only void", "only crowd", "no channel", "no overlap"])
def test_a_picture_that_teaches_nothing_costs_nothing(t, d, stuff):
    """3.5, degenerate: the loss is 0 and so are its gradients, which exist."""
    P = rand(seeded(0), d + stuff, 6, 10).requires_grad_()
    isthing = ISTHING if stuff else torch.ones(5, dtype=torch.bool)
    loss = ah.panoptic_matching_loss(P, torch.tensor([[30., 10, 40, 20]]).repeat(d, 1), torch.tensor([1, 3])[:d], t, isthing)
    loss.backward()
    assert loss.shape == () and loss.item() == 0 and P.grad is not None and not P.grad.any()


@pytest.mark.parametrize("scale, k", [(10., 3), (10., 50), (1., 50)])
def test_the_floor_of_the_loss_is_that_of_a_perfect_potential(scale, k):
    """3.5, the choice of scale: log(1 + (K - 1) e^-scale), 2.9 for K = 50 and scale 1, and .002 with scale 10."""
    P = torch.zeros(k, 6, 10, dtype=torch.float64)
    P[0, :, :5], P[1, :, 5:] = 1, 1
    isthing = torch.tensor([True] + [False] * (k - 2))
    t, boxes = target(HALVES, [0, 0]), torch.tensor([[0., 0, 20, 24], [20, 0, 40, 24]])
    loss = float(ah.panoptic_matching_loss(P, boxes, torch.tensor([0, 0]), t, isthing, scale))
    assert loss == pytest.approx(math.log(1 + (k - 1) * math.exp(-scale)), rel=1e-6, abs=2e-6)
    assert k == 3 or round(loss, 3 if scale == 10 else 1) == {10.: .002, 1.: 2.9}[scale]


# --- B: the Lovász losses ---------------------------------------------------------------------------------------------

def jaccard(truth, wrong):
    """1 - IoU of the foreground if the pixels in `wrong` are wrong and all others right."""
    truth = [bool(v) for v in truth]
    guess = [v != (p in wrong) for p, v in enumerate(truth)]
    union = sum(a or b for a, b in zip(truth, guess))
    return 1 - sum(a and b for a, b in zip(truth, guess)) / union if union else 0.


def lovasz(errors, truth):
    """The Lovász extension of the Jaccard loss at a list of errors, by its definition."""
    order, total = sorted(range(len(errors)), key=lambda p: -float(torch.as_tensor(errors[p]).detach())), 0.
    for n, p in enumerate(order):
        total += errors[p] * (jaccard(truth, set(order[:n + 1])) - jaccard(truth, set(order[:n])))
    return total


@pytest.mark.parametrize("seed", range(5))
def test_the_lovasz_gradient_is_what_each_wrong_pixel_adds_to_the_jaccard_loss(seed):
    """B (Berman et al.): pixel after pixel, with batches; all true and none true among them."""
    truth = (rand(seeded(seed), 2, 3, 9) < seed / 4).double()
    want = [[[jaccard(t, set(range(n + 1))) - jaccard(t, set(range(n))) for n in range(9)] for t in rows] for rows in truth]
    torch.testing.assert_close(ah.lovasz_gradient(truth), torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_lovasz_gradient_of_a_hand_made_case():
    """B: truth 1 0 1: after one pixel IoU 1/2, then 1/3, then 0."""
    torch.testing.assert_close(ah.lovasz_gradient(torch.tensor([1., 0, 1])), torch.tensor([1 / 2, 1 / 6, 1 / 3]))


def softmax_case(seed, b=2, c=4, h=3, w=5):
    g = seeded(seed)
    logits, labels = 2 * randn(g, b, c, h, w), torch.randint(-1, c, (b, h, w), generator=g)
    return logits, labels.where(labels != 2, torch.tensor(0))                    # category 2 never occurs


def lovasz_softmax_by_loop(logits, labels):
    p = logits.softmax(1).movedim(1, -1).reshape(-1, logits.shape[1])
    pixels, values = [(row, c) for row, c in zip(p, labels.flatten().tolist()) if c != IGNORE], []
    for c in sorted({c for _, c in pixels}):
        values.append(lovasz([abs(float(k == c) - row[c]) for row, k in pixels], [k == c for _, k in pixels]))
    return sum(values) / len(values)


@pytest.mark.parametrize("seed", range(4))
def test_lovasz_softmax_is_the_mean_over_the_categories_that_occur_in_the_batch(seed):
    """B: the whole batch is one picture; errors |truth - p|; absent categories and unknown pixels do not count."""
    logits, labels = softmax_case(seed, b=1 + seed % 3)
    assert float(ah.lovasz_softmax(logits, labels)) == pytest.approx(float(lovasz_softmax_by_loop(logits, labels)), abs=2e-6)


def test_lovasz_softmax_of_certain_predictions_is_1_minus_the_mean_iou():
    """B: the surrogate is exact at hard decisions."""
    _, labels = softmax_case(5)
    guess = torch.randint(0, 4, labels.shape, generator=seeded(6))
    known, values = labels != IGNORE, []
    for c in labels[known].unique().tolist():
        a, b = (labels == c) & known, (guess == c) & known
        values.append(1 - float((a & b).sum()) / float((a | b).sum()))
    logits = 1e3 * F.one_hot(guess, 4).movedim(-1, 1).double()
    assert float(ah.lovasz_softmax(logits, labels)) == pytest.approx(sum(values) / len(values), abs=2e-6)


def test_unknown_pixels_do_not_matter_to_lovasz_softmax():
    """B: neither to its value nor to its gradient."""
    logits, labels = softmax_case(7)
    hidden = (labels == IGNORE)[:, None]
    other = torch.where(hidden, -3 * logits + 1, logits).requires_grad_()
    loss = ah.lovasz_softmax(other, labels)
    assert loss.item() == pytest.approx(ah.lovasz_softmax(logits, labels).item(), abs=2e-6)
    grad, = torch.autograd.grad(loss, other)
    assert hidden.any() and not grad[hidden.expand_as(grad)].any() and grad.any()


@pytest.mark.parametrize("seed", range(3))
def test_lovasz_softmax_has_the_gradients_of_the_loop(seed):
    """B: through the errors, not through their order."""
    logits, labels = softmax_case(seed)
    logits.requires_grad_()
    got, want = (torch.autograd.grad(f(logits, labels), logits)[0] for f in (ah.lovasz_softmax, lovasz_softmax_by_loop))
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


def test_nothing_known_costs_nothing():
    """B, degenerate: only void; 0 with gradients."""
    logits = torch.randn(2, 4, 3, 5, requires_grad=True)
    loss = ah.lovasz_softmax(logits, torch.full((2, 3, 5), IGNORE))
    loss.backward()
    assert loss.item() == 0 and loss.shape == () and logits.grad is not None and not logits.grad.any()


def hinge_case(seed, n=3, shape=(3, 4)):
    g = seeded(seed)
    return 1.5 * randn(g, n, *shape), (rand(g, n, *shape) < .4).double()


def lovasz_hinge_by_loop(logits, truth):
    values = [lovasz([(1 - (v if k else -v)).clamp(min=0) for v, k in zip(row, t)], t)
              for row, t in zip(logits.flatten(1), truth.flatten(1).tolist())]
    return sum(values) / len(values)


@pytest.mark.parametrize("seed, n, shape", [(0, 3, (3, 4)), (1, 1, (12,)), (2, 4, (2, 2, 2)), (3, 2, (1,))])
def test_lovasz_hinge_is_the_mean_over_the_masks(seed, n, shape):
    """A.2: errors max(0, 1 - m), each mask for itself, with their gradients."""
    logits, truth = hinge_case(seed, n, shape)
    truth[0] = 0 if n > 2 else truth[0]                                          # a mask without foreground
    logits.requires_grad_()
    got, want = (f(logits, truth) for f in (ah.lovasz_hinge, lovasz_hinge_by_loop))
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6)
    got, want = (torch.autograd.grad(v, logits)[0] for v in (got, want))
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("seed", range(3))
def test_lovasz_hinge_of_logits_of_one_is_twice_1_minus_iou(seed):
    """A.2, closed case: margins are 1 or -1, errors 0 or 2; where the truth has logits of 2 and more, 0."""
    g = seeded(seed)
    guess, truth = rand(g, 20) < .5, rand(g, 20) < .5
    iou = float((guess & truth).sum()) / float((guess | truth).sum())
    got = ah.lovasz_hinge((2 * guess.double() - 1)[None], truth.double()[None])
    assert float(got) == pytest.approx(2 * (1 - iou), abs=2e-6)
    assert float(ah.lovasz_hinge((4 * truth.double() - 2)[None], truth.double()[None])) == 0


def test_no_mask_costs_nothing():
    """A.2, degenerate: N = 0; 0 with gradients."""
    logits = torch.zeros(0, 7, 7, requires_grad=True)
    loss = ah.lovasz_hinge(logits, torch.zeros(0, 7, 7))
    loss.backward()
    assert loss.item() == 0 and loss.shape == () and logits.grad is not None


# --- 3.4.2 and C: inference -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("chunk", [1, 2, 3, 8, 11, 100, None])
@pytest.mark.parametrize("size, shift", [((24, 36), 0), ((21, 35), -50.), ((6, 9), 0)])
def test_inference_is_an_argmax_over_the_enlarged_channels(size, shift, chunk):
    """3.4.2: "inference does not require any post-processing"; the chunks do not show, nor do channels without a pixel."""
    P = randn(seeded(1), 11, 6, 9) + shift
    P[[2, 7]] -= 20                                                              # they win nothing
    categories, scores = torch.arange(11) % 5, rand(seeded(2), 4)
    segments, kinds, got = ah.segment(P, categories, scores, size, **{} if chunk is None else dict(chunk=chunk))
    best = F.interpolate(P[None], size=size, mode="bilinear", align_corners=False)[0].argmax(0)
    winners = best.unique().tolist()
    assert segments.shape == size and segments.dtype == torch.int64 and not {2, 7} & set(winners)
    assert torch.equal(segments, sum((best == c) * n for n, c in enumerate(winners, 1)))
    assert kinds.tolist() == [c % 5 for c in winners] and kinds.dtype == torch.int64
    assert got.tolist() == pytest.approx([float(scores[c]) if c < 4 else 1. for c in winners])


@pytest.mark.parametrize("chunk", [1, 2, 3, 8])
def test_of_equal_channels_the_first_wins(chunk):
    """3.4.2: as torch.argmax has it, in one chunk and across two."""
    P = torch.zeros(5, 2, 2)
    P[[1, 2, 4]] = 1.
    assert ah.segment(P, torch.arange(5), torch.ones(2), (8, 8), chunk=chunk)[1].tolist() == [1]


@pytest.mark.parametrize("d", [0, 2, 3])
def test_stuff_is_certain_and_things_have_their_scores(d):
    """3.4.2 and A.3: score 1 for stuff; D = 0 and D = K among them."""
    P = torch.eye(3).view(3, 1, 3)
    segments, kinds, scores = ah.segment(P, torch.tensor([4, 2, 0]), torch.tensor([.25, .5, .75])[:d], (1, 3))
    assert segments.tolist() == [[1, 2, 3]] and kinds.tolist() == [4, 2, 0]
    assert scores.tolist() == [.25, .5, .75][:d] + [1.] * (3 - d)


def test_without_channels_all_is_void():
    """3.4.2, degenerate: K = 0."""
    segments, kinds, scores = ah.segment(torch.zeros(0, 3, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0), (10, 15))
    assert segments.shape == (10, 15) and segments.dtype == torch.int64 and not segments.any()
    assert kinds.shape == scores.shape == (0,)


def test_small_stuff_goes_and_small_things_stay():
    """C: stuff of fewer than `area` pixels becomes void, at exactly `area` it stays, and the others are renumbered."""
    areas, kinds = [5, 1, 4, 3, 6, 2], torch.tensor([0, 1, 2, 4, 3, 0])           # things 1, 3
    segments = torch.repeat_interleave(torch.arange(7), torch.tensor([3] + areas)).view(4, 6)
    scores = torch.tensor([1., .3, 1, 1, .6, 1])
    got, categories, kept = ah.trim_small_stuff(segments, kinds, scores, ISTHING, 4)
    number = torch.tensor([0, 1, 2, 3, 0, 4, 0])
    assert torch.equal(got, number[segments]) and got.dtype == torch.int64
    assert categories.tolist() == [0, 1, 2, 3] and torch.equal(kept, scores[[0, 1, 2, 4]])


@pytest.mark.parametrize("area, left", [(0, 2), (1, 2), (12, 2), (13, 0)])
def test_trimming_can_leave_everything_or_nothing(area, left):
    """C, degenerate: halves of 12 pixels of stuff."""
    segments = torch.tensor([[1, 2]]).repeat_interleave(12, 1)
    got, kinds, scores = ah.trim_small_stuff(segments, torch.tensor([2, 4]), torch.ones(2), ISTHING, area)
    assert int(got.max()) == len(kinds) == len(scores) == left


def test_trimming_nothing_gives_nothing():
    """C, degenerate: all void."""
    got, kinds, scores = ah.trim_small_stuff(torch.zeros(3, 4, dtype=torch.int64), torch.zeros(0, dtype=torch.int64),
                                             torch.zeros(0), ISTHING, 9)
    assert not got.any() and got.shape == (3, 4) and kinds.shape == scores.shape == (0,)


# --- The demo's data ---------------------------------------------------------------------------------------------------

def test_the_demos_detections_are_smaller_by_a_quarter_moved_by_a_tenth_and_a_fifth_of_them_doubled():
    """What the demo says about its boxes, on 60 of its pictures; scores of doubles are lower than any first one's."""
    isthing, things, doubles = torch.tensor([thing for _, thing in ah.CATEGORIES]), 0, 0
    for i in range(60):
        image, target, v, boxes, scores, categories = ah.scene(i, isthing)
        true = target.boxes[isthing[target.categories]]
        n = len(true)
        assert image.shape == (3, 128, 192) and 0 <= image.min() and image.max() <= 1
        assert torch.equal(categories[:n], target.categories[isthing[target.categories]])
        assert (scores[:n] >= .75).all() and (scores[n:] < .75).all() and (scores >= .5).all() and (scores <= 1).all()
        size, middle = boxes[:n, 2:] - boxes[:n, :2], (boxes[:n, 2:] + boxes[:n, :2]) / 2
        torch.testing.assert_close(size, .75 * (true[:, 2:] - true[:, :2]))
        moved = (middle - (true[:, 2:] + true[:, :2]) / 2) / (true[:, 2:] - true[:, :2])
        torch.testing.assert_close(moved.norm(dim=1), torch.full((n,), .1), rtol=1e-3, atol=1e-5)
        things, doubles = things + n, doubles + len(boxes) - n
    assert .12 < doubles / things < .28


def test_the_demos_semantic_map_is_a_degraded_truth():
    """Probabilities, at stride 4, right for most cells and wrong for some; boxes and ids of its targets from their masks."""
    isthing = torch.tensor([thing for _, thing in ah.CATEGORIES])
    right = total = 0
    for i in range(20):
        _, target, v, *_ = ah.scene(i, isthing)
        assert v.shape == (4, 32, 48)
        torch.testing.assert_close(v.sum(0), torch.ones(32, 48))
        truth = target.categories[target.segments - 1][2::4, 2::4]
        right, total = right + int((v.argmax(0) == truth).sum()), total + truth.numel()
        assert target.segments.unique().tolist() == list(range(1, len(target.categories) + 1))
        for k, box in enumerate(target.boxes.tolist(), 1):
            y, x = torch.where(target.segments == k)
            assert box == [x.min(), y.min(), x.max() + 1, y.max() + 1]
    assert .8 < right / total < .99


def test_the_demos_encoder_gives_the_four_strides():
    """A pyramid like the network's: strides 4, 8, 16, 32, and it knows where a pixel is."""
    torch.manual_seed(0)
    maps = ah.Encoder(8).eval()(torch.zeros(2, 3, 128, 192))
    assert {s: tuple(m.shape) for s, m in maps.items()} == {s: (2, 8, 128 // s, 192 // s) for s in (4, 8, 16, 32)}
    inner = maps[4][0, :, 12:-12, 12:-12]
    assert inner.flatten(1).std(1).max() > 1e-3                               # of an even picture: only the place can differ


def test_memory_of_the_right_order_grows_with_the_pixels_and_that_of_the_left_with_their_square():
    """3.4.2, measured in processes of their own: the dense order at 8192 pixels holds 256 MiB, the other at four times as many
    pixels less than a quarter of that (20 MiB of results, and what the library takes for itself)."""
    left, right = ah.measured("left", [1024, 2048, 8192]), ah.measured("right", [1024, 32768, 131072])
    assert left[8192][1] >= 4 * 8192**2 and right[32768][1] < .25 * left[8192][1]
    assert left[8192][1] / left[2048][1] > 8 and right[131072][1] / right[32768][1] < 6
