# Sourced after common.sh: sets PYTHON to an interpreter with everything installed, and puts its scripts first in PATH.
#
# 1. PYTHON=... given: used as it is; an error if something is missing there.
# 2. An active virtualenv or conda environment in which nothing is missing.
# 3. .venv in the repository, made on first use; TORCH_SPEC (words for pip) chooses another torch, for instance
#    TORCH_SPEC="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu".

# pn_missing PYTHON: the modules that the project needs and this interpreter lacks; fails if it is none.
pn_missing() {
    local said
    said=$("$1" - <<PYTHON
$pn_safe
from importlib.util import find_spec
needed = """torch fairseq hydra omegaconf sacrebleu sacremoses regex subword_nmt sentencepiece jinja2 matplotlib pytest xdist
            onnx onnxruntime""".split()
print("lacks:", *(name for name in needed if find_spec(name) is None))
PYTHON
    ) || return
    case $said in lacks:*) ;; *) return 1 ;; esac    # other programs may end well, too
    said=${said#lacks:}
    printf '%s\n' "${said# }"
}

# The first Python that fairseq can be installed for: "COMMAND MINOR".
pn_find_python() {
    local name minor
    for name in python3.11 python3.12 python3 python python3.10 python3.9 python3.8; do
        minor=$("$name" -c 'import sys; print(sys.version_info[1] if sys.version_info[0] == 3 else 0)' 2>/dev/null) || continue
        if [ "$minor" -ge 8 ] && [ "$minor" -le 12 ] && "$name" -c "$pn_safe; import venv, ensurepip" 2>/dev/null; then
            printf '%s %s\n' "$name" "$minor"
            return
        fi
    done
    pn_die "no usable Python: 3.11 or 3.12 (else 3.8 to 3.10) with the modules venv and ensurepip must be in PATH," \
        "or give one that has everything with PYTHON=..."
}

# PYTHON=.venv/bin/python, complete. A file beside .venv marks an installation that has not ended: .venv is then made anew.
pn_make_venv() {
    local venv=$PN_ROOT/.venv unfinished=$PN_ROOT/.venv.unfinished found base minor torch stamp
    local -a words
    # One script at a time: another one would take a .venv that is being made for one that was left unfinished.
    exec 9<"$PN_ROOT/setup.py"
    if command -v flock >/dev/null && ! flock -n 9; then
        echo "waiting for another script that is making .venv"
        pn_wait flock 9 || true    # of a file system without locks
    fi
    if [ -e "$unfinished" ]; then
        rm -rf "$venv"
    elif [ -d "$venv" ] && [ ! -f "$venv/installed" ]; then
        pn_die "$venv was not made by these scripts; activate it if it has everything that setup.py asks for, or move it away"
    elif [ -d "$venv" ] && { ! found=$(pn_missing "$venv/bin/python" 2>&1) || [ -n "$found" ]; }; then
        echo ".venv is damaged"
        rm -rf "$venv"
    fi
    if [ -d "$venv" ]; then
        base=$venv/bin/python
        minor=$("$base" -c 'import sys; print(sys.version_info[1])')
    else
        found=$(pn_find_python)
        base=${found% *} minor=${found#* }
    fi
    # The one place where torch is pinned. fairseq 0.12.2 (Python < 3.11) needs an older one, and pip < 24.1.
    case $minor in
        8) torch=torch==2.4.1 ;;
        9 | 10) torch=torch==2.5.1 ;;
        *) torch=torch==2.13.0 ;;
    esac
    torch=${TORCH_SPEC:-$torch}
    stamp=$("$base" -c "$pn_safe; import hashlib
print(sys.argv[2], hashlib.sha256(open(sys.argv[1], 'rb').read()).hexdigest())" "$PN_ROOT/setup.py" "$torch")
    if [ "$(cat "$venv/installed" 2>/dev/null)" != "$stamp" ]; then
        : >"$unfinished"
        if [ ! -d "$venv" ]; then
            echo "making .venv with $base"
            pn_wait "$base" -I -m venv "$venv"
        fi
        echo "installing into .venv (some minutes)"
        if [ "$minor" -lt 11 ]; then
            pn_wait "$venv/bin/python" -I -m pip install --quiet "pip<24.1"
        fi
        read -r -a words <<<"$torch"
        pn_wait "$venv/bin/python" -I -m pip install --quiet "${words[@]}"
        pn_wait "$venv/bin/python" -I -m pip install --quiet -e "$PN_ROOT[data,integrations,plots,slurm,test]"
        printf '%s\n' "$stamp" >"$venv/installed"
        rm "$unfinished"
    fi
    exec 9<&-
    PYTHON=$venv/bin/python
}

pn_environment() {
    local active missing
    if [ -n "${PYTHON:-}" ]; then
        active=$(command -v "$PYTHON") || pn_die "PYTHON=$PYTHON is not an executable"
        PYTHON=$(cd "$(dirname "$active")" && pwd)/$(basename "$active")
        missing=$(pn_missing "$PYTHON") || pn_die "PYTHON=$PYTHON does not run"
        [ -z "$missing" ] || pn_die "PYTHON=$PYTHON lacks: $missing; install with: $PYTHON -m pip install -e '.[data,plots,test]'"
    else
        active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
        if [ -n "$active" ] && [ -x "$active/bin/python" ] && missing=$(pn_missing "$active/bin/python"); then
            if [ -z "$missing" ]; then
                PYTHON=$active/bin/python
            else
                echo "the active environment $active lacks: $missing; using .venv instead"
            fi
        fi
        if [ -z "${PYTHON:-}" ]; then
            pn_make_venv
        fi
    fi
    export PYTHON
    PATH=$(dirname "$PYTHON"):$PATH
    # this checkout's package, installed or not
    PYTHONPATH=$PN_ROOT${PYTHONPATH:+:$PYTHONPATH}
    export PATH PYTHONPATH
}

# How processes behave on a processor, unless the caller has settings of their own; fairseq_powernorm/experiments/tools.py names
# the variables for the log.
pn_processor() {
    # OpenMP's threads wait for each other busily, which costs most of the speed where other processes want the processor, too.
    # So long a wait costs nothing where it is free.
    if [ -z "${GOMP_SPINCOUNT:-}${OMP_WAIT_POLICY:-}" ]; then
        export GOMP_SPINCOUNT=2000
    fi
    # glibc gives large blocks back to the system and asks for new pages in every step, which takes a good part of a step's time.
    # Kept instead, they make a process somewhat larger.
    case ${GLIBC_TUNABLES:-} in *glibc.malloc*) return ;; esac
    if [ -z "${MALLOC_MMAP_MAX_:-}${MALLOC_MMAP_THRESHOLD_:-}${MALLOC_TRIM_THRESHOLD_:-}${MALLOC_TOP_PAD_:-}" ]; then
        export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4294967296
    fi
}

pn_environment
pn_processor
# The C kernel and its autograd function in C++, if their sources or torch have changed or nobody built them; without a compiler
# the log says what serves instead.
pn_wait "$PYTHON" "$PN_ROOT/fairseq_powernorm/kernels/build.py" >/dev/null || true
