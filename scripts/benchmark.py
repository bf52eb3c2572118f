"""``python scripts/benchmark.py``: measures the norms; --help says more."""
import os
import runpy

if __name__ == "__main__":
    os.environ["PN_SCRIPT"] = "scripts/benchmark.py"
    runpy.run_module("fairseq_powernorm.experiments.benchmark", run_name="__main__")
