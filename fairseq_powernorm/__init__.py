"""Power Normalization for Transformers, as a plugin for an unmodified fairseq (``--user-dir``).

Importing the package applies the compatibility shims and registers models and tasks with fairseq. Where fairseq is not
installed, nothing is registered and ``fairseq_powernorm.norms`` still works.
"""
import importlib.util

from .version import __version__  # noqa: F401

if importlib.util.find_spec("fairseq") is not None:
    from . import compat

    compat.apply()  # before anything of fairseq is used

    from . import models, tasks  # noqa: F401
