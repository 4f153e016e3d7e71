"Many recordings: dealt out, killed in the middle, stopped and started, on a cluster that is none; splits with a name."
import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import soundfile
import torch

from sirem_nb.cli import main
from sirem_nb.data.mrd import Scan, read_recon, write_mrd
from sirem_nb.dataset import SPLITS, named_split, raw_files, split_lists
from sirem_nb.kspace.spiral import USC13
from sirem_nb.learning.cluster import deal

BIN, ROOT = Path(sys.executable).parent, Path(__file__).resolve().parents[1]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
needs_dask = pytest.mark.skipif(not (BIN/"dask").exists(), reason="dask is not installed: pip install 'sirem-nb[cluster]'")


def recordings(root, n=6, n_acq=78, sound=True):
    for k in range(n):
        g, home, name = torch.Generator().manual_seed(k), root/f"sub{k + 1:03d}"/"2drt", f"sub{k + 1:03d}_2drt_12_picture1"
        write_mrd(home/"raw"/f"{name}_raw.h5", Scan(torch.randn(n_acq, 2, 630, dtype=torch.complex64, generator=g), USC13.play_order(n_acq), USC13.ktraj(), None, USC13.tr_s, (84, 84), (200., 200.), "movie"))
        if not sound: continue
        (home/"audio").mkdir(); soundfile.write(home/"audio"/f"{name}_audio.wav", .1*torch.randn(round(n_acq*USC13.tr_s*20000), generator=g).numpy(), 20000)
    return root


def typed(*argv):
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err): status = main([str(a) for a in argv])
    return status, out.getvalue(), "".join(l + "\n" for l in err.getvalue().splitlines() if "%|" not in l)


@pytest.fixture(scope="module")
def data(tmp_path_factory): return recordings(tmp_path_factory.mktemp("many")/"data")


@pytest.fixture(scope="module")
def alone(data):
    "Six recordings by one process: what everything else is compared with."
    status, out, err = typed("recon", data, "--out", data.parent/"alone", *TV)
    assert status == 0, err
    return data.parent/"alone"


TV = ("--method", "temporal-tv", "--lam", "0.01", "--iterations", "15", "--arms-per-frame", "2")


def frames(folder): return {p.parent.name: read_recon(p)[0] for p in sorted(Path(folder).glob("*/recon.h5"))}


def same(a, b): return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], rtol=1e-4, atol=1e-6*float(a[k].max())) for k in a)


# Dealing

def test_one_failure_does_not_stop_the_others():
    def f(j):
        if j == 2: raise ValueError("two")
        return 10*j
    got = [r for _, r in deal(f, [1, 2, 3])]
    assert got[0] == 10 and got[2] == 30 and isinstance(got[1], ValueError)


def test_a_damaged_recording_is_named_and_the_others_are_done(tmp_path):
    root = recordings(tmp_path/"d", 3, 26)
    bad = root/"sub002/2drt/raw/sub002_2drt_12_picture1_raw.h5"; whole = bad.read_bytes(); bad.write_bytes(whole[:5000])
    status, out, err = typed("recon", root, "--out", tmp_path/"o")
    assert status == 2 and "sub002_2drt_12_picture1" in err and "1 of 3 recordings failed" in err.splitlines()[-1]
    assert sorted(frames(tmp_path/"o")) == ["sub001_2drt_12_picture1", "sub003_2drt_12_picture1"]
    bad.write_bytes(whole); before = {p: p.stat().st_mtime_ns for p in (tmp_path/"o").rglob("*.*") if p.is_file()}
    status, out, err = typed("recon", root, "--out", tmp_path/"o")
    assert status == 0 and "2 of 3 recordings were done already" in out and out.count("recon.json") == 1
    assert all(p.stat().st_mtime_ns == t for p, t in before.items()) and len(frames(tmp_path/"o")) == 3
    status, out, err = typed("recon", root, "--out", tmp_path/"o", "--arms-per-frame", "2")
    assert status == 2 and "was made with arms_per_frame = None, now it is 2" in err and frames(tmp_path/"o")["sub001_2drt_12_picture1"].shape[0] == 2


