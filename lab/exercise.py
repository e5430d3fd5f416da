"""Marks an exercise: runs the tests that it is about on your copy of a file; says what they saw.

    python -m lab.exercise                       lists all exercises
    python -m lab.exercise cabb_loss 1           copies it to runs/exercises/cabb_loss_1.py
    (change the copy)
    python -m lab.exercise cabb_loss 1           marks the copy
    python -m lab.exercise cabb_loss 1 --solve   prints the answer

The texts stand at the end of each file, what the marker looks for in lab/answers.py. Nothing in the
repository changes: the tests run in a temporary copy, with your file in place of the original.
"""
import ast
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from data import DataError
from lab import ends
from lab.answers import ANSWERS

ROOT = Path(__file__).resolve().parent.parent
PLACE = Path("runs", "exercises")  # where the reader's copies lie
PATIENCE = 300                     # seconds that the tests of an exercise may take


def text_of(file, number):
    """The text of an exercise, as the file's last comment has it."""
    comment = (ROOT / f"{file}.py").read_text().split("# Exercises\n")[-1]
    return " ".join(re.split(r"^# \d\. ", comment, flags=re.M)[number].replace("#", "").split())


def parts_of(source):
    """Functions and classes' methods of a program -> {name: its code without docstrings}; "" is
    all that stands in no function."""
    found, rest = {}, []

    def walk(nodes, before):
        for node in nodes:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
                node.body = node.body[1:]
            if isinstance(node, ast.ClassDef):
                walk(node.body, f"{before}{node.name}.")
            elif isinstance(node, ast.FunctionDef):
                found[before + node.name] = ast.dump(node)
            else:
                rest.append(ast.dump(node))
    walk(ast.parse(source).body[1:], "")                       # the file's docstring comes first
    return {**found, "": "\n".join(rest)}


def changed_parts(file, copy):
    """Names of the functions in which a copy differs from the original."""
    try:
        mine, first = parts_of(copy.read_text()), parts_of((ROOT / f"{file}.py").read_text())
    except SyntaxError as e:
        raise DataError(f"{copy}, line {e.lineno}: {e.msg}; mend it, then ask again") from e
    return sorted(name for name in mine.keys() | first.keys() if mine.get(name) != first.get(name))


def world_with(file, source, folder):
    """Copies the repository's programs and tests to `folder`, with `source` in place of a file."""
    for path in (*ROOT.glob("*.py"), ROOT / "pytest.ini"):
        shutil.copy(path, folder)
    for name in ("lab", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / f"{file}.py").write_text(source)


def run(words, folder):
    """A program's exit code and output, run in `folder`; -1 if it takes too long."""
    try:
        done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True,
                              timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return -1, ""
    return done.returncode, done.stdout + done.stderr


def run_tests(file, names, folder):
    """Runs tests of a file by name -> {name: it passed}. All cases of a name must pass."""
    report = folder / "report.xml"
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}",
             f"tests/test_{file}.py", "-k", " or ".join(names)]
    code, output = run(words, folder)
    if code == -1:
        raise DataError(f"the tests did not end within {PATIENCE} seconds: is there an endless "
                        "loop in your change?")
    found = {}
    for case in ElementTree.parse(report).getroot().iter("testcase") if report.exists() else ():
        name = case.get("name").split("[")[0]
        found[name] = found.get(name, True) and not list(case)
    if not all(name in found for name in names):
        last = [line for line in output.splitlines() if line.startswith("E ")][-1:]
        raise DataError("the tests cannot use your file: " + "".join(last).strip("E "))
    return found


def number_of(file, number, folder):
    """The number that an exercise measures (`measure` in its answer), in the copy in `folder`."""
    program = (f"from lab.answers import ANSWERS\n"
               f"print('number', ANSWERS[{file!r}, {number}].measure())")
    code, output = run(["-c", program], folder)
    found = re.findall(r"^number (\S+)$", output, re.M)
    if code or not found:
        last = output.strip().splitlines()[-1] if output.strip() else "it did not end"
        raise DataError(f"with your change the measurement fails: {last}")
    return float(found[0])


def mark(file, number, source):
    """Tries a reader's file -> (solved, one sentence that says what was seen)."""
    answer = ANSWERS[file, number]
    names = [*answer.fail, *answer.hold]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        world_with(file, source, folder)
        passed = run_tests(file, names, folder) if names else {}
        still = [name for name in answer.fail if passed[name]]
        broken = [name for name in answer.hold if not passed[name]]
        if broken:
            return False, f"{broken[0]} fails now, and should not: the change does more than asked."
        if still:
            return False, f"{still[0]} passes still: it should notice the change that is asked."
        if answer.measure is None:
            return True, f"Right. {', '.join(answer.fail)} noticed it. {answer.why}"
        now, before = number_of(file, number, folder), number_of(file, number, ROOT)
        seen = f"{answer.what}: {before:.4g} before, {now:.4g} with your change."
        if not answer.right(before, now):
            return False, f"{seen} {answer.wanted}"
        return True, f"Right. {seen} {answer.why}"


def solved(file, number):
    """The original with the answer's change in it."""
    source = (ROOT / f"{file}.py").read_text()
    for old, new in ANSWERS[file, number].change:
        if source.count(old) != 1:
            raise DataError(f"{file} {number}: the answer no longer fits the file: {old!r}")
        source = source.replace(old, new)
    return source


def main(argv=None):
    """Lists, copies, marks or solves. Exit code 0: right; 1: not yet; 2: nothing to mark."""
    parser = ends.Parser(__doc__)
    parser.add_argument("file", nargs="?", choices=sorted({f for f, _ in ANSWERS}))
    parser.add_argument("number", nargs="?", type=int, choices=(1, 2, 3))
    parser.add_argument("--solve", action="store_true", help="print the answer")
    args = parser.parse_args(argv)
    file, number = args.file, args.number
    copy = PLACE / f"{file}_{number}.py"
    if number is None:
        for other in ANSWERS:
            if file in (None, other[0]):
                print(f"{other[0]} {other[1]}: {text_of(*other)}", end="\n\n")
    elif args.solve:
        for old, new in ANSWERS[file, number].change:
            print(f"{old}\n  becomes\n{new}\n")
        print(mark(file, number, solved(file, number))[1])
    elif not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / f"{file}.py", copy)
        print(f"{text_of(file, number)}\n\nChange {copy}, then give this command again.")
    else:
        names = changed_parts(file, copy)
        if not names:
            raise DataError(f"{copy} does what the original does: change it first. The exercise: "
                            f"{text_of(file, number)}")
        print(f"changed: {', '.join(name or 'outside of functions' for name in names)}")
        right, sentence = mark(file, number, copy.read_text())
        print(sentence)
        sys.exit(not right)


if __name__ == "__main__":
    with ends.one_sentence("lab.exercise"):
        main()
