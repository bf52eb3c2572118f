"""Models and architectures; importing the package registers them with fairseq."""
from . import transformer_pn  # noqa: F401
