"""What strangers try: wrong commands, checkpoints and arguments. Each ends in one sentence that
says what was wrong, with exit code 2, or in a documented value. Nothing is left behind."""
import copy

import pytest
import torch

import train
from lab import ends, methods, ranges, settings


def sentence(capsys, *words):
    """What train.py says about bad input: exit code 2 and one sentence, no traceback."""
    with pytest.raises(SystemExit) as stop:
        train.main([str(w) for w in words])
    text = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and len(text.splitlines()) == 1, text
    return text


# --- Numbers out of their range, with `--set` and with flags ------------------------------------
OUT_OF_RANGE = {  # of a method: a name and values that it cannot have; the next name
    "seamless": """fit.steps 0 2.5 ten 1e400; fit.batch 0 None; fit.lr 0 nan (1,2); fit.decay 2;
        fit.decay_norms no; fit.warmup -5; fit.drops (2,3) 0.5 none; fit.poly -3; fit.clip nan;
        crops.size 64 (0,5) (5,5,5) (9,99999); crops.scale (1,) (0,1) 1; crops.flip 2;
        crops.hue 0.6; crops.mode isu; body.width 0 1; body.frozen 99; body.name resnet7;
        model.window -1 (5,5); model.ratios (-1,) () 1; model.rois x; model.proposals 0.5;
        model.box_loss iou; model.score_threshold nan 7; model.stuff_area 1e400; --steps 0;
        --images -1; --eval-every -1; --seed -1 12345678901234567890""",
    "adaptis": """model.threshold nan 2; model.window (0,0) 5; model.points 0; model.radius 0;
        model.loss dice; fit.lr_body -1""",
    "affinity": "model.variant D; model.end_to_end some; model.loss_weights (1,) (1,1,-1)",
    "queries": "model.ibs_weight -1 nan; model.heads 0; model.weights (1,) (1,1); model.overlap 7",
}
RANGE_TRIES = [(method, name, value) for method, text in OUT_OF_RANGE.items()
               for name, *values in map(str.split, text.split(";")) for value in values]


@pytest.mark.parametrize("method, name, value", RANGE_TRIES)
def test_a_number_out_of_its_range_is_refused_with_the_range(method, name, value, capsys, tmp_path):
    words = [name, value] if name.startswith("--") else ["--set", f"{name}={value}"]
    text = sentence(capsys, "--method", method, *words, "--out", tmp_path / "r")
    assert name in text and "it must be" in text and not (tmp_path / "r").exists()


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_setting_has_a_range(method):
    for mode in train.SAMPLERS:
        known = settings.defaults(method, mode, train.fit)
        for section in known:
            for key, default in known[section].items():
                name = f"{section}.{key}"
                assert ranges.rule_of(name, default, method) or name == "body.weights", name


# --- Commands -----------------------------------------------------------------------------------
COMMANDS = [
    ("--set fit.lrr=1", "fit.lrr", "fit has", "lr_body"), ("--set lr=1", "SECTION.NAME=VALUE"),
    ("--set fit.lr", "SECTION.NAME=VALUE"), ("--set model.queries=4", "seamless on street"),
    ("--set body.weights=imagenet", "body.name=small", "weights=none"),
    ("--set body.weights=x.pt body.name=resnet18", "x.pt: no such file", "imagenet"),
    ("--method ibs --dataset cells", "no recipe", "parking"),
    ("--dataset cityscapes", "--root"), ("--dataset coco --root nowhere", "nowhere"),
    ("--sampler paired --set fit.batch=3", "even"), ("--set crops.canonical=112", "canonical"),
    ("--set crops.scale=(2,1)", "scale = (2, 1)"), ("--set fit.accumulate=3", "multiple of 3"),
    ("--method affinity --set model.end_to_end=none", "end_to_end", "affinity=False"),
    ("--method affinity --set model.variant=A model.masks=False", "variant"),
    ("--precision bf16 --device cpu --set crops.size=(64,96)", "--precision float32"),
    ("--eval a --predict b c", "one of them"), ("--resume a --eval b", "one of them"),
    # What the method or the data set does not read
    ("--method adaptis --box-loss standard", "--box-loss", "adaptis"),
    ("--root x", "--root", "street", "--images"), ("--train-split x", "--train-split", "street"),
    ("--method adaptis --set fit.decay_norms=False", "decay_norms"),
    ("--method ibs --set fit.poly=0.9 fit.drops=(0.5,)", "fit.poly=0"),
    ("--method queries --set model.layers=1", "levels at most"),
    ("--device cuda", "CUDA"),                                 # on a machine without one
    ("--predict", "--predict"), ("--steps ten", "--steps"), ("--methd ibs", "--methd"),
    ("--method yolo", "yolo", "seamless"), ("--sampler paired --dataset moon", "moon")]


