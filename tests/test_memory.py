"""A recording of any length: ten times as long does not need twice the memory."""
import json, subprocess, sys
import pytest, torch
from sirem_nb.data.mrd import Scan, read_mrd, write_mrd
from sirem_nb.kspace.density import density
from sirem_nb.kspace.spiral import USC13

SHORT = 50  # rotations of 13 arms: 3.9 s; the long recording is ten times that, 270 MB of samples
RECON = """
import resource, sys
from sirem_nb.cli import main
status = main(sys.argv[1:])
print("peak_kb", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(status)
"""


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    "The same noise over and over: only the length counts here."
    folder, ktraj = tmp_path_factory.mktemp("long"), USC13.ktraj()
    one = torch.view_as_complex(torch.randn(13 * SHORT, 8, 630, 2, generator=torch.Generator().manual_seed(0)))
    dcf, _ = density(ktraj, (84, 84))
    paths = {}
    for times in (1, 10):
        n = len(one) * times
        scan = Scan(one.repeat(times, 1, 1), USC13.play_order(n), ktraj, dcf / dcf.max(), USC13.tr_s, (84, 84), (200., 200.), "movie")
        write_mrd(paths.setdefault(times, folder / f"x{times}_raw.h5"), scan)
    return paths


@pytest.mark.parametrize("method", ["gridding", "wavelet", "temporal-tv", "sirem"])
def test_ten_times_as_long_needs_less_than_twice_the_memory(recordings, method, tmp_path):
    import numpy as np, soundfile
    soundfile.write(tmp_path / "a.wav", 0.1 * np.sin(np.arange(16000 * 45) / 9), 16000)
    peak = {}
    for times, raw in recordings.items():
        argv = ["recon", raw, "--out", tmp_path / str(times), "--method", method, "--audio", tmp_path / "a.wav"]
        argv += ["--iterations", "2"] if method not in ("gridding", "sirem") else []
        r = subprocess.run([sys.executable, "-c", RECON, *map(str, argv)], capture_output=True, text=True)
        assert r.returncode == 0, r.stderr
        assert json.loads((tmp_path / str(times) / "recon.json").read_text())["frames"] == SHORT * times
        peak[times] = int(r.stdout.split("peak_kb")[1])
    assert peak[10] < 2 * peak[1], peak


def test_on_disk_is_the_same_scan(recordings):
    a, b = read_mrd(recordings[1]), read_mrd(recordings[1], on_disk=True)
    assert a.kspace.shape == b.kspace.shape and torch.equal(a.arm, b.arm) and torch.equal(a.ktraj, b.ktraj)
    for index in (5, slice(3, 600, 7), torch.tensor([[640, 1], [1, 2]]), [0, -1]): assert torch.equal(a.kspace[index], b.kspace[index])
    assert b.kspace[torch.zeros(0, 13, dtype=torch.long)].shape == (0, 13, 8, 630)
