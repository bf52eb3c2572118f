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

# pn_python MODULE [ARGUMENTS]: scripts/lib/MODULE.py in the project's environment, in place of this shell.
pn_python() {
    local module=$1
    shift
    . "$PN_ROOT/scripts/lib/environment.sh"
    exec "$PYTHON" "$PN_ROOT/scripts/lib/$module.py" "$@"
}
