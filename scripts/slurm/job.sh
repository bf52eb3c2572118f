# Sourced at the beginning of every job, in the repository's root, $submission being the submission's directory: what was
# submitted, the site's settings, its environment.

. "$submission/submission.sh"    # PN_SITE, PN_BENCHMARK, PN_RECORDS, PN_DATA_ROOT and, without a container, PYTHON
. scripts/slurm/site.example.sh
. "$PN_SITE"
set +u                           # what belongs to the environment may use variables that are not set
pn_setup
set -u

say() {
    printf '== %s %s\n' "$(date '+%Y-%m-%d %H:%M:%S')" "$*"
}

# inside COMMAND...: in the container, if there is one
inside() {
    ${PN_CONTAINER[@]+"${PN_CONTAINER[@]}"} "$@"
}
