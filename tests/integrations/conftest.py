"""What these tests need before transformers is imported."""
import loadable  # noqa: F401
