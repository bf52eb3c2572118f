# Sourced by every script: the root of the repository, errors, and how a command is started.

unset CDPATH    # with which cd would go elsewhere, and print where
PN_ROOT=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.." && pwd)

# what the user called, as the repository has it, and not a link to it: errors begin with it
pn_script=$(readlink -f "$0" || printf '%s' "$0")
pn_script=${pn_script#"$PN_ROOT/"}

pn_die() {
    local what=$*
    printf '%s: error: %s\n' "$pn_script" "${what//[[:cntrl:]]/?}" >&2
    exit 2
}

# A signal while the environment is being looked after: one line, and nothing is left at work. Python sees to it afterwards.
pn_stopped() {
    trap '' INT TERM
    [ -z "$(jobs -p)" ] || kill $(jobs -p) 2>/dev/null
    wait
    printf '%s: error: interrupted\n' "$pn_script" >&2
    exit "$1"
}
trap 'pn_stopped 130' INT
trap 'pn_stopped 143' TERM

# Python code that comes before any other: with it, modules of the caller's directory, which may be somebody else's run, take
# the place of none. Python 3.11 and newer have PYTHONSAFEPATH for that.
pn_safe='import sys; sys.path[:1] = [path for path in sys.path[:1] if path]'

# pn_wait COMMAND [ARGUMENTS]: runs a command that may take long, which a signal ends at once
pn_wait() {
    "$@" &
    wait $!
}

# pn_python COMMAND [ARGUMENTS]: the module fairseq_powernorm.experiments.COMMAND in the project's environment, in place of
# this shell. Its help needs no environment, and makes none.
pn_python() {
    local command=$1 argument help=''
    shift
    for argument in "$@"; do
        case $argument in -h | --help) help=yes ;; esac
    done
    if [ -z "$help" ]; then
        . "$PN_ROOT/scripts/lib/environment.sh"
    else
        [ -n "${PYTHON:-}" ] || PYTHON=$PN_ROOT/.venv/bin/python
        [ -x "$PYTHON" ] || PYTHON=python3
        export PYTHONPATH=$PN_ROOT${PYTHONPATH:+:$PYTHONPATH}
    fi
    export PN_SCRIPT=$pn_script PYTHONSAFEPATH=1
    if "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        exec "$PYTHON" -m "fairseq_powernorm.experiments.$command" "$@"
    fi
    exec "$PYTHON" -c "$pn_safe; import runpy; runpy.run_module(sys.argv.pop(1), None, '__main__', True)" \
        "fairseq_powernorm.experiments.$command" "$@"
}
