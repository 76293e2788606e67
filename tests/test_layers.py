"""Modules stand on floors and imports go down: the table of floors, checked on the syntax trees."""

import ast
import pathlib

import pytest

import sera_jax

FLOORS = """
0 records mesh processes metrics config disk calibration correlation nash tree_kernel decode_kernel
1 tree_loops triton_kernel draw rope rows step toyworld
2 attention model data losses policy_gradient sera explore ledger checkpoint report
3 hf score sample
4 rewards judge preference
5 programs
6 bootstrap selection winrate policies run
7 train generate evaluate review annotate agree
8 arms reward_model
9 compile_check
"""
FLOOR = {room: int(line.split()[0]) for line in FLOORS.strip().splitlines() for room in line.split()[1:]}
DOORS = set("annotate agree arms compile_check reward_model train generate evaluate review toyworld report".split())
OPTIONAL = {"tensorboardX", "wandb", "openai"}  # the only imports that may stand inside a function
HOUSE = pathlib.Path(sera_jax.__file__).parent


def modules() -> dict[str, ast.Module]:
    """Dotted name within sera_jax → syntax tree; a package goes by its own name, the top by ""."""
    found = {}
    for path in sorted(HOUSE.rglob("*.py")):
        parts = path.relative_to(HOUSE).with_suffix("").parts
        found[".".join(p for p in parts if p != "__init__")] = ast.parse(path.read_text(encoding="utf-8"))
    return found


MODULES = modules()


def imports(tree: ast.AST) -> list[tuple[str, int]]:
    """(dotted name, relative level) of everything imported; `from a import b` counts as a.b."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(f"{node.module}.{alias.name}", node.level) for alias in node.names]
    return found


def own(tree: ast.AST) -> set[str]:
    """Modules of sera_jax that are imported, as keys of MODULES."""
    found = set()
    for name, _ in imports(tree):
        head, _, rest = name.partition(".")
        if head == "sera_jax":
            while rest not in MODULES:  # drop the name of what is imported from the module
                rest = rest.rpartition(".")[0]
            found.add(rest)
    return found


def outside(tree: ast.AST) -> set[str]:
    return {name.split(".")[0] for name, _ in imports(tree)} - {"sera_jax"}


def room(module: str) -> str:
    return module.split(".")[0]


def crossings(module: str, tree: ast.AST) -> list[str]:
    """Imports of a module that do not go down a floor."""
    here = room(module)
    return [
        f"{module} (floor {FLOOR[here]}) imports {other or 'sera_jax'}"
        for other in sorted(own(tree))
        if room(other) != here and (other == "" or FLOOR[room(other)] >= FLOOR[here])
    ]


def test_every_room_has_a_floor_and_every_floor_its_rooms():
    assert {room(m) for m in MODULES if m} == set(FLOOR)


@pytest.mark.parametrize("module", [m for m in MODULES if m])
def test_imports_go_down(module):
    assert crossings(module, MODULES[module]) == []


def test_the_reader_of_imports_sees_every_form():
    """Up, sideways, by `import`, by `from`, by name, inside a function."""
    source = """
import sera_jax.score
from sera_jax import mesh, programs
from sera_jax.data import order
def f():
    from sera_jax.step import apply as g
"""
    assert own(ast.parse(source)) == {"score", "mesh", "programs", "data", "data.order", "step"} - {"data"}
    told = crossings("losses", ast.parse(source))
    assert [line.split()[-1] for line in told] == ["data.order", "programs", "score"]


def test_packages_have_no_cycles():
    graph = {m: {o for o in own(tree) if room(o) == room(m) and o != m} for m, tree in MODULES.items() if m}
    for start in graph:
        seen, stack = set(), list(graph[start])
        while stack:
            module = stack.pop()
            assert module != start, f"{start} imports itself through {seen}"
            if module not in seen:
                seen.add(module)
                stack += graph[module]


def test_no_relative_imports():
    assert [(m, name) for m, tree in MODULES.items() for name, level in imports(tree) if level] == []


def test_imports_inside_functions_are_optional_dependencies():
    found = {
        (m, name)
        for m, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef))
        for name, _ in imports(node)
    }
    assert {(m, name) for m, name in found if name.split(".")[0] not in OPTIONAL} == set()
    assert {name for _, name in found} >= {"tensorboardX", "wandb"}


def test_few_doors_open_another():
    found = {(room(m), room(o)) for m, tree in MODULES.items() for o in own(tree) if room(o) in DOORS and m}
    assert {(a, b) for a, b in found if a != b} <= {
        ("train", "report"),
        ("review", "report"),
        ("arms", "train"),
        ("compile_check", "train"),
        ("compile_check", "reward_model"),
        ("reward_model", "train"),
    }


def test_doors_have_a_main():
    for door in DOORS:
        tree = MODULES.get(f"{door}.__main__", MODULES[door])
        body = [*tree.body, *MODULES[door].body]
        names = {n.name for n in body if isinstance(n, ast.FunctionDef)}
        names |= {alias.name for n in body if isinstance(n, ast.ImportFrom) for alias in n.names}
        assert "main" in names, door


def test_the_top_holds_the_version_only():
    docstring, version = MODULES[""].body
    assert isinstance(docstring, ast.Expr) and isinstance(docstring.value.value, str)
    assert isinstance(version, ast.Assign) and version.targets[0].id == "__version__"
    assert sera_jax.__version__.count(".") >= 1


def test_every_module_says_what_it_is_for_and_none_is_a_drawer():
    assert not {m.split(".")[-1] for m in MODULES} & {"utils", "util", "common", "helpers", "misc"}
    assert [m for m, tree in MODULES.items() if not ast.get_docstring(tree)] == []


@pytest.mark.parametrize("package, rooms", [("flax", {"model"}), ("orbax", {"checkpoint"})])
def test_some_dependencies_have_one_room(package, rooms):
    assert {room(m) for m, tree in MODULES.items() if package in outside(tree)} == rooms


def test_pure_rooms():
    """Losses and the paper's arrays stand on nothing; rows is NumPy only; the config loads no JAX."""
    for module in MODULES:
        if room(module) in ("losses", "sera", "explore"):
            assert {room(other) for other in own(MODULES[module])} <= {"records", room(module)}
    assert outside(MODULES["rows"]) == {"numpy", "dataclasses", "math", "collections"}
    for module in ("config", "rows", "data.files", "data.forms", "data.order", "data.tokens"):
        assert not outside(MODULES[module]) & {"jax", "optax", "flax"}
