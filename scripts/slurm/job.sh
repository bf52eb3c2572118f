# Sourced at the beginning of every job, in the repository's root, $submission being the submission's directory: what was
# submitted, the site's settings, its environment.

. "$submission/submission.sh"    # PN_SITE, PN_DATA_ROOT, PN_RUNS_ROOT and, without a container, PYTHON
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

# arguments_of FILE: this task's line of a file of the submission -> arguments; job: what SLURM calls this task
arguments_of() {
    # SLURM_JOB_ID alone would be the whole array in one of its tasks
    job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    eval "arguments=($(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$submission/$1"))"
}
