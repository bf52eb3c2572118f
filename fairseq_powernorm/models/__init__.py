"""Models and architectures; importing the package registers them with fairseq."""
from . import tensorized_lm_pn, transformer_lm_pn, transformer_pn  # noqa: F401

from .. import register  # noqa: F401  isort: skip  (whichever module for fairseq is imported first, all are registered)
