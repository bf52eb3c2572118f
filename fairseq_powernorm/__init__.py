"""Power Normalization for Transformers: norms for any PyTorch model, and a plugin for an unmodified fairseq.

``from fairseq_powernorm.norms import PowerNorm`` loads torch and nothing else. Models and tasks are registered with fairseq
where fairseq is loaded before the package, as with ``--user-dir``; by :mod:`fairseq_powernorm.register`; and by any module
that needs fairseq, such as :mod:`fairseq_powernorm.tasks`.
"""
import importlib
import sys

from .version import __version__  # noqa: F401


def _fairseq_is_loaded() -> bool:
    """Whether fairseq has been imported to its end; not a folder of that name, a stub, or an import in progress."""
    spec = getattr(sys.modules.get("fairseq"), "__spec__", None)
    return getattr(spec, "origin", None) is not None and not getattr(spec, "_initializing", False)


class _SearchPath(list):
    """``__path__`` of the package, through which ``--user-dir`` reaches a package imported before fairseq was.

    ``fairseq.utils.import_user_module`` imports no module twice: it asks whether the directory is in ``__path__``.
    """

    def __contains__(self, directory: object) -> bool:
        found = super().__contains__(directory)
        if found and _fairseq_is_loaded():
            importlib.import_module(f"{__name__}.register")
        return found


__path__ = _SearchPath(__path__)

if _fairseq_is_loaded():
    from . import register  # noqa: F401
