"""No file of ours calls what runs code out of a file, hands text to a shell, or unpacks archives where they like."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.fault(19, "a file from a stranger runs code")

ROOT = Path(__file__).parents[2]
FOLDERS = ("src", "tests", "benchmarks", "scripts", "examples")
MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "marshal", "shelve", "dill", "joblib", "jsonpickle"}
"""Whatever they offer."""
NAMES = {
    *("os.system", "os.popen", "pty.spawn", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("shutil.unpack_archive", "tempfile.mktemp", "builtins.eval", "builtins.exec", "pandas.read_pickle"),
    *(f"yaml.{name}" for name in ("load", "load_all", "unsafe_load", "unsafe_load_all", "full_load", "full_load_all")),
    *(f"yaml.{name}Loader" for name in ("", "Unsafe", "Full", "C", "CUnsafe", "CFull")),
}
ALLOWED = {
    ("tests/faults/test_strangers.py", "pickle"): "makes the files whose code must not run, and shows that it would",
    ("tests/test_docs.py", "exec"): "runs the Python that docs/add_a_method.md shows, to test that it works",
    ("tests/test_examples.py", "exec"): "runs the Python that README.md shows, to test that it works",
}
"""What is found in a file all the same, and why."""


def full_names(tree: ast.AST) -> dict[str, str]:
    """What each imported name stands for: `np` for numpy, `system` for os.system."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname or alias.name.split(".")[0]: alias.asname and alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return {name: full or name for name, full in found.items()}


def dotted(node: ast.AST, names: dict[str, str]) -> str:
    """`np.load` as numpy.load; empty where the expression begins with no imported name."""
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value, names)
        return f"{inner}.{node.attr}" if inner else ""
    return names.get(node.id, "") if isinstance(node, ast.Name) else ""


def holds(call: ast.Call, name: str, place: int | None = None) -> object:
    """The constant that an argument is; "unknown" for what only a run would tell, None where it is not given."""
    given = [keyword.value for keyword in call.keywords if keyword.arg == name]
    given += [] if place is None else call.args[place : place + 1]
    return None if not given else given[0].value if isinstance(given[0], ast.Constant) else "unknown"


def banned_call(call: ast.Call, names: dict[str, str]) -> str:
    """What is wrong with the arguments of a call, if anything is."""
    function = dotted(call.func, names)
    if function == "torch.load" and holds(call, "weights_only") is not True:
        return "torch.load without weights_only=True"
    if holds(call, "allow_pickle", 2 if function == "numpy.load" else None) not in (None, False):
        return "allow_pickle"
    return "shell" if holds(call, "shell") not in (None, False) else ""


def banned(node: ast.AST, names: dict[str, str]) -> str:
    """What is wrong with a node, if anything is: a name alone too, since `map(eval, lines)` calls it."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        return next((module for module in modules if module.split(".")[0] in MODULES), "")
    if isinstance(node, ast.Call):
        return banned_call(node, names)
    if isinstance(node, ast.Attribute) and node.attr == "extractall":
        return "extractall"
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in ("eval", "exec"):
        return node.id
    return found if (found := dotted(node, names)) in NAMES else ""


def found_in(source: str) -> Iterator[tuple[int, str]]:
    tree = ast.parse(source)
    names = full_names(tree)
    for node in ast.walk(tree):
        if what := banned(node, names):
            yield node.lineno, what


def files() -> list[Path]:
    return [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]


def test_none_of_our_files_does():
    found = [(str(path.relative_to(ROOT)), line, what) for path in files() for line, what in found_in(path.read_text())]
    assert len(files()) > 100
    assert [each for each in found if (each[0], each[2]) not in ALLOWED] == []
    assert {(file, what) for file, _, what in found} == ALLOWED.keys()  # an exception that nobody needs goes


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import pickle", "pickle"),
        ("from joblib import load", "joblib"),
        ("def f():\n  import dill as d", "dill"),
        ("import yaml as y\ny.load(f, Loader=L)", "yaml.load"),
        ("from yaml import unsafe_load\nunsafe_load(f)", "yaml.unsafe_load"),
        ("import yaml\nclass L(yaml.UnsafeLoader): ...", "yaml.UnsafeLoader"),
        ("import numpy as np\nnp.load(f, allow_pickle=True)", "allow_pickle"),
        ("import numpy\nnumpy.load(f, None, True)", "allow_pickle"),
        ("from numpy import load\nload(f, allow_pickle=trusted)", "allow_pickle"),
        ("import torch\ntorch.load(f)", "torch.load without weights_only=True"),
        ("import torch as t\nt.load(f, weights_only=False)", "torch.load without weights_only=True"),
        ("eval('1')", "eval"),
        ("list(map(exec, lines))", "exec"),
        ("import os\nos.system('ls')", "os.system"),
        ("from os import system as run\nrun('ls')", "os.system"),
        ("import subprocess as s\ns.run('ls', shell=True)", "shell"),
        ("tarfile.open(f).extractall(p)", "extractall"),
        ("import shutil\nshutil.unpack_archive(f)", "shutil.unpack_archive"),
        ("import tempfile\np = tempfile.mktemp()", "tempfile.mktemp"),
    ],
)
def test_what_is_banned_is_found(source, what):
    assert what in [found for _, found in found_in(source)]


@pytest.mark.parametrize(
    "source",
    [
        "import numpy as np\nnp.load(f)\nnp.load(f, allow_pickle=False)",
        "import torch\ntorch.load(f, weights_only=True)",
        "method.eval()\nconfig.eval.batch_size\nmake(eval=3)",
        "import yaml\nyaml.safe_load(f)\nclass L(yaml.SafeLoader): ...",
        "import subprocess\nsubprocess.run(['ls'], shell=False)",
        "tmp_path_factory.mktemp('runs')\nfile.load()",
    ],
)
def test_what_only_looks_like_it_is_not(source):
    assert list(found_in(source)) == []
