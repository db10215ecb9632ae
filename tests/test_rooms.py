"""The rooms of the package: who may import whom, read from the source, so that lazy imports count too.

docs/design.md says what each room is for. A failure names the file and the line, and what to do.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "dpsm_hf"
TOP = {"__init__.py", "__main__.py", "version.py", "py.typed"}

#: What each room may import beside itself.
ROOMS: Mapping[str, set[str]] = {"runtime": set(), "rules": {"runtime"}}
ROOMS |= {"calibration": {"runtime"}, "plots": {"runtime"}, "data": set()}
ROOMS |= {"statistics": {"calibration", "runtime"}, "evaluate_modules": {"calibration", "runtime"}}
ROOMS |= {"models": {"rules", "runtime"}}
ROOMS |= {room: {"models", "rules", "calibration", "runtime"} for room in ("evaluation", "head")}
ROOMS |= {"training": {"evaluation", "head", "models", "rules", "calibration", "plots", "data", "runtime"}}
ROOMS |= {"tasks": {"training"} | ROOMS["training"]}
ROOMS |= {"trl": {"training", "models", "rules", "runtime"}}
ROOMS |= {"measuring": {"head", "rules", "runtime"}}
ROOMS |= {"campaign": {"tasks", "measuring", "statistics"} | ROOMS["tasks"]}

#: Inside `campaign`, from the command down; a part may import those after it that `BESIDE` does not take away.
CAMPAIGN = ("cli", "demo", "report", "verdict", "audit", "plan", "cost", "runner", "spec")
BESIDE = {"runner", "audit"}

#: Private names of other packages, and why there is no public one.
THIRD_PARTY: Mapping[str, str] = {
    "torch._C": "whether autograd keeps the graph for another backward pass is asked nowhere else",
    "torch._C._autograd": "as above",
    "torch.ops.mkldnn._linear_pointwise": "oneDNN's matmul has no other door",
    "_forward_hooks": "nn.Module has no public list of its hooks",
    "_version": "a tensor's count of changes in place",
    "_indices": "whether a data set was shuffled or selected from",
    "_remove_unused_columns": "which columns of a set reach Trainer's collator",
    "_attn_implementation": "a configuration tells nowhere else how attention is computed",
    "_is_accelerate_prepared": "Accelerate prepares a model only once, also one that it prepared for evaluation alone",
    "_prepare_inputs": "Trainer's hook for moving a batch to the device, which subclasses override",
    "_get_num_items_in_batch": "Trainer's own denominator, which subclasses override",
    "_get_output_dir": "Trainer's folder of a hyper-parameter trial",
    "_load_best_model": "Trainer loads the best checkpoint at the end of training alone",
    "_metrics": "SFTTrainer logs what it finds there, the one door to its entries",
    "_prepare_dataset": "SFTTrainer's tokenizing of a set",
    "_skip_prepare_dataset": "whether SFTTrainer tokenizes sets at all",
    "_formatting_func": "what SFTTrainer tokenizes a set with",
    "scorer._model": "bert_score keeps the model that it has loaded to itself",
    "scorer._tokenizer": "bert_score keeps the tokenizer that it has loaded to itself",
}


class Import(NamedTuple):
    """One imported module or name: by which module, in which line."""

    by: str
    line: int
    module: str
    name: str | None

    def __str__(self) -> str:
        what = self.module if self.name is None else f"{self.name} of {self.module}"
        return f"{file_of(self.by)}:{self.line} imports {what}"


def modules_of(package: Path) -> dict[str, ast.Module]:
    """Return the syntax trees of a package's modules by dotted name, packages by their folder's."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text("utf-8"))
    return found


MODULES = modules_of(PACKAGE)
FOLDERS = {name for name in MODULES if any(other.startswith(f"{name}.") for other in MODULES)}


def file_of(module: str) -> str:
    return module.replace(".", "/") + ("/__init__.py" if module in FOLDERS else ".py")


def imports_of(module: str) -> Iterator[Import]:
    """Yield what a module imports anywhere in its text, under ``TYPE_CHECKING`` and in functions too."""
    folder = module.split(".") if module in FOLDERS else module.split(".")[:-1]
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, node.lineno, alias.name, None)
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield Import(module, node.lineno, *((inner, None) if inner in MODULES else (source, alias.name)))