def test_a_list_of_files_and_several_methods(data, tmp_path):
    raws = sorted(data.glob("*/2drt/raw/*.h5"))[:2]
    (tmp_path/"list.txt").write_text(f"{raws[0]}\n\n{os.path.relpath(raws[1], tmp_path)}\n")
    assert list(raw_files(tmp_path/"list.txt")) == [r.stem.removesuffix("_raw") for r in raws]
    assert typed("recon", tmp_path/"list.txt", "--out", tmp_path/"o", "--method", "gridding,cg-sense", "--iterations", "2")[0] == 2         # gridding has no iterations
    status, out, err = typed("recon", tmp_path/"list.txt", "--out", tmp_path/"p", "--method", "gridding,cg-sense")
    assert status == 0 and sorted(str(p.relative_to(tmp_path/"p").parent) for p in (tmp_path/"p").rglob("recon.json")) == [f"{r.stem.removesuffix('_raw')}/{m}" for r in raws for m in ("cg-sense", "gridding")]
    (tmp_path/"twice.txt").write_text(f"{raws[0]}\n{raws[0]}\n")
    assert typed("recon", tmp_path/"twice.txt", "--out", tmp_path/"q")[0] == 2 and typed("recon", data, "--out", tmp_path/"q", "--audio", "x.wav")[0] == 2


@needs_dask
def test_two_workers_one_is_killed_in_the_middle(data, alone, tmp_path):
    "SIGKILL to a worker that has a raw file open: everything still comes out, once."
    psutil = pytest.importorskip("psutil")
    p = subprocess.Popen([BIN/"sirem", "recon", str(data), "--out", str(tmp_path/"o"), "--workers", "2", *TV], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV)
    def busy():
        for c in psutil.Process(p.pid).children(recursive=True):
            try:
                if any(f.path.endswith("_raw.h5") for f in c.open_files()): return c
            except psutil.Error: pass
    limit, victim = time.time() + 200, None
    while p.poll() is None and time.time() < limit:
        if list((tmp_path/"o").glob("*/recon.json")) and (victim := busy()): break
        time.sleep(.005)
    assert victim is not None, "no worker was caught with a raw file open: " + p.communicate()[1][-1000:]
    os.kill(victim.pid, signal.SIGKILL)
    ready = {f: f.stat().st_mtime_ns for f in (tmp_path/"o").glob("*/recon.json")}
    assert 0 < len(ready) < 6, "killed too late to show anything"
    out, err = p.communicate(timeout=300)
    assert p.returncode == 0, err[-2000:]
    assert same(frames(tmp_path/"o"), frames(alone)) and len(frames(alone)) == 6
    assert all(f.stat().st_mtime_ns == t for f, t in ready.items()), "a finished recording was written again"
    assert sorted(f.name for f in (tmp_path/"o").rglob("*") if f.is_file()) == sorted(["recon.h5", "recon.json", "video.mp4"]*6), "something was left behind"
    assert out.count("recon.json") + 1 >= 6 and max(out.count(f"{n}/recon.json") for n in frames(alone)) == 1


@needs_dask
def test_features_by_a_scheduler_are_what_training_computes(data, tmp_path):
    from dask.distributed import LocalCluster
    from sirem_nb.fusion.train import prepare
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster:
        status, out, err = typed("features", data, "--cache", tmp_path/"dealt", "--scheduler", cluster.scheduler_address)
    assert status == 0 and len(out.splitlines()) == 6, err
    files = {f.name: f.stat().st_mtime_ns for f in (tmp_path/"dealt").iterdir()}
    dealt, here = prepare(data, cache=tmp_path/"dealt", target="gridding"), prepare(data, cache=tmp_path/"here", target="gridding")
    assert files == {f.name: f.stat().st_mtime_ns for f in (tmp_path/"dealt").iterdir()}, "training computed something again"
    assert all(torch.allclose(a.features, b.features, atol=1e-4) for a, b in zip(dealt, here)) and files.keys() == {f.name for f in (tmp_path/"here").iterdir()}


