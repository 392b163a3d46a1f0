"""The shape of the code: who imports whom, what exists, how large it is."""

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sft_job
from sft_job.cli import COMMANDS

PACKAGE = Path(sft_job.__file__).parent
ENTRY = 5
TABLE = {
    0: {"errors"},
    1: {"yamltext", "paths", "schema", "extras", "config", "seal", "files", "cli"},
    2: {
        "rundir",
        "attempt",
        "records",
        "formats",
        "conversations",
        "templates",
        "batching",
        "hardware",
        "attention",
        "families",
        "modelfiles",
        "facts",
        "prepared",
        "result",
        "identity",
        "memory",
        "flops",
        "fit",
        "images",
        "rates",
        "preflight",
        "choices",
        "workers",
        "launcher",
        "compiled",
        "place",
        "plan",
        "start",
        "jobscript",
        "slurm",
        "follow",
        "enqueue",
    },
    3: {
        "rendezvous",
        "network",
        "world",
        "tokenizer",
        "encode",
        "dataset",
        "varlen",
        "loss",
        "positions",
        "weights",
        "model",
        "source",
        "settings",
        "metrics",
        "checkpoint",
    },
    4: {"fsdp", "zero3", "selftest", "trainer", "export", "worker"},
    ENTRY: {"train", "submit", "data", "chat"},
}
LAYER = {name: layer for layer, names in TABLE.items() for name in names}
# What a layer without torch may import besides the standard library.
THIRD_PARTIES = {0: set(), 1: {"pydantic", "yaml"}, 2: {"pydantic", "yaml", "rich", "submitit"}}
HEAVY = ["torch", "transformers", "accelerate", "deepspeed", "numpy", "tokenizers", "safetensors"]


def modules() -> dict[str, ast.Module]:
    """The parsed files of the package by name, without __init__ and __main__."""
    return {
        path.stem: ast.parse(path.read_text())
        for path in sorted(PACKAGE.glob("*.py"))
        if not path.stem.startswith("__")
    }


def drawn_tree() -> list[tuple[int, str]]:
    """(layer, name) of every line of the tree in the package's docstring, in its order."""
    tree, layer = [], None
    for line in sft_job.__doc__.splitlines():
        if not line.startswith("    "):
            continue
        label, names = line[4:14].strip(), line[14:].split()
        if label.startswith("layer"):
            layer = int(label.split()[1])
        tree.append((layer, names[0]))
    return tree