@pytest.mark.parametrize("words, parts", [(w, parts) for w, *parts in COMMANDS],
                         ids=lambda v: v if isinstance(v, str) else "")
def test_a_wrong_command_ends_in_one_sentence_and_leaves_no_folder(
        words, parts, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    images = [] if "coco" in words or "--eval" in words else ["--images", 4, "--steps", 1]
    text = sentence(capsys, *images, "--threads", 1, *words.split())
    assert all(part in text for part in parts), text
    assert list(tmp_path.iterdir()) == []


def test_an_out_that_is_a_file_or_cannot_be_made(capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "run", "/proc/run"):
        assert f"--out {out}" in sentence(capsys, "--images", 4, "--out", out)
    assert (tmp_path / "file").read_text() == "mine"


def test_errors_that_are_no_data_errors_end_in_a_sentence_too(capsys):
    for error, code, words in ((OSError(28, "No space left on device", "x.png"), 2, "x.png"),
                               (torch.OutOfMemoryError(), 2, "fit.accumulate"),
                               (RuntimeError("worker exited unexpectedly"), 2, "crops.size"),
                               (KeyboardInterrupt(), 130, "stopped")):
        with pytest.raises(SystemExit) as stop, ends.one_sentence("lab"):
            raise error
        assert stop.value.code == code and words in capsys.readouterr().err


# --- Checkpoints --------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def state():
    """A checkpoint as train.py writes it, of a network that fits its settings."""
    flags = train.parse(["--set", "body.name=tiny", "body.width=8"])
    args, _ = train.arguments(flags)
    categories = train.open_dataset({**args, "eval_images": 1}, "test").categories
    model = methods.build("seamless", categories, args)
    return {"model": model.state_dict(), "optimiser": {}, "step": 4, "seconds": 1.0, "rng": [{}],
            "interval": ({}, 0, 0.0), "settings": args,
            "categories": [[c.name, c.isthing, list(c.colour)] for c in categories]}


CHECKPOINTS = [  # what becomes of the checkpoint, flags, words of the sentence
    ([1], "", "no checkpoint"), ({"a": 1}, "", "no checkpoint"),
    (lambda s: s.pop("rng"), "", "no checkpoint"), (lambda s: s.update(step="x"), "", "no checkp"),
    (lambda s: s.update(settings=[1]), "", "no checkpoint"),
    (lambda s: s["settings"].pop("method"), "", "no checkpoint"),
    (lambda s: s["settings"].update(dataset="mars"), "", "--dataset mars"),
    (lambda s: s["model"].popitem(), "", "another network"),
    (lambda s: s["categories"].pop(), "", "categories"),
    (None, "--method adaptis", "was trained with --method"),
    (None, "--dataset cells", "was trained with --dataset"),
    (None, "--seed 5", "was trained with --seed"), (None, "--set body.width=32", "another network"),
    (None, "--steps 9", "--steps: --eval does not read it"),
    (None, "--set fit.lr=1", "--set fit.lr: --eval"), (None, "--set crops.flip=0", "crops.flip")]


@pytest.mark.parametrize("change, flags, words", CHECKPOINTS)
def test_a_damaged_or_foreign_checkpoint_is_refused(
        change, flags, words, state, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    damaged = copy.deepcopy(state)
    if callable(change):
        change(damaged)
    torch.save(damaged if callable(change) or change is None else change, "last.pt")
    assert words in sentence(capsys, "--eval", "last.pt", *flags.split())
    (tmp_path / "last.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:500])
    for words in (["--eval", "last.pt"], ["--resume", "."], ["--predict", "last.pt", "x.png"]):
        assert "damaged" in sentence(capsys, *words)
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
