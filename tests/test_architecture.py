"""The law of the code base: who may import whom, how large files and functions get, and what is never called."""

import ast
import importlib
import inspect
import pkgutil
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import limbeck

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "limbeck"
FILES = sorted(SOURCE.rglob("*.py"))

# Folders of pure building blocks; each imports its own folder, those of a lower rank, and nothing else of limbeck.
RANK = {"objectives": 0, "diffusion": 1, "mixers": 1, "synthesis": 1, "compression": 2, "rendering": 2}
FOR_METHODS = {*RANK, "core", "data", "language", "search"}
FOR_METHODS_SINGLY = {"limbeck.models.describe"}
OPTIONAL = {
    *("timm", "torchvision", "transformers", "diffusers", "datasets", "peft", "optuna", "tensorboard", "playwright"),
    *(
        "onnx",
        "onnxruntime",
        "onnxscript",
        "PIL",
        "pyarrow",
        "torch_geometric",
        "gsplat",
        "skimage",
        "trimesh",
        "soundfile",
        "jiwer",
    ),
}
ADAPTERS = ("models/adapters/", "data/readers/")
VAGUE = {"utils", "util", "misc", "helpers", "helper", "common", "stuff"}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def folder_of(path: Path) -> str:
    """`objectives` of src/limbeck/objectives/logits.py; the file's own name for files at the top."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path: Path, everywhere: bool = True) -> list[str]:
    """Absolute names of the imported modules; `everywhere` includes imports within functions and for type checkers."""
    found: list[str] = []
    for node in ast.walk(tree(path)) if everywhere else _at_module_level(tree(path).body):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name_of(path)}:{node.lineno} imports relatively"
            found += [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "limbeck" else []
            found.append(str(node.module))
    return found


def _at_module_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run on import, those under `if TYPE_CHECKING` left out."""
    for statement in body:
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            continue
        yield statement
        for part in ("body", "orelse", "finalbody"):
            if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _at_module_level(getattr(statement, part, []))


def own(names: list[str]) -> list[str]:
    return [name for name in names if name.partition(".")[0] == "limbeck" and name != "limbeck"]


def part(module: str) -> str:
    return module.split(".")[1]


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def calls(path: Path) -> Iterator[tuple[ast.Call, str]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def keyword(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(word.value) for word in call.keywords if word.arg == name), None)


def test_building_blocks_import_only_torch_and_each_other_downwards() -> None:
    allowed = {"torch", "jaxtyping", "limbeck", *sys.stdlib_module_names}
    wrong = []
    for path in FILES:
        if folder_of(path) not in RANK:
            continue
        for module in imports(path):
            outside = module.partition(".")[0] not in allowed
            if outside or (own([module]) and not _lies_below(folder_of(path), part(module))):
                wrong.append(f"{name_of(path)} imports {module}")
    assert not wrong


def _lies_below(folder: str, other: str) -> bool:
    return folder == other or RANK.get(other, 99) < RANK[folder]


def test_methods_import_building_blocks_and_the_core_only() -> None:
    wrong = [
        f"{name_of(path)} imports {module}"
        for path in FILES
        if folder_of(path) == "methods"
        for module in own(imports(path))
        if part(module) not in {*FOR_METHODS, "methods"} and module not in FOR_METHODS_SINGLY
    ]
    assert not wrong


def test_methods_import_each_other_only_as_parents() -> None:
    """A file may import a family's parent, which holds no method of its own, or the method that its class extends."""
    wrong = []
    for path in FILES:
        if folder_of(path) != "methods":
            continue
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.ImportFrom) or not str(node.module).startswith("limbeck.methods."):
                continue
            parent = SOURCE.parent / (str(node.module).replace(".", "/") + ".py")
            if "@register" in parent.read_text() and not _extends(path, {alias.name for alias in node.names}):
                wrong.append(f"{name_of(path)} imports {node.module}")
    assert not wrong


def _extends(path: Path, names: set[str]) -> bool:
    classes = [node for node in tree(path).body if isinstance(node, ast.ClassDef)]
    return any(names & {ast.unparse(base) for base in node.bases} for node in classes)


def test_the_core_stands_on_nothing_of_limbeck() -> None:
    """Within functions it may ask data and models which names there are; it knows no method and no surface."""
    wrong = []
    for path in FILES:
        if folder_of(path) != "core":
            continue
        wrong += [f"{name_of(path)} imports {m}" for m in own(imports(path, everywhere=False)) if part(m) != "core"]
        wrong += [
            f"{name_of(path)} imports {module}"
            for module in own(imports(path))
            if part(module) in {"methods", "cli", "report", "experiment"}
        ]
    assert not wrong


def test_only_the_surface_imports_the_surface() -> None:
    """The command line is a thin layer over the Python API: nothing else knows it. Reports are written at the top."""
    wrong = []
    for path in FILES:
        inner = path.parent != SOURCE and folder_of(path) not in {"cli", "report"}
        for module in own(imports(path)):
            above = part(module) == "cli" and folder_of(path) not in {"cli", "__main__"}
            if above or (part(module) == "report" and inner):
                wrong.append(f"{name_of(path)} imports {module}")
    assert not wrong


def test_nothing_optional_is_imported_outside_its_adapter() -> None:
    wrong = [
        f"{name_of(path)} imports {module}"
        for path in FILES
        if not name_of(path).removeprefix("src/limbeck/").startswith(ADAPTERS)
        for module in imports(path, everywhere=False)
        if module.partition(".")[0] in OPTIONAL
    ]
    assert not wrong


