"""The spec of lab/exercise.py: each exercise is solved once, the unchanged file is refused."""
import pytest

from lab import exercise
from lab.answers import ANSWERS


@pytest.mark.slow
@pytest.mark.parametrize("file, number", ANSWERS)
def test_the_marker_accepts_the_answer_and_nothing_less(file, number):
    right, sentence = exercise.mark(file, number, exercise.solved(file, number))
    assert right and sentence.startswith("Right."), sentence
    if number == 1:
        source = (exercise.ROOT / f"{file}.py").read_text()
        right, sentence = exercise.mark(file, number, source)
        assert not right and "passes still" in sentence


def test_a_copy_is_made_refused_while_unchanged_and_marked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "runs" / "exercises" / "cabb_loss_1.py"
    exercise.main(["cabb_loss", "1"])
    assert "In `free_sides` drop `& truncated`" in capsys.readouterr().out and copy.exists()
    for text, word in (("# changes nothing\n", "change it first"), ("def f(:\n", "line")):
        copy.write_text(copy.read_text() + text)
        with pytest.raises(SystemExit) as stop:
            exercise.main(["cabb_loss", "1"])
        assert stop.value.code == 2 and word in capsys.readouterr().err
    monkeypatch.setattr(exercise, "mark", lambda *args: (False, "seen"))
    copy.write_text(exercise.solved("cabb_loss", 1))
    with pytest.raises(SystemExit) as stop:
        exercise.main(["cabb_loss", "1"])
    assert stop.value.code == 1 and capsys.readouterr().out == "changed: free_sides\nseen\n"


@pytest.mark.parametrize("file", sorted({file for file, _ in ANSWERS}))
def test_each_file_has_three_exercises_whose_tests_exist(file):
    tests = (exercise.ROOT / "tests" / f"test_{file}.py").read_text()
    for number in (1, 2, 3):
        answer = ANSWERS[file, number]
        assert exercise.text_of(file, number) and answer.why
        assert answer.fail or answer.measure
        assert all(f"def {name}(" in tests for name in (*answer.fail, *answer.hold))
        assert exercise.solved(file, number)
