"""What the scripts set for a processor."""
import os
import subprocess
import sys

import pytest

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "GLIBC_TUNABLES", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_",
             "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
SPIN = {"GOMP_SPINCOUNT": "2000"}
MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "4294967296"}


def settings(root, given):
    """The variables that a script's processes see."""
    from fairseq_powernorm.experiments.tools import processor_settings

    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    text = "set -euo pipefail; . scripts/lib/common.sh; . scripts/lib/environment.sh >/dev/null; env -0"
    environment.update(given, PYTHON=sys.executable)
    done = subprocess.run(["bash", "-c", text], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = dict(pair.split("=", 1) for pair in done.stdout.split("\0") if "=" in pair)
    assert processor_settings(found) == " ".join(f"{name}={found[name]}" for name in VARIABLES if name in found)
    return {name: found[name] for name in VARIABLES if name in found}


@pytest.mark.parametrize("given,added", [
    ({}, {**SPIN, **MEMORY}),
    ({"GOMP_SPINCOUNT": "7"}, MEMORY),
    ({"OMP_WAIT_POLICY": "PASSIVE"}, MEMORY),
    ({"MALLOC_TRIM_THRESHOLD_": "131072"}, SPIN),
    ({"MALLOC_TOP_PAD_": "1"}, SPIN),
    ({"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}, SPIN),
    ({"GLIBC_TUNABLES": "glibc.pthread.rseq=0"}, {**SPIN, **MEMORY}),
], ids=str)
def test_what_the_user_has_set_stays(root, given, added):
    """OpenMP's waiting and glibc's memory are set apart, each only where nothing of the kind is set."""
    assert settings(root, given) == {**given, **added}