def imports(tree: ast.AST, *, in_functions: bool = True) -> Iterator[tuple[str, int]]:
    """Every imported module in dotted form with its line; `from p import m` gives both forms."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "sft_job" if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            yield base, node.lineno
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)
        elif in_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports(node, in_functions=in_functions)


def rooms(tree: ast.AST, *, in_functions: bool = True) -> Iterator[tuple[str, int]]:
    """The files of this package that are imported, with the line."""
    for name, line in imports(tree, in_functions=in_functions):
        package, _, rest = name.partition(".")
        if package == "sft_job" and rest.partition(".")[0] in {*LAYER, "__main__"}:
            yield rest.partition(".")[0], line


def test_the_drawn_tree_lists_exactly_the_files_that_exist():
    """The docstring of the package is the map; a file missing there or here is a fault."""
    names = [name for _, name in drawn_tree()]
    assert sorted(names) == sorted(modules())


def test_the_drawn_tree_has_the_layers_of_the_table():
    """The layer that the docstring gives a file is the one of DESIGN section 2."""
    assert {name: layer for layer, name in drawn_tree()} == LAYER


def test_layers_are_drawn_from_the_ground_up():
    """The order of the tree is the order of dependence, so layers never go back."""
    layers = [layer for layer, _ in drawn_tree()]
    assert layers == sorted(layers)


def test_imports_point_downwards_and_back_in_the_tree():
    """A file imports from lower layers, and from its own layer only what stands before it."""
    position = {name: index for index, (_, name) in enumerate(drawn_tree())}
    wrong = []
    for name, tree in modules().items():
        free_inside = LAYER[name] == ENTRY
        for room, line in rooms(tree, in_functions=not free_inside):
            if position.get(room, len(position)) >= position[name]:
                wrong.append(f"sft_job/{name}.py:{line} imports {room}")
    assert wrong == []


def test_nobody_imports_an_entry_point():
    """Layer 5 and __main__ are ends: not even a function of another file imports them."""
    wrong = [
        f"sft_job/{name}.py:{line} imports {room}"
        for name, tree in modules().items()
        for room, line in rooms(tree)
        if LAYER.get(room, ENTRY) == ENTRY
    ]
    assert wrong == []


def test_low_layers_use_the_standard_library_and_little_else():
    """Layer 0 to 2 run on a login node: what they import comes with the base package."""
    wrong = []
    for name, tree in modules().items():
        allowed = THIRD_PARTIES.get(LAYER[name])
        if allowed is None:
            continue
        for imported, line in imports(tree):
            package = imported.partition(".")[0]
            if package not in sys.stdlib_module_names | allowed | {"sft_job"}:
                wrong.append(f"sft_job/{name}.py:{line} imports {imported}")
    assert wrong == []


def test_no_file_is_a_drawer_for_everything():
    """One noun per file: no utils, misc, common, helpers."""
    drawers = {"util", "utils", "misc", "common", "helper", "helpers"}
    assert not drawers & {path.stem for path in PACKAGE.rglob("*.py")}


def test_the_package_is_flat():
    """Every file lies directly in sft_job/."""
    assert [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE] == []


def test_configuration_is_read_by_attribute():
    """A default at the place of use (cfg.get, getattr(config, ...)) is a second declaration."""
    wrong = []
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            owner = ast.unparse(node.args[0]).rpartition(".")[2] if node.args else ""
            if called.endswith("cfg.get") or (called == "getattr" and owner in ("config", "cfg")):
                wrong.append(f"sft_job/{name}.py:{node.lineno}: {ast.unparse(node)}")
    assert wrong == []


def test_the_number_of_files_stays_in_the_budget():
    """As many as one can look through in a flat package, and no more before it gets folders."""
    assert len(list(PACKAGE.glob("*.py"))) <= 68


def test_every_file_stays_in_the_budget():
    """At most 500 lines a file."""
    lengths = {path.name: len(path.read_text().splitlines()) for path in PACKAGE.glob("*.py")}
    assert {name: lines for name, lines in lengths.items() if lines > 500} == {}


def test_every_function_stays_in_the_budget():
    """At most 90 lines a function."""
    long = {
        f"{name}.{node.name}": node.end_lineno - node.lineno + 1
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > 90
    }
    assert long == {}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_a_module_that_can_be_run(command):
    """`sft-job X` and `python -m sft_job.X` are the same function."""
    assert callable(importlib.import_module(f"sft_job.{command}").main)
    last = modules()[command].body[-1]
    assert isinstance(last, ast.If)
    assert ast.unparse(last.test) == "__name__ == '__main__'"


# --- on a login node -----------------------------------------------------------------------

BLOCK = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise ImportError("blocked in this test: " + name)

sys.meta_path.insert(0, Blocked())
"""


def python(code: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that finds this very package."""
    start = f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r})\n"
    return subprocess.run(
        [sys.executable, "-c", start + code, *arguments], capture_output=True, text=True, cwd=cwd
    )


def test_the_block_really_blocks(tmp_path):
    """The tests below would prove nothing if torch could still be imported."""
    result = python(BLOCK + "import torch", cwd=tmp_path)
    assert "blocked in this test: torch" in result.stderr


def test_entry_points_import_without_torch(tmp_path):
    """A login node with the base package alone can import every command."""
    code = BLOCK + "import sft_job.train, sft_job.plan, sft_job.data, sft_job.chat; print('good')"
    result = python(code, cwd=tmp_path)
    assert (result.stdout, result.stderr) == ("good\n", "")


def test_plan_runs_without_torch(job_file):
    """`python -m sft_job.plan job.yaml` shows the plan of the bundled model."""
    run = "import runpy; runpy.run_module('sft_job.plan', run_name='__main__')"
    result = python(BLOCK + run, str(job_file), "--json", cwd=job_file.parent)
    assert result.stderr == ""
    assert json.loads(result.stdout)["parameters"] == 134_515_008


def test_data_validate_runs_without_torch(job_file):
    """`sft-job data validate job.yaml` reads the conversations."""
    run = "import runpy; runpy.run_module('sft_job', run_name='__main__')"
    result = python(BLOCK + run, "data", "validate", str(job_file), cwd=job_file.parent)
    assert result.stderr == ""
    assert result.stdout == "1 conversations read, 1 to train on, 1 answers\n"


@pytest.mark.parametrize("asked", ["--help", "--version"])
def test_help_imports_nothing_slow(asked, tmp_path):
    """`sft-job --help` answers at once: neither pydantic nor yaml nor torch is imported."""
    heavy = [*HEAVY, "pydantic", "yaml", "rich"]
    code = (
        "from sft_job.cli import main; main()\n"
        f"print('loaded:', [name for name in {heavy!r} if name in sys.modules])"
    )
    result = python(code, asked, cwd=tmp_path)
    assert result.stdout.splitlines()[-1] == "loaded: []"
    assert "sft-job" in result.stdout
