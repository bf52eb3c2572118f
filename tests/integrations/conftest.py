"""What the tests of integrations need before the packages are imported."""
import sys

try:
    import torchaudio  # noqa: F401
except ImportError:
    pass
except OSError:  # built for another torch; transformers imports it where it finds it
    sys.modules["torchaudio"] = None
