"""The house rules of docs/design.md: who imports whom, what a wheel holds, what importing does."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from fnmatch import fnmatchcase
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
MAPPED = ("kernels", "pipelines", "profiles", "eval")  # next to dit_sparse in a checkout, inside it in a wheel


@dataclass(frozen=True)
class Group:
    """What the files of a group may import, besides torch, the standard library and each other: groups and packages at
    import time, and more of both inside functions."""

    files: str
    imports: str = ""
    lazily: str = ""


GROUPS = {  # lowest first; a file belongs to the first group whose pattern it fits
    "core": Group(
        "grid order plan clusters schedule voxels voxels.* kernels.key_lists kernels.tail kernels.free_memory",
        lazily="plotting matplotlib",
    ),
    "planning": Group("kernels.planning kernels.planning.*", "core executors gpu"),
    "gpu": Group("kernels.gpu kernels.gpu.*", "triton"),
    "executors": Group("kernels.*", "core gpu platformdirs", lazily="triton xformers flash_attn flashinfer"),
    "adapters": Group("pipelines.*", "core", lazily="diffusers"),
    "methods": Group(
        "budget density method pattern scoring composition notation notation.* methods methods.* gating gating.*",
        "core planning",
        lazily="safetensors",
    ),
    "profile": Group("profiling profiling.head_profile", "core methods pydantic"),
    "engine": Group(
        "engine engine.* attention package",
        "core executors adapters methods profile diffusers",
        lazily="plotting matplotlib",
    ),
    "plotting": Group("plotting plotting.*", "core matplotlib numpy"),
    "bundled": Group(
        "bundled bundled.*",
        "core engine diffusers transformers safetensors jinja2 scipy numpy PIL",
        lazily="skimage trimesh",
    ),
    "output": Group(
        "output output.*",
        "engine methods bundled imageio imageio_ffmpeg numpy PIL",
        lazily="diffusers matplotlib",
    ),
    "generation": Group(
        "generation generation.* profiling.* training training.*",
        "core profile engine methods planning executors adapters output bundled plotting numpy pydantic",
        lazily="diffusers transformers ray",
    ),
    "eval": Group(
        "eval.*",
        "core engine methods executors adapters planning gpu output generation plotting bundled "
        "diffusers numpy pydantic PIL imageio scipy jinja2 matplotlib tomli",
        lazily="triton skimage lpips pyiqa transformers imageio_ffmpeg pycvvdp stlpips_pytorch choix",
    ),
    "demo": Group(
        "demo demo.*", "core executors engine methods profile output generation eval plotting bundled numpy gradio"
    ),
    "cli": Group(
        "cli cli.* app",
        "engine bundled demo typer rich",
        lazily="methods profile executors output generation eval plotting yaml tomli",
    ),
}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    inside = parts[1:] if parts[0] == "dit_sparse" else parts
    return ".".join(part for part in inside if part != "__init__") or "package"


FILES = {
    module_of(path): path
    for folder in ("dit_sparse", *MAPPED)
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "__pycache__" not in path.parts
} | {path.stem: path for path in ROOT.glob("app.py")}


def group_of(module: str) -> str | None:
    return next((name for name, group in GROUPS.items() if fits(module, group.files)), None)


def fits(name: str, patterns: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns.split())


def imports(module: str) -> set[tuple[str, bool]]:
    """The modules and packages that a module imports, and whether lazily: inside a function or for type checkers."""
    tree = ast.parse(FILES[module].read_text())
    not_run = lambda node: isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    is_lazy = lambda node: isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or not_run(node)
    inside = {id(node) for block in filter(is_lazy, ast.walk(tree)) for node in ast.walk(block)}
    return {
        (name, id(node) in inside) for node in ast.walk(tree) for name in imported_by(node, module) if name != "stdlib"
    }


def imported_by(node: ast.AST, module: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [known(alias.name) for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    source = node.module or ""
    if node.level:
        package = ["dit_sparse", *module.split(".")] if module != "package" else ["dit_sparse"]
        up = node.level - (FILES[module].name == "__init__.py")
        source = ".".join([*package[: len(package) - up], *filter(None, [node.module])])
    names = [known(f"{source}.{alias.name}") for alias in node.names]
    return [known(source) if name is None else name for name in names]


def known(name: str) -> str | None:
    """A module of ours, ``public``, ``stdlib`` or a package; None for what is no module but a name inside one."""
    top, _, rest = name.partition(".")
    if top != "dit_sparse":
        return "stdlib" if top in sys.stdlib_module_names else top
    return rest if rest in FILES else None if rest else "public"


@pytest.mark.parametrize("module", FILES)
def test_imports_only_from_lower_groups(module):
    own = group_of(module)
    assert own, f"{module} belongs to no group: add it to GROUPS and to docs/design.md"
    group = GROUPS[own]
    for name, lazy in imports(module):
        source = own if name == "torch" else group_of("package" if name == "public" else name) or name
        allowed = f"{own} {group.imports} {group.lazily if lazy else ''}".split()
        assert source in allowed, f"{module} may not import {name} {'inside a function' if lazy else 'at import time'}"


def test_groups_have_no_import_cycle():
    """The table itself has no cycle: at import time every group imports only groups whose own imports are below it."""
    below = {name: [other for other in group.imports.split() if other in GROUPS] for name, group in GROUPS.items()}
    tuple(TopologicalSorter(below).static_order())
    assert len(GROUPS) <= 15


def test_import_reader_reads():
    """The guard above is only as good as this."""
    assert ("pipelines.family", False) in imports("pipelines.video.wan")
    window = imports("methods.patterns.window")
    assert {("order", False), ("pattern", False), ("grid", False), ("torch", False)} <= window
    assert ("diffusers", True) in imports("pipelines.family")
    assert ("diffusers", True) in imports("engine.interception.intercept")
    assert ("budget", False) in imports("package")


def test_mapped_folders_are_no_packages():
    for folder in MAPPED:
        assert not (ROOT / folder / "__init__.py").exists(), f"{folder}/__init__.py would shadow or break imports"


def test_folders_are_small():
    """A folder has one purpose and at most 14 files, except the root and scorers/ (papers)."""
    exceptions = {ROOT, ROOT / "dit_sparse" / "methods" / "scorers"}
    for folder in {path.parent for path in FILES.values()} - exceptions:
        files = [path for path in folder.iterdir() if path.is_file()]
        assert len(files) <= 14, f"{folder.relative_to(ROOT)} has {len(files)} files: split it by purpose"


def test_no_module_bears_the_name_of_a_library():
    taken = sys.stdlib_module_names | {
        "triton",
        "xformers",
        "flashinfer",
        "lpips",
        "choix",
        "ffmpeg",
        "pycvvdp",
        "vbench",
        "flash_attn",
        "diffusers",
        "torch",
    }
    stems = {path.stem for path in FILES.values()}
    assert not stems & taken


def test_kernels_of_hugging_face_is_not_shadowed(tmp_path):
    fake = tmp_path / "kernels" / "__init__.py"
    fake.parent.mkdir()
    fake.write_text("")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.__file__)"
    assert python(code, cwd=ROOT) == str(fake)


def test_importing_is_free():
    """No optional or heavy package is imported, nothing of torch is patched, and figures do not import pyplot."""
    heavy = [
        "diffusers", "transformers", "accelerate", "gradio", "xformers", "triton", "torch._inductor", "pydantic",
        "matplotlib", "PIL", "skimage", "scipy", "imageio", "jinja2", "typer", "rich",
    ]  # fmt: skip
    code = f"""
