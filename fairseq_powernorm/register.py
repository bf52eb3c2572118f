"""Registers the models and tasks of this package with fairseq, once: ``import fairseq_powernorm.register``.

Before that, fairseq is made to run on current versions of its dependencies and changed where the tasks need it.
"""
from . import compat, patches

compat.apply()
patches.apply()

from . import models, tasks  # noqa: E402,F401
