"""The package's version, readable without importing torch or fairseq."""
__version__ = "0.2.0.dev0"