import sys, torch, torch.nn.functional as F
state = lambda: [dict(vars(x)) for x in (F, torch, torch.Tensor, torch.nn.Module)]
before, sdpa = state(), F.scaled_dot_product_attention
import dit_sparse
assert F.scaled_dot_product_attention is sdpa
changed = [name for a, b in zip(before, state()) for name in b if a.get(name) is not b[name]]
print(changed, [name for name in {heavy} if name in sys.modules])
from dit_sparse.plotting import masks, plots
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    assert python(code, cwd=ROOT) == "[] []"


def test_dir_lists_the_public_names():
    import dit_sparse

    assert dir(dit_sparse) == sorted([*dit_sparse.__all__, "__version__"])
    assert all(getattr(dit_sparse, name) for name in dir(dit_sparse))
    with pytest.raises(AttributeError, match="no attribute 'Porfile'"):
        _ = dit_sparse.Porfile


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel, built from a copy so that no build folder is left here."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    for folder in ("dit_sparse", *MAPPED):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", target, source], source)
    with zipfile.ZipFile(next(target.glob("*.whl"))) as archive:
        archive.extractall(target / "unpacked")
    shutil.rmtree(source / "build", ignore_errors=True)
    return target / "unpacked"


def test_wheel_holds_the_files_on_disk(wheel):
    shipped = re.compile(
        r".*\.(py|cpp|h|j2)|profiles/.*\.json|eval/comparison/recipes/.*\.toml|dit_sparse/(py\.typed|assets/.*)"
    )
    relative = (
        path.relative_to(ROOT)
        for name in ("dit_sparse", *MAPPED)
        for path in (ROOT / name).rglob("*")
        if path.is_file()
    )
    names = (path.as_posix() for path in relative if "__pycache__" not in path.parts)
    expected = {
        name if name.startswith("dit_sparse/") else f"dit_sparse/{name}" for name in names if shipped.fullmatch(name)
    }
    found = {p.relative_to(wheel).as_posix() for p in (wheel / "dit_sparse").rglob("*") if p.is_file()}
    assert found == expected
    top_level = next(wheel.glob("*.dist-info/top_level.txt")).read_text().split()
    assert top_level == ["dit_sparse"] and {p.name for p in wheel.iterdir() if p.suffix != ".dist-info"} == {
        "dit_sparse"
    }


