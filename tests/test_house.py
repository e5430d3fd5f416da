"""The spec of the house: sizes, columns, imports, docstrings, words. A file that outgrows its
budget fails here."""
import ast
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUDGET = {"cabb_loss.py": 330, "isus.py": 280, "pq.py": 320, "seamless.py": 520, "adaptis.py": 520,
          "affinity_head.py": 370, "ibs.py": 330, "data.py": 300, "train.py": 380}
ALONE = {"data", "pq", "cabb_loss"}                            # these import nothing of ours
CONCEPTS = [name for name in BUDGET if name not in ("data.py", "train.py")]
OURS = {name.removesuffix(".py") for name in BUDGET} | {"lab", "tests"}
TOP = {"README.md", "RESULTS.md", "LICENSE", "requirements.txt", "pytest.ini", "lab", "tests",
       "figures", *BUDGET}


def tracked():
    """The files of the repository, or all files where git is not at hand."""
    try:
        command = ["git", "ls-files", "-co", "--exclude-standard"]
        text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        files = [ROOT / line for line in text.splitlines()]
    except (OSError, subprocess.CalledProcessError):
        files = [p for p in ROOT.rglob("*") if ".git" not in p.parts and "runs" not in p.parts]
    return [p for p in files if p.is_file() and "__pycache__" not in p.parts]


PYTHON = sorted(p for p in tracked() if p.suffix == ".py")


def lines(path):
    return path.read_text().splitlines()


def test_files_stay_within_their_budgets_400_lines_in_lab_6000_in_tests_150_in_the_readme():
    budget = dict.fromkeys((ROOT / "lab").rglob("*.py"), 400)
    budget |= {ROOT / name: n for name, n in BUDGET.items()}
    assert [(p.name, len(lines(p))) for p, n in budget.items() if len(lines(p)) > n] == []
    assert sum(len(lines(p)) for p in (ROOT / "tests").rglob("*.py")) <= 6000
    assert len(lines(ROOT / "README.md")) <= 150


def test_no_line_has_more_than_100_columns():
    wide = []
    for path in PYTHON:
        wide += [f"{path.name}:{n}" for n, line in enumerate(lines(path), 1) if len(line) > 100]
    inside = False
    for n, line in enumerate(lines(ROOT / "README.md"), 1):    # its prose: no tables, no code
        inside ^= line.startswith("```")
        if len(line) > 100 and not inside and not line.startswith(("|", "![")):
            wide.append(f"README.md:{n}")
    assert wide == []


def test_one_statement_a_line():
    """No semicolons, and nothing behind the colon of a compound statement."""
    found = []
    for path in PYTHON:
        source = path.read_text()
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.OP and token.string == ";":
                found.append(f"{path.name}:{token.start[0]}: a semicolon")
        for node in ast.walk(ast.parse(source)):
            body = getattr(node, "body", None)
            if isinstance(body, list) and isinstance(node, ast.stmt) and body:
                if body[0].lineno == node.lineno:
                    found.append(f"{path.name}:{node.lineno}: two statements on a line")
    assert found == []


def module_level_imports(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize("name", [*CONCEPTS, "data.py"])
def test_a_concept_file_imports_at_most_data(name):
    module = name.removesuffix(".py")
    allowed = set() if module in ALONE else {"data"}
    assert set(module_level_imports(ROOT / name)) & OURS <= allowed


@pytest.mark.parametrize("name", [*CONCEPTS, "data.py"])
def test_a_concept_file_reaches_lab_only_in_its_demo(name):
    tree = ast.parse((ROOT / name).read_text())
    demo = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "demo"]
    assert len(demo) == 1
    inside = {id(n) for n in ast.walk(demo[0])}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)) and id(node) not in inside:
            names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
            assert not any(n.split(".")[0] == "lab" for n in names), f"line {node.lineno}"


HELP = """
import os, runpy, sys
import torch, torchvision, numpy                               # once, not once a file
sys.dont_write_bytecode = True
for name in sys.argv[1:]:
    if os.fork() == 0:
        os.chdir(name)
        sys.path[:0] = [os.getcwd()]
        sys.argv = [name + ".py", "--help"]
        runpy.run_path(name + ".py", run_name="__main__")
        os._exit(1)                                            # --help ends the program before
    os.wait()
"""


def test_each_concept_file_prints_its_help_with_data_alone(tmp_path):
    names = [name.removesuffix(".py") for name in [*CONCEPTS, "data.py"]]
    for name in names:
        (tmp_path / name).mkdir()
        for part in {name, "data"}:
            (tmp_path / name / f"{part}.py").write_text((ROOT / f"{part}.py").read_text())
    done = subprocess.run([sys.executable, "-c", HELP, *names], cwd=tmp_path, capture_output=True,
                          text=True, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr
    for flag in ("--quick", "--full", "--device DEVICE", "--out OUT"):
        assert done.stdout.count(f"  {flag} ") >= len(names), flag


def test_every_public_function_of_ours_has_a_docstring():
    missing = []
    for path in [ROOT / name for name in BUDGET] + sorted((ROOT / "lab").rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                if not ast.get_docstring(node) and node.name != "main":
                    missing.append(f"{path.name}:{node.lineno}: {node.name}")
    assert missing == []


def test_the_top_level_holds_what_the_design_names_and_figures_less_than_six_megabytes():
    assert {p.relative_to(ROOT).parts[0] for p in tracked()} - {".ci", ".gitignore"} == TOP
    assert sum(p.stat().st_size for p in (ROOT / "figures").iterdir()) < 6_000_000


def test_the_product_speaks_of_itself_alone():
    words = re.compile(r"/work/|/tmp/old|\bissue \d|this session|farm-|\.library|TODO|FIXME", re.I)
    found = [f"{p.name}:{n}" for p in tracked() if p.suffix in (".py", ".md", ".txt", ".ini")
             and p != Path(__file__) for n, line in enumerate(lines(p), 1) if words.search(line)]
    assert found == []


def test_what_a_claim_names_exists():
    sources = {p.stem: p.read_text() for p in PYTHON if p.parent.name != "tests"}
    defined = {n for text in sources.values() for n in re.findall(r"(?:def|class) (\w+)", text)}
    calls = [c for p in (ROOT / "tests").glob("*.py") for c in ast.walk(ast.parse(p.read_text()))
             if isinstance(c, ast.Call) and getattr(c.func, "id", "") == "claim"]
    for said in ({k.arg: k.value.value for k in call.keywords} for call in calls):
        assert set(said["of"].split(".")) <= defined | set(sources), said
        assert (ROOT / "figures" / said.get("figure", "")).exists(), said
        assert f"\n## {said.get('result', '')}" in (ROOT / "RESULTS.md").read_text(), said
    assert len(calls) > 90
