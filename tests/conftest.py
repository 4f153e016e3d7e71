"""What several test files share: the repository's root, and the folder of real recordings where there is one."""
from pathlib import Path
import os, tempfile, pytest

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