def test_the_package_works_without_any_extra() -> None:
    """Every module but the adapters can be imported where none of the extras is installed."""
    modules = [_module_name(path) for path in FILES if not str(path.relative_to(SOURCE)).startswith(ADAPTERS)]
    modules = [module for module in modules if not module.endswith("__main__")]
    code = (
        "import importlib, sys\n"
        f"for name in {sorted(OPTIONAL)!r}: sys.modules[name] = None\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def _module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_files_stay_small() -> None:
    sizes = {path: len(path.read_text().splitlines()) for path in FILES if path.stat().st_size}
    large = [f"{name_of(path)}: {size} lines" for path, size in sizes.items() if size > _most_lines(path)]
    assert not large
    assert statistics.median(sizes.values()) <= 120


def _most_lines(path: Path) -> int:
    return 250 if folder_of(path) == "methods" else 500


def test_functions_stay_small() -> None:
    sizes = {f"{name_of(path)}:{node.name}": lines(node) for path in FILES for node in functions(path)}
    assert not {name: size for name, size in sizes.items() if size > 80}
    assert statistics.median(sizes.values()) <= 12


def test_no_file_is_named_vaguely() -> None:
    folders = [ROOT / name for name in ("src", "tests", "claims", "benchmarks", "docs")]
    parts = {part for folder in folders for path in folder.rglob("*.py") for part in path.relative_to(ROOT).parts}
    assert not {part for part in parts if part.removesuffix(".py") in VAGUE}


def test_every_public_name_has_a_docstring() -> None:
    silent = [name for module in _modules() for name in _silent(module)]
    assert not silent


def _modules() -> Iterator[ModuleType]:
    for info in pkgutil.walk_packages(limbeck.__path__, "limbeck."):
        if not info.name.endswith("__main__"):
            yield importlib.import_module(info.name)


def _silent(module: ModuleType) -> Iterator[str]:
    if not module.__doc__ and Path(str(module.__file__)).read_text().strip():
        yield module.__name__
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", "") != module.__name__:
            continue
        if inspect.isfunction(value) and not value.__doc__:
            yield f"{module.__name__}.{name}"
        if inspect.isclass(value):
            yield from _silent_members(value)


def _silent_members(kind: type) -> Iterator[str]:
    """A class and its public members; one that overrides a documented member, or that the class describes, needs no
    docstring of its own."""
    about = vars(kind).get("__doc__") or ""
    if not about:
        yield f"{kind.__module__}.{kind.__qualname__}"
    for name, value in vars(kind).items():
        described = inspect.isfunction(value) or isinstance(value, property | classmethod | staticmethod)
        if not described or name.startswith("_") or name == "forward" or getattr(value, "__name__", "") == "<lambda>":
            continue
        if not inspect.getdoc(getattr(kind, name)) and f"{name}:" not in about:
            yield f"{kind.__module__}.{kind.__qualname__}.{name}"


def test_methods_leave_devices_and_optimizers_alone() -> None:
    """No waiting for the device, no device of their own, no optimizer, no tracker: the trainer does all of these."""
    waiting = re.compile(r"\.(item|tolist|cuda|numpy)$")  # of a tensor these take no argument
    forbidden = re.compile(r"(^|\.)(empty_cache|synchronize)$|(^|\.)optim\.\w+$")
    wrong = [
        f"{name_of(path)}:{call.lineno} calls {function}"
        for path in FILES
        if folder_of(path) == "methods"
        for call, function in calls(path)
        if (forbidden.search(function) or (waiting.search(function) and not call.args)) and not _is_procedure(path)
    ]
    assert not wrong


def _is_procedure(path: Path) -> bool:
    return _extends(path, {"Procedure"})


def test_nothing_that_is_loaded_can_run_code() -> None:
    wrong = []
    for path in _python_files():
        for call, function in calls(path):
            safe = {"torch.load": keyword(call, "weights_only") == "True"}.get(function, True)
            safe &= keyword(call, "trust_remote_code") in (None, "False")
            safe &= keyword(call, "allow_pickle") in (None, "False")
            if not safe:
                wrong.append(f"{name_of(path)}:{call.lineno}")
        if path.is_relative_to(SOURCE):
            wrong += [f"{name_of(path)} imports {m}" for m in imports(path) if m in {"pickle", "dill", "cloudpickle"}]
    assert not wrong


def test_no_file_names_a_machine_or_a_registry() -> None:
    # Spelt in pieces so that this file passes its own test.
    paths = [f"/{name}/" for name in ("work", "home/" + r"\w+", "root", "Users/" + r"\w+", "opt")]
    hosts = ["py" + r"pi\.org", "python" + r"hosted\.org", r"download\.py" + r"torch\.org", "--(extra-)?" + "index-url"]
    pattern = re.compile("|".join([*(rf"(?<![\w.~-]){path}" for path in paths), *hosts]))
    wrong = []
    for path in _repository():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="ignore").splitlines(), 1):
            if found := pattern.search(line):
                wrong.append(f"{name_of(path)}:{number} holds {found.group()}")
    assert not wrong


def _python_files() -> list[Path]:
    return [path for path in _repository() if path.suffix == ".py"]


@cache
def _repository() -> list[Path]:
    """Text files of the repository, those that are not committed yet included."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    paths = [ROOT / name for name in names if not name.endswith((".safetensors", ".png", ".npz", ".parquet"))]
    return [path for path in paths if path.is_file()]
