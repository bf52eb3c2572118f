"""Models and architectures; importing the package registers them with fairseq."""
from . import tensorized_lm_pn, transformer_lm_pn, transformer_pn  # noqa: F401
