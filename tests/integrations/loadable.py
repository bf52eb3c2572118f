"""Hides a torchaudio that was built for another torch: transformers imports it wherever it finds it."""
import sys

try:
    import torchaudio  # noqa: F401
except ImportError:
    pass
except OSError:
    sys.modules["torchaudio"] = None
