"""The rules that hold the package together: import directions, public names, wheel content, unsafe calls."""

import ast
import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import msa_memory

ROOT = Path(__file__).resolve().parents[1]

# Folder at the repository root -> import name.
FOLDERS = {
    "msa_memory": "msa_memory",
    "engine": "msa_memory.engine",
    "persistence": "msa_memory.persistence",
    "integrations": "msa_memory.integrations",
}

# What a lower layer may import of this package beside itself; what is above them obeys FORBIDDEN alone.
SHARED = {"msa_memory.config", "msa_memory.errors", "msa_memory.types"}
ALLOWED = {
    "msa_memory.config": SHARED,
    "msa_memory.errors": SHARED,
    "msa_memory.types": SHARED,
    "msa_memory.engine": SHARED,
    "msa_memory.persistence": SHARED,
}
# (importing package, what it may not import, why). An import inside a function counts.
FORBIDDEN = [
    ("msa_memory", "transformers", "a test dependency: the engine has its own decoder"),
    ("msa_memory.engine", "sqlalchemy", "the engine knows no SQL"),
    ("msa_memory.engine", "sqlite3", "the engine knows no SQL"),
    ("msa_memory.persistence", "torch", "the catalog and the state files know no model"),
    ("msa_memory.persistence", "safetensors.torch", "it loads torch"),
    ("msa_memory.memory", "msa_memory.cli", "imports run one way"),
    ("msa_memory.memory", "msa_memory.integrations", "imports run one way"),
]

