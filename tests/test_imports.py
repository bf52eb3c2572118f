"""Who imports whom, and what works without fairseq."""
import ast
import subprocess
import sys

PACKAGE = "fairseq_powernorm"
#: what each module may import of this package, and whether it may import fairseq
ALLOWED = {
    "version": (set(), False),
    "kernels.reference": (set(), False),
    "kernels.build": (set(), False),
    "kernels.c": ({"kernels.build", "kernels.reference"}, False),
    "kernels.fused_triton": (set(), False),
    "kernels.triton": ({"kernels.fused_triton", "kernels.reference"}, False),
    "kernels": ({"kernels.c", "kernels.reference", "kernels.triton"}, False),
    "kernels.__main__": ({"kernels", "kernels.build"}, False),
    "functional": ({"kernels"}, False),
    "norms": ({"functional", "kernels"}, False),
    "statistics": ({"norms", "kernels"}, False),
    "recorder": (set(), False),
    "checkpoint": (set(), False),
    "resume": (set(), False),
    "fold": ({"norms", "kernels"}, False),
    "export": ({"fold", "checkpoint"}, True),
    "ranks": (set(), False),
    "recalibrate": ({"statistics", "checkpoint"}, True),
    "compat": ({"ranks", "resume"}, True),
    "options": ({"norms", "statistics", "recorder"}, True),
    "layers": ({"norms", "options"}, True),
    "models.base": ({"options", "checkpoint", "fold"}, True),
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
    "models": ({"models.transformer_pn", "models.transformer_lm_pn", "models.tensorized_lm_pn"}, True),
    "tasks": ({"options", "statistics", "recorder", "fold"}, True),
    "": ({"version", "compat", "models", "tasks"}, False),
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
    """Each module imports only what stands below it: nothing below ``layers`` imports fairseq, nothing at all ``experiments``."""
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


def test_norms_work_without_fairseq(root):
    """``from fairseq_powernorm.norms import PowerNorm`` trains a step where fairseq is not installed, and does not load
    torch's compiler."""
    blocked = "fairseq"
    program = (
        "import importlib.abc, sys, importlib.util, torch\n"
        "real = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, *a: None if name == {blocked!r} else real(name, *a)\n"
        "class Block(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] == {blocked!r}: raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "from fairseq_powernorm.norms import PowerNorm\n"
        "x = torch.randn(5, 3, 8, requires_grad=True)\n"
        "PowerNorm(8)(x).sum().backward()\n"
        f"assert {blocked!r} not in sys.modules and 'torch._dynamo' not in sys.modules\n"
        "print(x.grad.shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "[5, 3, 8]" in done.stdout


def test_version_is_the_packages(root):
    """setup.py's version is the module's."""
    import fairseq_powernorm

    text = (root / PACKAGE / "version.py").read_text()
    assert f'__version__ = "{fairseq_powernorm.__version__}"' in text
