"""Who imports whom."""
import ast
import re
import subprocess
import sys

import pytest

import fairseq_powernorm

PACKAGE = "fairseq_powernorm"
#: the floors of the house, by the beginning of a module's name: each imports its own floor and those below
FLOORS = {
    "version": 0, "norm_names": 0, "command_options": 0, "command_line": 0, "kernels": 0,
    "functional": 1, "operators": 1, "norms": 1,
    "statistics": 2, "masks": 2, "convert": 2, "recognition": 2, "references": 2, "readers": 2, "fold": 2, "recorder": 2,
    "probe": 2, "integrations": 2,
    "experiments": 4,
}
#: the fairseq half
FAIRSEQ = 3
#: the torch half, which never imports fairseq
TORCH_HALF = 2
#: what else a module of the torch half imports: for a figure, or because it is made for that package
FOREIGN = {
    "recorder": {"matplotlib"},
    "integrations.accelerate": {"accelerate"},
    "integrations.hugging_face": {"transformers"},
    "integrations.lightning": {"lightning", "pytorch_lightning"},
}
#: registers the package; whoever needs fairseq imports it in the last line, so that each of them registers all
REGISTER = "register"


def floor(name):
    return FLOORS.get(name.split(".")[0], FAIRSEQ)


def modules(root):
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root / PACKAGE).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(name, path):
    """Absolute names of what a module imports, anywhere in its text."""
    is_package = path.name == "__init__.py"
    here = [PACKAGE, *([p for p in name.split(".") if p])]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = here[: len(here) - node.level + is_package]
                source = ".".join(base + ([node.module] if node.module else []))
                for alias in node.names:
                    yield f"{source}.{alias.name}"
            else:
                yield node.module


def own_imports(root):
    """Module -> the modules of this package that it imports, and whether it imports fairseq."""
    known = {name for name, _ in modules(root)}
    for name, path in modules(root):
        own, foreign = set(), set()
        for imported in imports(name, path):
            package, _, target = imported.partition(".")
            if package == PACKAGE:
                while target and target not in known:  # a name inside a module
                    target = target.rpartition(".")[0]
                own.add(target)
            else:
                foreign.add(package)
        yield name, own - {name}, foreign


@pytest.mark.skipif(sys.version_info < (3, 10), reason="Python 3.8 and 3.9 have no list of the standard library's modules")
def test_floors(root):
    """Each module imports its own floor and those below; the torch half imports nothing but torch and the standard
    library, and what ``FOREIGN`` says.
    """
    for name, own, foreign in own_imports(root):
        for imported in own - {""}:
            assert floor(imported) <= floor(name), f"{name} imports {imported}"
        if floor(name) <= TORCH_HALF:
            allowed = {"torch", "triton", *sys.stdlib_module_names, *FOREIGN.get(name, ())}
            assert foreign <= allowed, f"{name} imports {foreign - allowed}"
        assert "experiments" not in {each.split(".")[0] for each in own} or floor(name) == 4


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 10), reason="Python 3.8 and 3.9 have no list of the standard library's modules")
def test_integrations_load_their_package_on_use(root):
    """``fairseq_powernorm.integrations`` and what its rooms share load no other project but torch, and no module outside
    imports one of the rooms.
    """
    code = (
        "import sys, fairseq_powernorm.integrations.steps; "
        "print(*{'transformers', 'lightning', 'pytorch_lightning', 'accelerate', 'fairseq'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.split() == []
    for name, own, _ in own_imports(root):
        rooms = {each for each in own if each.startswith("integrations.")}
        assert not rooms or name.startswith("integrations."), f"{name} imports {rooms}"


def test_no_circles(root):
    """No module imports itself by way of others, but for the registration, which comes last."""
    edges = {name: own - {"", REGISTER} for name, own, _ in own_imports(root) if name not in ("", REGISTER)}
    done = set()
    while edges.keys() - done:
        ready = {name for name in edges.keys() - done if edges[name] <= done}
        packages = {name for name in edges.keys() - done if edges[name] - done <= {name.rpartition(".")[0]}}
        assert ready | packages, f"a circle among {sorted(edges.keys() - done)}"
        done |= ready | packages


def test_version(root):
    """The version is that of the first section of CHANGELOG.md, a development version as long as that is not released."""
    version, state = re.search(r"^## \[(.+)\](.*)$", (root / "CHANGELOG.md").read_text(), re.M).groups()
    assert fairseq_powernorm.__version__ == version + (".dev0" if "Unreleased" in state else "")


def test_register_comes_last(root):
    """A module that registers all of them does so in its last line: nothing of it is missing when the others import it."""
    for name, path in modules(root):
        lines = [
            line
            for line in path.read_text().splitlines()
            if line.startswith(("from . import register", "from .. import register"))
        ]
        if lines:
            assert path.read_text().rstrip().endswith(lines[-1]), name
