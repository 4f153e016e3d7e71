"""What several test files share: the repository's root, and the folder of real recordings where there is one."""
from pathlib import Path
import os, subprocess, sys, tempfile, pytest

os.environ.setdefault("MPLBACKEND", "Agg")
# Each pytest process compiles numba's functions into a folder of its own: a cache that two processes fill at once is not safe.
numba_cache = tempfile.TemporaryDirectory(prefix="sirem_numba_")
os.environ["NUMBA_CACHE_DIR"] = numba_cache.name
ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent/"shared"/"data"


@pytest.fixture(scope="session")
def root(): return ROOT


@pytest.fixture(scope="session")
def real_data():
    "The folder of real recordings; the test is skipped, saying so, where it is absent."
    if not REAL.is_dir(): pytest.skip("no real recordings beside the repository (../shared/data)")
    return REAL


@pytest.fixture
def two_processes(tmp_path):
    "Trains in two processes (torchrun, which is what accelerate launch uses): both must end with the same weights."
    def run(module, call, timeout=300):   # where what is called stands; an expression that gives the model
        script = tmp_path/"two.py"
        script.write_text(f"""
import os, torch, torch.distributed as dist
from accelerate import PartialState
from {module} import *
torch.set_num_threads(1)
state = PartialState(cpu=True)
model = {call}
total = torch.stack([p.double().sum() for p in model.parameters()]).sum()
both = [torch.zeros_like(total) for _ in range(2)]; dist.all_gather(both, total)
assert dist.get_world_size() == 2 and both[0] == both[1]
if state.is_main_process: print("SAME", flush=True)
dist.barrier()
os._exit(0)      # what was to be shown is shown; gloo's threads now and then abort a process that takes itself apart
""")
        r = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)], capture_output=True, text=True, timeout=timeout)
        assert r.returncode == 0 and "SAME" in r.stdout, r.stderr[-2000:]
    return run
