"""The arithmetic of the norms, without autograd and without state.

``reference`` is plain torch and runs everywhere; every other kernel is held to it.
"""
from . import reference as kernel

__all__ = ["kernel"]
