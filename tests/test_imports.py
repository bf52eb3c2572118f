"""Who imports whom."""
import ast

PACKAGE = "fairseq_powernorm"
#: what each module may import of this package, and whether it may import fairseq
ALLOWED = {
    "version": (set(), False),
    "kernels.eager": (set(), False),
    "kernels.build": (set(), False),
    "kernels.c": ({"kernels.build", "kernels.eager"}, False),
    "kernels.triton_device": (set(), False),
    "kernels.triton": ({"kernels.triton_device", "kernels.eager"}, False),
    "kernels": ({"kernels.c", "kernels.eager", "kernels.triton"}, False),
    "kernels.__main__": ({"kernels", "kernels.build"}, False),
    "functional": ({"kernels"}, False),
    "norms": ({"functional", "kernels"}, False),
    "statistics": ({"norms", "kernels"}, False),
    "recorder": (set(), False),
    "checkpoint": ({"compat"}, False),
    "resume": ({"compat"}, False),
    "fold": ({"norms", "kernels"}, False),
    "export": ({"fold", "checkpoint", "register"}, True),
    "ranks": (set(), False),
    "recalibrate": ({"statistics", "checkpoint", "register"}, True),
    "compat": (set(), True),
    "patches": ({"ranks", "resume"}, True),
    "options": ({"norms", "statistics", "recorder", "register"}, True),
    "layers": ({"norms", "options", "register"}, True),
    "models.pruning": ({"options"}, False),
    "models.base": ({"norms", "options", "checkpoint", "fold", "models.pruning"}, True),
    "models.transformer_pn": ({"norms", "options", "layers", "models.base"}, True),
    "models.transformer_lm_pn": ({"options", "models.base", "models.transformer_pn"}, True),
    "models.tensorized_attention": (set(), False),
    "models.tensorized_lm_pn": (
        {
            "options", "layers", "models.base", "models.tensorized_attention", "models.transformer_lm_pn",
            "models.transformer_pn",
        },
        True,
    ),
    "models": ({"models.transformer_pn", "models.transformer_lm_pn", "models.tensorized_lm_pn", "register"}, True),
    "tasks": ({"options", "statistics", "recorder", "fold", "models.base", "register"}, True),
    "register": ({"compat", "patches", "models", "tasks"}, False),
    "": ({"version", "register"}, False),
}


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


def test_imports_point_down(root):
    """Each module imports only what stands below it: nothing below ``layers`` imports fairseq, nothing at all ``experiments``.

    The modules that need fairseq import ``register`` when they are complete, so that each of them registers them all.
    """
    found = {name: path for name, path in modules(root) if name.split(".")[0] != "experiments"}
    assert set(found) == set(ALLOWED)
    for name, path in found.items():
        own, may_use_fairseq = ALLOWED[name]
        for imported in imports(name, path):
            if imported.split(".")[0] == "fairseq":
                assert may_use_fairseq, f"{name or PACKAGE} imports {imported}"
            elif imported.split(".")[0] == PACKAGE:
                target = imported[len(PACKAGE) + 1 :]
                matches = [m for m in ALLOWED if m and (target == m or target.startswith(m + "."))]
                assert any(m in own for m in matches) or target == "version.__version__", f"{name} imports {imported}"


def test_version_is_the_packages(root):
    """setup.py's version is the module's."""
    import fairseq_powernorm

    text = (root / PACKAGE / "version.py").read_text()
    assert f'__version__ = "{fairseq_powernorm.__version__}"' in text


def test_register_comes_last(root):
    """A module that registers all of them does so in its last line: nothing of it is missing when the others import it."""
    for name, path in modules(root):
        lines = [line for line in path.read_text().splitlines() if line.startswith(("from . import register", "from .. import register"))]
        if lines:
            assert path.read_text().rstrip().endswith(lines[-1]), name
