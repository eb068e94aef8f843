"""Arrows point one way: cli -> verbs -> nouns; the network knows nothing of the house, and torch stays out of it."""

import ast
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import vit3d

HOUSE = Path(vit3d.__file__).parent
VERBS = {"segmentation", "tracing", "scoring", "training", "sharing"}
COMPOSED = {"reconstruction", "results", "comparison", "learning.validation"}
TORCH_FREE = [
    *("volume", "tree", "swc", "targets", "annotations.gold", "simulate", "plot"),
    *("tracing", "scoring", "reconstruction", "cli", "model_card", "repository"),
    *("model.blocks_vit3d", "model.foreground_vit3d"),
    *("blockwise.block_store", "blockwise.leases", "formats.chunk_check", "learning.augmentation"),
    *("annotations.pairs", "annotations.annotation"),
]
HEAVY = {"torch", "transformers", "accelerate", "datasets", "evaluate"}
NETWORK_MAY_IMPORT = {"torch", "numpy", "transformers", "huggingface_hub"} | sys.stdlib_module_names


def modules() -> list[str]:
    names = [".".join(path.relative_to(HOUSE).with_suffix("").parts) for path in HOUSE.rglob("*.py")]
    return sorted(name for name in names if not name.endswith("__init__") and not name.startswith("metrics"))


def nodes(name: str, everywhere: bool):
    """Statements of a module: all of them, or those that run when it is imported."""
    tree = ast.parse((HOUSE / f"{name.replace('.', '/')}.py").read_text())
    todo = [tree]
    while todo:
        node = todo.pop()
        yield node
        if everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            todo.extend(ast.iter_child_nodes(node))


@cache
def imports(name: str, everywhere: bool = False) -> set[str]:
    """Absolute names of the imported modules; ours without the leading `vit3d.`, others' top package alone."""
    found = set()
    for node in nodes(name, everywhere):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = name.split(".")[: -node.level] if node.level else []
            base = ".".join([*(["vit3d"] if node.level else []), *parents, *([node.module] if node.module else [])])
            found |= {base} if base != "vit3d" else {f"vit3d.{alias.name}" for alias in node.names}
    ours = {n.removeprefix("vit3d.") for n in found if n.startswith("vit3d.")} & set(modules())
    return ours | {n.split(".")[0] for n in found if not n.startswith("vit3d")}


def closure(name: str) -> set[str]:
    """Everything that importing a module imports, through our own modules."""
    found, todo = set(), [name]
    while todo:
        new = imports(todo.pop()) - found
        found |= new
        todo += new & set(modules())
    return found


def run(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(HOUSE.parent), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_import_is_seen():
    """The tests below are worth nothing if the reader of imports is blind."""
    assert {"torch", "tqdm", "model.inference_vit3d", "volume"} <= imports("segmentation")
    assert "numpy" not in imports("cli")
    assert "scoring" in imports("cli", everywhere=True)


@pytest.mark.parametrize("name", [name for name in modules() if name.startswith("model.")])
def test_the_network_imports_only_torch_numpy_transformers_and_its_siblings(name):
    for module in imports(name, everywhere=True):
        assert module in NETWORK_MAY_IMPORT or module.startswith("model."), module
    for node in nodes(name, everywhere=True):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, "`from ..x import y` is not found on the Hub"
            assert node.module, "`from . import x` is not seen by the Hub"
            assert "." not in node.module, "sub-folders are not found on the Hub"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            called = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            assert not any(module.startswith("vit3d") for module in called), "who loads from the Hub has no vit3d"
    # the Hub reads the text, not the syntax: a docstring line may not look like an import
    text = (HOUSE / f"{name.replace('.', '/')}.py").read_text()
    relative = set(re.findall(r"^\s*(?:from|import)\s+\.(\S+)", text, flags=re.MULTILINE))
    assert all((HOUSE / "model" / f"{sibling}.py").exists() for sibling in relative)


def test_the_network_is_flat_and_importing_it_does_nothing():
    assert not [path for path in (HOUSE / "model").iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert not (HOUSE / "model/__init__.py").read_text().strip()


@pytest.mark.parametrize("name", sorted(VERBS & set(modules())))
def test_verbs_do_not_import_one_another(name):
    assert not imports(name) & (VERBS | COMPOSED | {"cli"})


@pytest.mark.parametrize("name", sorted(set(modules()) - VERBS - COMPOSED - {"cli"}))
def test_nouns_do_not_import_verbs(name):
    assert not imports(name, everywhere=True) & (VERBS | COMPOSED | {"cli"})


def test_the_command_line_imports_verbs_only_inside_commands():
    assert not closure("cli") & (VERBS | COMPOSED)


def test_no_import_runs_in_a_circle():
    assert not [name for name in modules() if name in closure(name)]


@pytest.mark.parametrize("name", TORCH_FREE)
def test_rooms_that_need_no_torch_do_not_ask_for_it(name):
    assert not closure(name) & HEAVY


def test_no_room_is_called_utils_or_like_a_public_name():
    assert not [name for name in modules() if "util" in name or "helper" in name]
    assert not set(vit3d.__all__) & set(modules())


def test_importing_the_package_takes_no_time_and_loads_neither_torch_nor_numpy():
    code = """
import sys, time
start = time.perf_counter()
import vit3d
print(time.perf_counter() - start, *({"torch", "numpy", "transformers"} & set(sys.modules)))
"""
    answers = [run(code).split() for _ in range(3)]
    assert all(len(answer) == 1 for answer in answers), answers
    assert min(float(answer[0]) for answer in answers) < 0.3


def test_scoring_tracing_and_plotting_load_no_torch():
    names = [f"vit3d.{name}" for name in TORCH_FREE]
    loaded = run(f"import sys, {', '.join(names)}; print(*sys.modules)").split()
    assert set(names) <= set(loaded)
    assert "torch" not in loaded
    assert "transformers" not in loaded


@pytest.mark.slow
def test_every_public_name_is_its_function_or_class_in_every_import_order():
    code = """
import importlib, inspect, random, sys
import vit3d
rooms = ROOMS
names = list(vit3d.__all__)
for order in range(6):
    for name in [n for n in sys.modules if n.split(".")[0] == "vit3d"]:
        del sys.modules[name]
    import vit3d
    random.seed(order)
    steps = [("name", n) for n in names] + [("room", r) for r in rooms]
    random.shuffle(steps)
    if order < 2:  # all rooms first, all names first
        steps.sort(key=lambda step: step[0], reverse=order == 0)
    for kind, what in steps:
        if kind == "room":
            importlib.import_module("vit3d." + what)
        else:
            scope = {}
            exec(f"from vit3d import {what}", scope)
    for name in names:
        value = getattr(vit3d, name)
        assert inspect.isclass(value) or inspect.isfunction(value), (order, name, value)
        assert value.__name__ == name, (order, name, value)
print("all")
"""
    rooms = [name for name in modules() if name != "cli"]
    assert run(code.replace("ROOMS", repr(rooms))) == "all\n"


def test_a_wrong_name_is_said_to_be_wrong():
    with pytest.raises(AttributeError, match="has no attribute 'segmenter'"):
        _ = vit3d.segmenter
    assert set(vit3d.__all__) <= set(dir(vit3d))
