"""The benchmark runs, compares like with like and invents nothing. (Quick: toy size, no repetition; the times mean nothing.)"""
import json

import pytest
import torch

from sirem_nb import bench
from sirem_nb.kspace import peers

QUICK = ("gridding", "cg30", "wavelet_converged", "sirem")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Without sigpy and BART, as on a machine that has neither; the processes are real."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as m:
        m.setitem(peers.PEERS, "sigpy", ("no_such_module", "pip install sigpy"))
        m.setattr(peers.shutil, "which", lambda name: None)
        bench.run_bench(folder, tasks=QUICK, threads=1, quick=True)
    return folder


@pytest.fixture(scope="module")
def records(out):
    return json.loads((out / "bench.json").read_text())


def test_every_task_has_ours_with_time_and_quality(records):
    for task in QUICK:
        mine = {r["metric"]: r for r in records if r["task"] == task and r["method"] == "sirem-nb"}
        assert mine["ms_per_frame"]["value"] > 0 and mine["ms_per_frame"]["unit"] == "ms"
        wanted = {"gridding": "rel_error", "cg30": "objective", "wavelet_converged": "gap"}.get(task)
        assert wanted is None or wanted in mine
    error = next(r["value"] for r in records if r["metric"] == "rel_error" and r["method"] == "sirem-nb")
    assert error < 1e-3
    assert all(r["value"] < 1e-3 for r in records if r["metric"] == "gap")


def test_records_are_flat_with_one_number_each(records):
    for r in records:
        assert r["table"] == "bench" and isinstance(r["value"], float) and not any(isinstance(v, (list, dict)) for v in r.values())
        assert {"task", "method", "metric", "n", "unit", "device", "threads"} <= set(r)


def test_absent_peers_are_named_and_have_no_record(out, records):
    meta = json.loads((out / "bench.meta.json").read_text())
    assert set(meta["not_installed"]) == {"sigpy", "bart"} and not meta["failed"] and meta["complete"]
    assert not [r for r in records if r["method"] in ("sigpy", "bart")]
    assert "Not installed: " in (out / "bench.md").read_text()
    if not torch.cuda.is_available():
        assert "not run" in meta["gpu"] and all(r["device"] == "cpu" for r in records)


def test_ratios_compare_like_with_like():
    time = lambda method, value, **more: {"table": "bench", "task": "t", "method": method, "metric": "ms_per_frame", "value": value, "std": 0.0, "n": 3, "unit": "ms", "device": "cpu", **more}
    records = bench.with_ratios([time("sirem-nb", 2.0, regulariser="a"), time("sirem-nb", 8.0, regulariser="b"), time("x", 10.0, regulariser="a"),
                                 time("y", 10.0, regulariser="b"), time("z", 10.0, regulariser="c")])
    ratios = {r["method"]: r["value"] for r in records if r["metric"] == "ratio_to_sirem-nb"}
    assert ratios == {"x": 5.0, "y": 1.25}                             # z has nothing of ours to be compared with


def test_rounds_are_merged():
    one = {"table": "bench", "task": "t", "method": "m", "metric": "ms_per_frame", "device": "cpu", "n": 3}
    merged = bench.merge_rounds([one | {"value": 1.0}, one | {"value": 3.0}, one | {"value": 5.0, "method": "other"}])
    assert [(r["method"], r["value"], r["n"]) for r in merged] == [("m", 2.0, 6), ("other", 5.0, 3)]


def test_a_job_that_fails_is_reported(tmp_path):
    meta = {"not_installed": {}, "failed": {}}
    job = {"task": "gridding", "method": "sirem-nb", "threads": 1, "device": "cpu", "cuda": False}
    assert bench._do_all(tmp_path, [job], meta, 60) == []              # no data there
    assert "frames.npz" in next(iter(meta["failed"].values()))


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="no task griding"):
        bench.run_bench(tmp_path, tasks=("griding",))
    with pytest.raises(ValueError, match="expected cpu, cuda or auto"):
        bench.run_bench(tmp_path, device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device"):
            bench.run_bench(tmp_path, device="cuda")
    assert not list(tmp_path.iterdir())


def test_a_whole_run_is_kept_and_a_quick_one_is_not(out, tmp_path):
    history = tmp_path / "history.jsonl"
    with pytest.raises(ValueError, match="quick"): bench.keep(out, history)
    assert not history.exists()
    records, meta = json.loads((out / "bench.json").read_text()), json.loads((out / "bench.meta.json").read_text())
    records.append({"task": "cg30", "method": "x", "regulariser": "l2", "device": "cpu", "metric": "ratio_to_sirem-nb", "value": 3.0})
    (tmp_path / "bench.json").write_text(json.dumps(records)); (tmp_path / "bench.meta.json").write_text(json.dumps(meta | {"quick": False}))
    for note in ("first", "second"): bench.keep(tmp_path, history, note)
    runs = bench.read_history(history)
    assert [r["note"] for r in runs] == ["first", "second"] and runs[0]["ratio"]["cg30, x, l2"] == 3.0 and runs[0]["ms_per_frame"]["gridding, sirem-nb"] > 0
    assert "| cg30, x, l2 | 3 | 3 |" in bench.history_md(runs)


def test_the_stored_history_is_of_whole_runs(root):
    for r in bench.read_history(root/"results"/"bench_history.jsonl"):
        assert r["date"] and r["threads"] and r["ratio"] and all(v > 0 for v in r["ratio"].values())