def test_wheel_works_away_from_the_checkout(wheel, tmp_path):
    """Also its command, with the bundled model; the packages that it depends on are those of this environment."""
    site = Path(torch.__file__).parent.parent
    (entry,) = re.findall(
        r"^dit-sparse = (\S+):(\w+)$", next(wheel.glob("*.dist-info/entry_points.txt")).read_text(), re.M
    )
    commands = [
        ["demo", "--help"], ["presets"], ["show", "radial", "--grid", "4x8x8"],
        ["generate", "a red circle moves right", "--steps", "2", "--frames", "3", "--height", "48", "--width", "48",
         "--executor", "gather", "--out", "clip.mp4"],
    ]  # fmt: skip
    code = f"""
import sys; sys.path[:0] = [{str(wheel)!r}]; sys.path.append({str(site)!r})
import torch; torch.set_num_threads(1)
import dit_sparse.kernels.executors.gather, dit_sparse.pipelines.video.wan
print(dit_sparse.kernels.executors.gather.__file__, dit_sparse.pipelines.video.wan.__file__, len(dit_sparse.__path__))
from {entry[0]} import {entry[1]} as command
for arguments in {commands}:
    sys.argv[1:] = arguments
    try:
        command()
    except SystemExit as end:
        assert not end.code, arguments
"""
    at = wheel / "dit_sparse"
    files = at / "kernels" / "executors" / "gather.py", at / "pipelines" / "video" / "wan.py"
    printed = python(code, tmp_path, "-S")
    assert printed.splitlines()[0] == f"{files[0]} {files[1]} 1"
    assert all(text in printed for text in ("Usage: ", "balanced (default)", "radial  4x8x8", "clip.mp4"))
    assert (tmp_path / "clip.mp4").stat().st_size > 1000


METHOD_FILES = sorted(path for path in (ROOT / "dit_sparse" / "methods").glob("*/*.py") if path.stem != "__init__")


@pytest.mark.parametrize("path", METHOD_FILES, ids=lambda path: path.stem)
def test_method_names_its_paper_and_how_it_differs(path):
    doc = ast.get_docstring(ast.parse(path.read_text()))
    assert re.search(r"arXiv:\d{4}\.\d{4,5}|https://", doc), "name the paper: arXiv:YYMM.NNNNN, or where it is"
    assert "Differs from the authors" in doc


def test_files_stay_short():
    budgets = {"dit_sparse/methods/*": 150, "kernels/*": 400, "*": 300}
    sources = [*FILES.values(), *(ROOT / "kernels" / "cpu").iterdir()]
    for path in sources:
        name = path.relative_to(ROOT).as_posix()
        most = next(lines for pattern, lines in budgets.items() if fnmatchcase(name, pattern))
        lines = len(path.read_text().splitlines())
        assert lines <= most, f"{name} has {lines} lines, {most} are enough: split it or simplify"


def test_no_program_is_tuned_at_its_first_call():
    """Launch settings are data that were reviewed, kernels/gpu/architectures.py."""
    kernels = [
        (path.name, node.name, [ast.unparse(one) for one in node.decorator_list])
        for path in (ROOT / "kernels" / "gpu").glob("*.py")
        if "@triton.jit" in path.read_text()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    plain = (["triton.jit"], ["triton.constexpr_function"])
    assert kernels and all(decorators in plain for *_, decorators in kernels), kernels


def python(code: str, cwd: Path, *flags: str) -> str:
    """What a fresh interpreter prints."""
    return run([sys.executable, *flags, "-c", code], cwd)


def run(command: list, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
