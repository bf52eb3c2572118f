# Sourced by every check: what the scripts share, and a help text.
. "$(dirname "${BASH_SOURCE[0]}")/../../scripts/lib/common.sh"

# check_help SCRIPT "$@": print the comment at the head of a check, its help text, and leave if it is asked for.
check_help() {
    local script=$1 argument
    shift
    for argument in "$@"; do
        case $argument in
            -h | --help)
                sed -n '2,/^[^#]/ { /^#/ s/^# \{0,1\}//p; }' "$script"
                exit 0
                ;;
        esac
    done
}