# SLURM that is none

def pretend(folder, name, text):
    folder.mkdir(exist_ok=True); (folder/name).write_text("#!/bin/bash\n" + text); (folder/name).chmod(0o755)
    return {**ENV, "PATH": f"{folder}{os.pathsep}{ENV['PATH']}"}


@needs_dask
def test_slurm_script_with_an_srun_that_runs_what_it_is_given(data, alone, tmp_path):
    env = pretend(tmp_path/"bin", "srun", 'n="${1#--ntasks=}"; shift; for i in $(seq "$n"); do "$@" & done; wait\n') | {"SLURM_NTASKS": "3", "SLURM_JOB_ID": "7"}
    r = subprocess.run(["bash", ROOT/"tools"/"slurm.sh", "recon", str(data), "--out", str(tmp_path/"o"), *TV], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert r.returncode == 0, r.stderr[-2000:]
    assert same(frames(tmp_path/"o"), frames(alone)) and not list(tmp_path.glob(".sirem-scheduler*"))


def test_slurm_script_is_well_formed():
    subprocess.run(["bash", "-n", ROOT/"tools"/"slurm.sh"], check=True)
    asked = dict(l.removeprefix("#SBATCH --").split("=", 1) for l in (ROOT/"tools"/"slurm.sh").read_text().splitlines() if l.startswith("#SBATCH"))
    assert {"ntasks", "cpus-per-task", "mem-per-cpu", "time"} <= asked.keys() and int(asked["ntasks"]) > 1


def test_jobqueue_with_an_sbatch_that_runs_what_it_is_given(tmp_path):
    pytest.importorskip("dask_jobqueue", reason="dask-jobqueue is not installed")
    tool = [sys.executable, str(ROOT/"tools"/"slurm_jobqueue.py")]
    r = subprocess.run([*tool, "--show", "--queue", "short", "--memory", "5GB"], env=ENV, capture_output=True, text=True, timeout=120)
    assert r.returncode == 0 and "#SBATCH -p short" in r.stdout and "#SBATCH --mem=5G" in r.stdout and "distributed.cli.dask_worker" in r.stdout and "OMP_NUM_THREADS=1" in r.stdout, r.stdout + r.stderr
    root = recordings(tmp_path/"d", 2, 26)
    env = pretend(tmp_path/"bin", "sbatch", 'nohup bash "$1" >/dev/null 2>&1 & echo "Submitted batch job $!"\n')
    pretend(tmp_path/"bin", "scancel", 'kill "$@" 2>/dev/null; exit 0\n')
    r = subprocess.run([*tool, "--most", "2", "--", "recon", str(root), "--out", str(tmp_path/"o")], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert r.returncode == 0 and len(frames(tmp_path/"o")) == 2, r.stderr[-2000:]


# Splits with a name

def test_the_named_splits_are_what_they_say():
    a, b = split_lists("sirem-10-2-4"), split_lists("speech2rtmri-60-15")
    assert [len(a[k]) for k in ("train", "val", "test")] == [10, 2, 4] and len(set(sum(a.values(), []))) == 16
    who = {k: {n[:6] for n in v} for k, v in b.items()}
    assert len(who["train"]) == 60 and len(who["unseen_subject"]) == 15 and who["both"] == who["unseen_subject"] and who["unseen_speech"] == who["train"]
    assert len(b["unseen_speech"]) == 240 and len(set(sum(b.values(), []))) == sum(map(len, b.values()))
    assert b == split_lists("speech2rtmri-60-15") and sorted(SPLITS) == ["sirem-10-2-4", "speech2rtmri-60-15"]


def test_a_split_by_name_keeps_what_is_there(capsys):
    assert named_split("sirem-10-2-4", "fusion", lambda: ["sub013", "sub022", "sub999"]) == {"train": ["sub013"], "val": [], "test": ["sub022"]}
    assert "2 of 16 are in the data" in capsys.readouterr().err
    assert named_split({"train": []}, "fusion", list) == {"train": []} and named_split(None, "x", list) is None and named_split(Path("a.json"), "x", list) == Path("a.json")
    for split, kind, says in (("sirem-10-2-4", "diffusion", "is for sirem train fusion"), ("sirem", "fusion", "no split named"), ("sirem-10-2-4", "fusion", "hold nothing")):
        with pytest.raises(ValueError, match=says): named_split(split, kind, lambda: ["subX"])


def test_splits_by_command(tmp_path):
    status, out, _ = typed("splits"); assert status == 0 and all(n in out for n in SPLITS)
    assert json.loads(typed("splits", "sirem-10-2-4")[1]) == split_lists("sirem-10-2-4")
    assert typed("splits", "sirem-10-2-4", "--out", tmp_path/"s.json")[0] == 0 and json.loads((tmp_path/"s.json").read_text()) == split_lists("sirem-10-2-4")
    assert typed("splits", "nothing")[0] == 2


# Two processes train as one does

WAYS = {"fusion": ("from sirem_nb.fusion.train import train_fusion as train",
                   "train({data!r}, {out!r}, 5, dict(train=['sub001'], val=['sub002'], test=['sub003']), cache={cache!r}, hidden=(16, 16), delta_s=.1, epochs=2, lr=2e-3, dropout=0., per_epoch=16, constant=False, oracle=False, lsq=False, batch_size=4*{pairs})"),
        # the noise of a step is drawn for a whole batch: the one process is given the same batches, two at a time
        "diffusion": ("""
from sirem_nb.diffusion import train as T
class Pairs(T.TaskLoader):
    def __len__(self): return super().__len__()//2
    def __iter__(self):
        batches = super().__iter__()
        for a in batches: b = next(batches); yield {{k: torch.cat([a[k], b[k]]) for k in a}}
if {pairs} == 2: T.TaskLoader = Pairs
""", "T.train_diffusion(T.toy_talks(), {out!r}, cache={cache!r}, epochs=2, per_epoch=24, val_every=2, warmup=2, mixed=False, context=(1,), lr=1e-3, batch_size=3)")}
SCRIPT = """
import torch
{setup}
from sirem_nb.cli import leave, meet
torch.set_num_threads(1)
meet("cpu")
{call}
leave()
"""


@pytest.mark.parametrize("model", WAYS)
def test_accelerate_launch_of_two_processes_is_one_with_twice_the_batch(model, tmp_path):
    "Of the translators the same is shown in test_translate_train.py, through the command."
    from safetensors.torch import load_file
    if model == "fusion":
        from sirem_nb.fusion.train import toy_corpus
        toy_corpus(tmp_path/"data", n_subjects=3, n_words=1, n_frames=16)
    setup, call = WAYS[model]
    launch = [BIN/"accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    for out, start, size in (("two", launch, 1), ("one", [sys.executable], 2)):
        (tmp_path/f"{out}.py").write_text(SCRIPT.format(setup=setup.format(pairs=size), call=call.format(data=str(tmp_path/"data"), out=str(tmp_path/out), cache=str(tmp_path/"cache"), pairs=size)))
        r = subprocess.run([*start, tmp_path/f"{out}.py"], env=ENV | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=300)
        assert r.returncode == 0, r.stderr[-2000:]
    a, b = (load_file(tmp_path/k/"last.safetensors") for k in ("one", "two"))
    loss = [[h["loss"] for h in json.loads((tmp_path/k/"curves.json").read_text())["history"]] for k in ("one", "two")]
    assert a.keys() == b.keys() and loss[0] == pytest.approx(loss[1], rel=1e-3) and loss[0][1] != loss[0][0]
    assert all(torch.allclose(a[k].float(), b[k].float(), rtol=1e-3, atol=2e-5) for k in a if k.startswith("model/"))
