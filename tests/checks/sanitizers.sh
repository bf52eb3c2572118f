#!/usr/bin/env bash
# Builds the C kernel with the compiler's sanitizers and runs it over odd shapes, element types, masks and instruction sets,
# first for memory errors and undefined behaviour (address, undefined), then for data races between its threads (thread).
#
#   tests/checks/sanitizers.sh
#
# The compiler is CC, else cc. Everything is written to a temporary directory, which is removed.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/help.sh"
check_help "${BASH_SOURCE[0]}" "$@"
[ $# -eq 0 ] || pn_die "tests/checks/sanitizers.sh takes no argument, got: $*"
compiler=${CC:-cc}
command -v "${compiler%% *}" >/dev/null || pn_die "no C compiler: ${compiler%% *} is not in PATH"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for kind in address,undefined thread; do
    # shellcheck disable=SC2086
    $compiler -std=gnu11 -O1 -g -fno-math-errno -fno-sanitize-recover=all -fsanitize="$kind" -Wall -Wextra -Werror -Wno-psabi \
        "$PN_ROOT/tests/checks/sanitize_kernel.c" -o "$work/check" -lm -lpthread ||
        pn_die "the compiler $compiler cannot build with -fsanitize=$kind"
    echo "-fsanitize=$kind"
    "$work/check" || pn_die "-fsanitize=$kind found a fault"
done