IMPORTS = [found for module in MODULES for found in imports_of(module)]
OWN = [found for found in IMPORTS if found.module.split(".")[0] == PACKAGE.name]


def room_of(module: str) -> str:
    return [*module.split("."), ""][1]


def within_campaign(module: str) -> str:
    return [*module.split("."), "", ""][2]


def report(problems: list[str]) -> None:
    assert not problems, "\n".join(problems)


# ---- imports -------------------------------------------------------------------------------------------------------


def test_every_room_is_known_and_the_hall_is_empty() -> None:
    there = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    known = TOP | set(ROOMS) | {"templates"}
    report([f"dpsm_hf/{name}: put it into a room, or add the room to ROOMS" for name in sorted(there - known)])
    assert there >= TOP


def test_rooms_import_lower_rooms_only() -> None:
    problems = []
    for found in OWN:
        room, wanted = room_of(found.by), room_of(found.module)
        if room not in ROOMS or wanted in (room, "version"):
            continue  # the hall's own files open what they offer
        if wanted not in ROOMS[room]:
            allowed = ", ".join(sorted(ROOMS[room])) or "nothing"
            problems.append(f"{found}: {room} may import {allowed}; move what both need into a lower room")
    report(problems)


def test_data_and_statistics_know_no_trainer() -> None:
    report(
        [
            f"{found}: give {room_of(found.by)} what it needs as an argument"
            for found in IMPORTS
            if room_of(found.by) in ("data", "statistics", "calibration", "rules")
            and (
                found.module in ("transformers.trainer", "transformers.trainer_seq2seq")
                or "Trainer" in (found.name or "")
            )
        ]
    )


def test_the_parts_of_a_campaign_import_downwards_only() -> None:
    problems = []
    for found in OWN:
        part, wanted = within_campaign(found.by), within_campaign(found.module)
        if room_of(found.by) != "campaign" or room_of(found.module) != "campaign" or part in ("", wanted):
            continue
        if part not in CAMPAIGN or wanted not in CAMPAIGN:
            problems.append(f"{found}: add the part to CAMPAIGN, where it belongs in the order")
        elif CAMPAIGN.index(wanted) < CAMPAIGN.index(part) or {part, wanted} == BESIDE:
            problems.append(f"{found}: {part} must not need {wanted}; move what both need further down")
    report(problems)


def test_no_circles() -> None:
    below: dict[str, set[str]] = {module: set() for module in MODULES}
    for found in OWN:
        if found.module in MODULES and found.module != found.by:
            below[found.by].add(found.module)
    finished: set[str] = set()
    circles = []

    def visit(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            circles.append(f"{' -> '.join((*path[path.index(module) :], module))}: move what they share into a third")
        elif module not in finished:
            for other in sorted(below[module]):
                visit(other, (*path, module))
            finished.add(module)

    for module in sorted(MODULES):
        visit(module, ())
    report(circles)


# ---- private names -------------------------------------------------------------------------------------------------


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def defined(tree: ast.Module) -> set[str]:
    """Return the private names that a module defines: functions, classes, variables, attributes, slots."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                names.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)  # __slots__, setattr
    return {name for name in names if is_private(name)}


DEFINED = {module: defined(tree) for module, tree in MODULES.items()}


def test_no_private_name_is_imported() -> None:
    report(
        [
            f"{found}: drop the underscore of what others use, or move it to its only user"
            for found in OWN
            if is_private(found.name or "") or any(is_private(part) for part in found.module.split("."))
        ]
    )


def test_no_private_attribute_of_another_file_is_used() -> None:
    everywhere = set().union(*DEFINED.values())
    problems = []
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or not is_private(node.attr) or node.attr in DEFINED[module]:
                continue
            if node.attr in THIRD_PARTY or ast.unparse(node) in THIRD_PARTY:
                continue
            if node.attr in everywhere:
                at = ", ".join(file_of(other) for other, names in DEFINED.items() if node.attr in names)
                what = f"{node.attr} belongs to {at}: make it public there, or ask for what you need"
            else:
                what = f"{node.attr} is private to another package: use a public name, or say in THIRD_PARTY why not"
            problems.append(f"{file_of(module)}:{node.lineno} uses {ast.unparse(node)}: {what}")
    report(problems)


# ---- words ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_every_room_says_what_it_is_for(folder: str) -> None:
    assert ast.get_docstring(MODULES[folder]), f"{file_of(folder)}: say in a docstring what this room is for"
