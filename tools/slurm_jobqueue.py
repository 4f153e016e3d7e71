"""Many recordings on a cluster with SLURM, one job of the queue a worker: more of them when there is work, fewer when there is not.

    pip install dask-jobqueue
    python tools/slurm_jobqueue.py --most 200 --queue short -- recon DATA --out OUT --method temporal-tv
    python tools/slurm_jobqueue.py --show           # what would be submitted

All nodes must see DATA, OUT and this environment under the same paths. Run it where it may run for long (a login node in tmux, or an interactive job).
"""
import argparse

from dask_jobqueue import SLURMCluster

from sirem_nb.cli import main


def options():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--most", type=int, default=50, help="workers at a time")
    p.add_argument("--queue", help="SLURM's partition")
    p.add_argument("--account")
    p.add_argument("--memory", default="6GB", help="of each worker")
    p.add_argument("--time", default="04:00:00", help="of each worker; a recording that is cut off is done again by another one")
    p.add_argument("--show", action="store_true", help="print the job script and stop")
    p.add_argument("command", nargs="*", help="a command of sirem, after --")
    return p.parse_args()


if __name__ == "__main__":
    o = options()
    # dask-jobqueue asks workers to leave in good order before their time is over
    cluster = SLURMCluster(cores=1, processes=1, memory=o.memory, walltime=o.time, queue=o.queue, account=o.account, job_script_prologue=["export OMP_NUM_THREADS=1"], scheduler_options={"dashboard_address": ":0"})
    if o.show: print(cluster.job_script()); raise SystemExit
    cluster.adapt(minimum=0, maximum=o.most)
    raise SystemExit(main([*o.command, "--scheduler", cluster.scheduler_address]))
