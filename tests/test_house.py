"""The house: imports go one way, rooms stay small, and nothing heavy is imported before it is needed."""

import ast
import subprocess
import sys
import tomllib
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# From the ground floor up. A room imports from rooms above it in this list, never from itself or below.
ROOMS = (
    "files streams settings ppo functions statistics chat prompts layers caches compiled recording policy decode "
    "generate forward quiz quizmaster checks stored gguf gate loading checkpoint disk journal step episodes signals "
    "terminal report adapters processes rewards watching training evaluation turns recovery run trainer"
).split()
FLOORS = {"lora_ppo": 0, "config": 1, "tasks": 1, "scripts": 2, "exercises": 2, "tools": 3}
SCRIPTS = ("lora_ppo_demo", "train", "evaluate")


def sources() -> dict[str, Path]:
    """Every module of the program by its dotted name, tests left out."""
    files = [
        *ROOT.glob("*.py"),
        *(p for top in ("lora_ppo", "tasks", "exercises", "tools") for p in (ROOT / top).rglob("*.py")),
    ]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in files}


def imported(path: Path, known: set[str]) -> set[str]:
    """The program's modules that a file imports, in functions and for type checkers, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name} imports relatively"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}  # a module, or a name in `module`
            found |= {name if name in known else node.module for name in inner}
    return found & known


def floor(module: str) -> int:
    top = module.partition(".")[0]
    return FLOORS["scripts" if top in SCRIPTS else top]


def wrong_imports(files: dict[str, Path]) -> list[str]:
    """A line for each import that points up, or from one floor's circle to itself."""
    wrong = []
    for module, path in files.items():
        for other in imported(path, set(files)) - {
            "lora_ppo",
            "tasks",
            "exercises",
            "tools",
            "tools.bench",
            "tools.corpus",
        }:
            if module.startswith("lora_ppo.") and other.startswith("lora_ppo."):
                here, there = (ROOMS.index(name.partition(".")[2]) for name in (module, other))
                right = there < here
            else:
                right = floor(other) <= floor(module) and module != other
            if not right:
                wrong.append(f"{module} imports {other}, which stands above it")
    return wrong


def circles(files: dict[str, Path]) -> list[str]:
    """Modules that import themselves by way of others."""
    arrows = {module: imported(path, set(files)) - {module} for module, path in files.items()}
    while leaves := [module for module, others in arrows.items() if not others & arrows.keys()]:
        for module in leaves:
            del arrows[module]
    return sorted(arrows)


def test_no_import_points_up_and_none_goes_in_a_circle():
    assert wrong_imports(sources()) == []
    assert circles(sources()) == []


def test_the_check_sees_an_import_that_points_up_for_type_checkers_and_in_functions(tmp_path):
    files = sources()
    for text in ("if TYPE_CHECKING:\n    from lora_ppo.run import Run\n", "def f():\n    import train\n"):
        planted = tmp_path / "ppo.py"
        planted.write_text(files["lora_ppo.ppo"].read_text() + text)
        [line] = wrong_imports(files | {"lora_ppo.ppo": planted})
        assert line.startswith("lora_ppo.ppo imports ")
    planted.write_text("from train import main\n")
    assert {"train", "lora_ppo.ppo"} <= set(circles(files | {"lora_ppo.ppo": planted}))


def test_every_room_has_its_place_in_the_list():
    assert {f"lora_ppo.{room}" for room in ROOMS} | {"lora_ppo"} == {
        m for m in sources() if m.startswith("lora_ppo") and m != "lora_ppo_demo"
    }


@pytest.mark.parametrize("name", [m for m in sources() if floor(m) < 3])
def test_files_are_small_enough_to_read(name):
    most = {"lora_ppo_demo": 600, "config": 120, "train": 350, "evaluate": 350}.get(name, 400)
    assert len(sources()[name].read_text(encoding="utf-8").splitlines()) <= most


def test_tools_have_at_most_500_lines():
    long = [m for m, p in sources().items() if len(p.read_text(encoding="utf-8").splitlines()) > 500]
    assert long == []


@pytest.mark.parametrize("statement", ["import lora_ppo", "import lora_ppo_demo", "import train", "import evaluate"])
def test_nothing_heavy_is_imported_before_it_is_needed(statement):
    code = (
        f"import sys; {statement}; print([m for m in ('torch', 'transformers', 'peft', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


def metadata(project: Path) -> list[str]:
    """What pip would read of `project`: its requirements, such as 'trl==1.16.0; extra == "trl"'."""
    code = "from setuptools import build_meta; build_meta.prepare_metadata_for_build_wheel('.')"
    done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    [path] = project.glob("*.dist-info/METADATA")
    return Parser().parsestr(path.read_text(encoding="utf-8")).get_all("Requires-Dist")


def test_each_extra_can_be_installed_and_is_what_the_tests_run_with(tmp_path):
    for item in ROOT.iterdir():
        if not item.name.startswith(".") and item.name != "build" and item.suffix != ".egg-info":
            (tmp_path / item.name).symlink_to(item)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    told = [line.replace('"', "'").split("; extra == ") for line in metadata(tmp_path)]
    assert sorted(told) == sorted([pin, f"'{name}'"] for name, pins in extras.items() for pin in pins)
    tried = (ROOT / "requirements-dev.txt").read_text().splitlines()
    del extras["openenv"]  # it brings too much for every developer
    assert [pin for pins in extras.values() for pin in pins if pin not in tried] == []
