"""The package's version, readable without importing torch or fairseq."""
__version__ = "0.1.0"
