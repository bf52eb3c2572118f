"""``python scripts/benchmark.py``: see fairseq_powernorm/experiments/benchmark, and --help."""
import runpy

if __name__ == "__main__":
    runpy.run_module("fairseq_powernorm.experiments.benchmark", run_name="__main__")
