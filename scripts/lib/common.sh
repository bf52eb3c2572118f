# Sourced by every script: the root of the repository, its help text, its errors.

PN_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

# The help text of a script is the comment at its head.
pn_usage() {
    sed -n '2,/^[^#]/ { /^#/ s/^# \{0,1\}//p; }' "$1"
}

pn_die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# pn_help SCRIPT "$@": print the help text and leave if it is asked for.
pn_help() {
    local script=$1 argument
    shift
    for argument in "$@"; do
        case $argument in
            -h | --help)
                pn_usage "$script"
                exit 0
                ;;
        esac
    done
}

# pn_python COMMAND [ARGUMENTS]: a command of fairseq_powernorm.experiments in the project's environment, in place of this
# shell. Python 3.11 and newer do not look for modules in the caller's directory.
pn_python() {
    . "$PN_ROOT/scripts/lib/environment.sh"
    PYTHONSAFEPATH=1 exec "$PYTHON" -m fairseq_powernorm.experiments "$@"
}
