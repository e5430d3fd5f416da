"""The spec of lab/exercise.py: each exercise is solved once, the unchanged file is refused."""
import pytest

from data import DataError
from lab import exercise
from lab.answers import ANSWERS


@pytest.mark.slow
@pytest.mark.parametrize("file, number", ANSWERS)
def test_the_marker_accepts_the_answer_and_nothing_less(file, number):
    right, sentence = exercise.mark(file, number, exercise.solved(file, number))
    assert right and sentence.startswith("Right."), sentence
    if number == 1:
        right, sentence = exercise.mark(file, 1, (exercise.ROOT / f"{file}.py").read_text())
        assert not right and "passes still" in sentence
    if (file, number) == ("pq", 1):                            # more than was asked
        source = exercise.solved(file, 1).replace("iou >= 0.5", "iou > 0.4")
        assert "and should not" in exercise.mark(file, 1, source)[1]


def test_a_copy_is_made_refused_while_unchanged_and_marked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "runs" / "exercises" / "cabb_loss_1.py"
    exercise.main(["cabb_loss", "1"])
    assert "In `free_sides` drop `& truncated`" in capsys.readouterr().out and copy.exists()
    for text, word in (("# changes nothing\n", "change it first"), ("def f(:\n", "line")):
        copy.write_text(copy.read_text() + text)
        with pytest.raises(DataError, match=word):
            exercise.main(["cabb_loss", "1"])
    capsys.readouterr()
    monkeypatch.setattr(exercise, "mark", lambda *args: (False, "seen"))
    copy.write_text(exercise.solved("cabb_loss", 1))
    with pytest.raises(SystemExit) as stop:
        exercise.main(["cabb_loss", "1"])
    assert stop.value.code == 1 and capsys.readouterr().out == "changed: free_sides\nseen\n"
