"""Who may import whom: the floors of docs/architecture.md, read from the source text; nothing is imported."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sage_fast"

# room -> (floor, leg). Rooms without a leg carry both; one that rests on another of its floor stands half a floor up.
ROOMS: dict[str, tuple[float, str | None]] = {
    "errors": (0, None),
    "settings": (0.5, None),
    "arithmetic": (0.5, None),
    "_native": (0.5, None),
    "_build": (0, None),
    "ops": (1, None),
    "minimize": (1, None),
    "models": (3, "images"),
    "factorization": (3, "latents"),
    "fusion": (4, "images"),
    "inversion": (4, "images"),
    "editing": (4, "latents"),
    "pipeline": (5, None),
    "profiling": (5, None),
    "conversion": (5, None),
    "export": (5, None),
    "generation": (5.5, None),
    "reconstruction": (5.5, None),
    "mixing": (5.6, None),
    "augmenter": (5.7, None),
    "training": (6, None),
    "evaluation": (7, None),
    "info": (7, None),
    "demo": (8, None),
    "commands": (8.3, None),
    "cli": (8.5, None),
}
DATA_FROM = 5  # rooms on this floor and above may read files through sage_fast.data
DATA_NEEDS = {"errors", "_native", "_build"}  # what data itself may import
EXCEPTIONS = {
    # the bundle is a folder of files: it holds the table of codes and is written atomically
    ("models/bundles.py", "data"),
}
SOURCES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms that a file imports anywhere in it, inside functions too.

    Blocks under ``if TYPE_CHECKING`` and ``if __name__ == "__main__"`` do not count: the first are never run, the
    second only when the file is the program.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    exempt = [b for b in blocks if ast.unparse(b.test) in ("TYPE_CHECKING", "__name__ == '__main__'")]
    passed_over = {id(node) for block in exempt for statement in block.body for node in ast.walk(statement)}
    names: list[str] = []
    for node in ast.walk(tree):
        if id(node) in passed_over:
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(PACKAGE.parent).parts[: -node.level] if node.level else ()
            base = ".".join([*package, *([node.module] if node.module else [])])
            names += [f"{base}.{alias.name}" for alias in node.names]
    parts = [name.split(".") for name in names]
    rooms = {part[1] for part in parts if part[0] == "sage_fast" and len(part) > 1}
    return rooms - {"__version__"}


def complaint(path: Path, target: str) -> str | None:
    """Why the file may not import the room ``target``, or None when it may."""
    room = room_of(path)
    name = path.relative_to(PACKAGE).as_posix()
    if target == room or (name, target) in EXCEPTIONS:
        return None
    if target != "data" and target not in ROOMS:
        return f"{name} imports {target!r}, which is no room of the house"
    if room == "data":
        return None if target in DATA_NEEDS else f"{name} imports {target}; data rests on {sorted(DATA_NEEDS)} only"
    floor, leg = ROOMS[room]
    if target == "data":
        return None if floor >= DATA_FROM else f"{name} (floor {floor}) imports data, open from floor {DATA_FROM} up"
    target_floor, target_leg = ROOMS[target]
    if leg and target_leg and leg != target_leg:
        return f"{name} ({leg}) imports {target} ({target_leg}): the legs never meet below floor 5"
    if target_floor >= floor:
        return f"{name} (floor {floor}) imports upwards: {target} (floor {target_floor})"
    return None


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_a_file_imports_only_from_lower_floors_of_its_leg(path):
    assert room_of(path) == "data" or room_of(path) in ROOMS, f"{path.name} stands in no room of the house"
    complaints = [text for target in sorted(imported_rooms(path)) if (text := complaint(path, target))]
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize(
    ("room", "text", "allowed"),
    [
        ("ops", "from sage_fast.models.stylegan2 import Generator", False),
        ("pipeline", "from sage_fast.generation import generate", False),
        ("generation", "from sage_fast.pipeline import FewShotPipeline", True),
        ("editing", "from sage_fast.models.stylegan2 import Generator", False),
        ("editing", "from sage_fast.factorization import category_relevant", True),
        ("models", "def f():\n    from sage_fast.factorization.category_relevant import X", False),
        ("models", "from sage_fast.data.writers import atomic_write", False),
        ("models", "from sage_fast import ops", True),
        ("data", "from sage_fast.errors import InputError", True),
        ("data", "import sage_fast.ops", False),
        ("training", "import sage_fast.evaluation.fid", False),
        ("training", "if TYPE_CHECKING:\n    from sage_fast.evaluation import fid", True),
        ("training", "if TYPE_CHECKING:\n    x = 1\nelse:\n    from sage_fast.evaluation import fid", False),
        ("demo", "if __name__ == '__main__':\n    from sage_fast.cli import main", True),
        ("demo", "from sage_fast.cli import main", False),
        ("commands", "from sage_fast.cli import COMMANDS", False),
        ("training", "from sage_fast.helpers import x", False),
        ("training", "from ..evaluation.fid import x", False),
        ("training", "from .gan import x", True),
    ],
)
def test_the_reader_of_imports_tells_right_from_wrong(tmp_path, monkeypatch, room, text, allowed):
    package = tmp_path / "sage_fast"
    (package / room).mkdir(parents=True)
    path = package / room / "file.py"
    path.write_text(text)
    monkeypatch.setitem(globals(), "PACKAGE", package)
    assert all(complaint(path, target) is None for target in imported_rooms(path)) == allowed


def test_every_room_of_the_picture_is_a_file_or_a_folder():
    drawn = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    floors = drawn.split("## Rooms and floors")[1].split("```")[1]
    for path in PACKAGE.iterdir():
        room = path.name.removesuffix(".py")
        if path.suffix == ".py" or (path / "__init__.py").exists():
            known = room in ("data", "__init__", "info", "_build") or room in floors
            assert known, f"{room} is missing in the picture of docs/architecture.md"


def test_no_utils():
    names = {p.stem for p in SOURCES}
    assert not names & {"utils", "util", "helpers", "helper", "common", "misc"}
