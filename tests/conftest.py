"""What several test files share: the repository's root, and the folder of real recordings where there is one."""
from pathlib import Path
import os, pytest

os.environ.setdefault("MPLBACKEND", "Agg")
ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent/"shared"/"data"


@pytest.fixture(scope="session")
def root(): return ROOT


@pytest.fixture(scope="session")
def real_data():
    "The folder of real recordings; the test is skipped, saying so, where it is absent."
    if not REAL.is_dir(): pytest.skip("no real recordings beside the repository (../shared/data)")
    return REAL
