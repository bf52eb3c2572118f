# What scripts/slurm/submit.sh has to know of a cluster. Copy to scripts/slurm/site.sh (git ignores it) and fill in, or name
# another file by submit.sh --site FILE or $PN_SLURM_SITE. Nothing else in the repository depends on the cluster.

PN_ACCOUNT=                 # sbatch --account; empty: the cluster's default, here and below
PN_PARTITION=               # sbatch --partition
PN_TIME=24:00:00            # time limit of one job; a run that needs longer is requeued and goes on
PN_CPUS_PER_TASK=4          # processors of a rank
PN_GRES=gpu                 # GPUs as the cluster calls them (gpu, gpu:a100); empty: none, with common.cpu=true
PN_SBATCH=()                # any other options of sbatch, such as (--qos=long --mem-per-cpu=8G --constraint=ib)
PN_WARNING=120              # seconds before the time limit in which a job stops and requeues itself
PN_CONTAINER=()             # words before each rank's command, such as (apptainer exec --nv --bind /data image.sif)

# Runs at the beginning of each job and is to make a Python with everything available: modules, an environment. Without it
# jobs use the Python of submit.sh; with PN_CONTAINER, export PYTHON as the container has it.
pn_setup() {
    :   # module load python/3.11 cuda; . ~/venvs/powernorm/bin/activate
}