PUBLIC_NAMES = [
    "Answer",
    "AnswerChunk",
    "ChatMessage",
    "Context",
    "Document",
    "ForgetReceipt",
    "MSAError",
    "MemoryConfig",
    "MemoryModel",
    "Message",
    "Page",
    "Session",
    "Source",
    "Stats",
    "__version__",
]
# Each would run code found in data, or hand a string to a shell.
UNSAFE_MODULES = {"cPickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
UNSAFE_BUILTINS = {"__import__", "eval", "exec"}
UNSAFE_ATTRIBUTES = {"numpy.load", "os.popen", "os.system", "torch.load", "yaml.load", "yaml.unsafe_load"}
UNSAFE_KEYWORDS = {"allow_pickle", "shell", "trust_remote_code"}


def module_files() -> dict[str, Path]:
    """Every module of the package by its import name."""
    files = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            files[".".join([package, *parts])] = path
    return files


MODULES = module_files()
# Alembic runs the files under migrations/ itself; nobody imports them.
PUBLIC_MODULES = [
    name
    for name in MODULES
    if ".migrations" not in name and not any(part.startswith("_") for part in name.split("."))
]


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def imported_names(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported anywhere in a file; `from a import b` gives `a` and `a.b`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"{path}:{node.lineno}: relative import; every import is absolute (pyproject.toml says why)"
            )
            assert node.module is not None
            yield node.lineno, node.module
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def run_python(code: str, cwd: Path) -> str:
    command = [sys.executable, "-P", "-c", code]
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_one_way(name: str) -> None:
    wrong = []
    allowed = next((shared | {layer} for layer, shared in ALLOWED.items() if is_within(name, layer)), None)
    for line, target in imported_names(MODULES[name]):
        if target.split(".")[0] in {"engine", "integrations", "persistence"}:
            wrong.append(f"line {line}: {target} (a second copy of msa_memory.{target})")
        # `from msa_memory import x` yields msa_memory too: the x is what counts.
        judged = allowed is not None and is_within(target, "msa_memory") and target != "msa_memory"
        if judged and not any(is_within(target, package) for package in allowed):
            wrong.append(f"line {line}: {target} (may import only {', '.join(sorted(allowed))})")
        for layer, banned, why in FORBIDDEN:
            if is_within(name, layer) and is_within(target, banned):
                wrong.append(f"line {line}: {target} ({why})")
    assert not wrong, f"{MODULES[name].relative_to(ROOT)}: " + "; ".join(wrong)


def test_the_public_names_are_the_contract() -> None:
    assert sorted(msa_memory.__all__) == msa_memory.__all__
    assert msa_memory.__all__ == PUBLIC_NAMES
    missing = [name for name in PUBLIC_NAMES if not hasattr(msa_memory, name)]
    assert not missing
    assert set(PUBLIC_NAMES) <= set(dir(msa_memory))


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_public_modules_say_what_they_are_and_offer(name: str) -> None:
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{name} has no docstring"
    offered = next((node.value for node in tree.body if assigned_name(node) == "__all__"), None)
    assert offered is not None, f"{name} has no __all__"
    names = ast.literal_eval(offered)
    assert names == sorted(names), f"{name}.__all__ is not in sorted() order: {sorted(names)}"
    if not is_within(name, "msa_memory.integrations"):  # those import frameworks that may be absent
        module = importlib.import_module(name)
        assert [item for item in names if not hasattr(module, item)] == []


def assigned_name(node: ast.stmt) -> str | None:
    match node:
        case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
            return name
    return None


@pytest.mark.parametrize(
    ("imported", "unwanted"),
    [
        (
            "msa_memory",
            {
                "torch",
                "transformers",
                "sqlalchemy",
                "langchain",
                "langchain_core",
                "langgraph",
                "llama_index",
                "mcp",
            },
        ),
        ("msa_memory.persistence", {"torch", "transformers"}),
        ("msa_memory.engine", {"sqlalchemy", "transformers"}),
    ],
)
def test_importing_loads_nothing_heavy(imported: str, unwanted: set[str], tmp_path: Path) -> None:
    loaded = run_python(f"import sys, {imported}; print(*sys.modules)", tmp_path).split()
    assert not unwanted & set(loaded)


def test_the_editable_install_is_this_checkout(tmp_path: Path) -> None:
    """Else the other tests here judge files that no test imports."""
    code = (
        f"import {', '.join(FOLDERS.values())}; print(*(m.__file__ for m in ({', '.join(FOLDERS.values())})))"
    )
    assert run_python(code, tmp_path).split() == [str(ROOT / folder / "__init__.py") for folder in FOLDERS]


def files_known_to_git() -> list[str]:
    """Tracked files and new ones that are not ignored, as they are in the working tree."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "--", *FOLDERS]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    return sorted({name for name in listed if name and (ROOT / name).is_file()})


def build_wheel(files: list[str], folder: Path) -> Path:
    """A wheel of these files and no others: neither ignored files nor an old build/ can hide a gap."""
    source = folder / "source"
    for name in [*files, "pyproject.toml", "LICENSE", "README.md"]:
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    command = [
        sys.executable,
        "-P",
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(folder),
        str(source),
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    [wheel] = folder.glob("*.whl")
    return wheel


def test_the_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    """An explicit `packages` list silently leaves a new sub-folder out of the wheel."""
    files = files_known_to_git()
    expected = set()
    for name in files:
        folder, _, rest = name.partition("/")
        expected.add(f"{FOLDERS[folder].replace('.', '/')}/{rest}")

    with zipfile.ZipFile(build_wheel(files, tmp_path)) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        [info] = {name.split("/")[0] for name in archive.namelist()} - {"msa_memory"}
        metadata = archive.read(f"{info}/METADATA").decode()
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()

    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert sorted(expected - packed) == [], (
        "missing in the wheel: extend packages or package-data in pyproject.toml"
    )
    assert sorted(packed - expected) == []


@pytest.mark.parametrize("name", MODULES)
def test_nothing_runs_what_it_reads(name: str) -> None:
    path = MODULES[name]
    wrong = [
        f"line {line}: import {target}" for line, target in imported_names(path) if target in UNSAFE_MODULES
    ]
    wrong += [
        f"line {line}: import {target}"
        for line, target in imported_names(path)
        if target in UNSAFE_ATTRIBUTES
    ]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.Attribute)
            and ast.unparse(node).replace("np.", "numpy.") in UNSAFE_ATTRIBUTES
        ):
            wrong.append(f"line {node.lineno}: {ast.unparse(node)}")
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in UNSAFE_BUILTINS:
            wrong.append(f"line {node.lineno}: {node.func.id}()")
        for keyword in node.keywords:
            is_false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if keyword.arg in UNSAFE_KEYWORDS and not is_false:
                wrong.append(f"line {node.lineno}: {keyword.arg}={ast.unparse(keyword.value)}")
    assert not wrong, f"{path.relative_to(ROOT)}: " + "; ".join(wrong)


def test_the_tests_cannot_import_a_bare_engine() -> None:
    assert str(ROOT) not in [os.path.abspath(entry) for entry in sys.path]
