"The panels of notebook 93 and the rating page in a real JupyterLab: a slider moves, and the picture changes. `make test-browser`; skipped where there is no chromium."
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
missing = [n for n, there in {"chromium": CHROMIUM, "playwright": importlib.util.find_spec("playwright"), "jupyterlab": importlib.util.find_spec("jupyterlab")}.items() if not there]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"not here: {', '.join(missing)}; see make test-browser")

CELLS = {
    "arms": "from sirem_nb.explore import *\nimport torch\ng = torch.Generator().manual_seed(0)\narms_panel(torch.randn(13, 84, 84, generator=g, dtype=torch.complex64))",
    "vowel": "vowel_panel()",
    "time": "import numpy as np\ntime_panel(np.sin(np.arange(20000)/9), 20000, np.random.default_rng(0).random((12, 40, 40)), np.arange(12)*.08 + .04, np.arange(160) % 13)",
    "map": "r = np.random.default_rng(1)\nmap_panel(r.random((40, 40)), r.random((40, 40)), r.random((40, 40)))",
    "guidance": "from sirem_nb.diffusion.unet3d import SMALL, UNet3D\nfrom dataclasses import replace\ntorch.manual_seed(0)\nm = UNet3D(replace(SMALL, cond_dim=8)).eval()\ng = torch.Generator().manual_seed(1)\nfor p in m.parameters(): p.data += .05*torch.randn(p.shape, generator=g)\nguidance_panel(m, torch.randn(10, 8, generator=g), torch.rand(64, 64, generator=g))",
    "rating": "from sirem_nb.evaluate.rating import *\npage(Study(plan(find_clips('real', 'made')), 'answers.csv', 'A'))",
}


def notebook(folder):
    import imageio.v3 as iio
    import numpy as np
    for kind in ("real", "made"):
        (folder/kind).mkdir()
        for i in range(3): iio.imwrite(folder/kind/f"bite_{i}.png", np.full((20, 20), 40*i, np.uint8))
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in CELLS.values()], metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
    nbformat.write(nb, folder/"panels.ipynb")


@pytest.fixture(scope="module")
def lab(tmp_path_factory, root):
    "A JupyterLab on localhost, and its address."
    home = tmp_path_factory.mktemp("lab"); work = home/"work"; work.mkdir()
    notebook(work)
    env = {**os.environ, "JUPYTER_RUNTIME_DIR": str(home/"runtime"), "JUPYTER_CONFIG_DIR": str(home/"config"), "JUPYTER_DATA_DIR": str(home/"data"), "HOME": str(home), "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1,localhost"}
    log = open(home/"log", "w")
    p = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0", f"--ServerApp.root_dir={work}", "--IdentityProvider.token=secret", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.news_url="],
                         cwd=work, env=env, stdout=log, stderr=log)
    try:
        for _ in range(600):
            found = list((home/"runtime").glob("jpserver-*.json"))
            if found or p.poll() is not None: break
            time.sleep(.2)
        assert found and p.poll() is None, Path(home/"log").read_text()[-2000:]
        time.sleep(1)
        yield json.loads(found[0].read_text())["url"], work
    finally:
        p.terminate()
        try: p.wait(20)
        except subprocess.TimeoutExpired: p.kill()


@pytest.fixture(scope="module")
def tab(lab):
    "The notebook, open, with all its cells run."
    from playwright.sync_api import sync_playwright
    url, _ = lab
    with sync_playwright() as p:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-proxy-server"]
        browser = p.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_page(viewport={"width": 1300, "height": 2600})
        page.set_default_timeout(120_000)
        page.goto(f"{url}lab/tree/panels.ipynb?token=secret&reset")
        page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        page.wait_for_selector(".jp-NotebookPanel-toolbar")
        page.wait_for_timeout(3000)
        page.locator(".jp-Notebook .jp-CodeCell .cm-content").first.click()
        for _ in CELLS: page.keyboard.press("Shift+Enter"); page.wait_for_timeout(300)
        page.wait_for_function(f"document.querySelectorAll('.jp-OutputArea-output img.widget-image').length >= {len(CELLS)}")
        yield page
        browser.close()


def cell(tab, name): return tab.locator(".jp-CodeCell").nth(list(CELLS).index(name))


def changes(tab, name, act):
    "Does the cell's picture change when something is done to its handles?"
    c = cell(tab, name); c.scroll_into_view_if_needed()
    picture = c.locator("img.widget-image").first
    before = picture.get_attribute("src")
    act(c)
    for _ in range(150):
        tab.wait_for_timeout(200)
        if picture.get_attribute("src") != before: return True
    return False


def push(c, n=0):
    "Move the n-th slider three steps to the right."
    handle = c.locator(".noUi-handle").nth(n)
    handle.focus()
    for _ in range(3): handle.press("ArrowRight")


def test_unticking_an_arm_changes_the_picture(tab): assert changes(tab, "arms", lambda c: c.locator("input[type=checkbox]").nth(3).click())


@pytest.mark.parametrize("name", ["vowel", "time", "map", "guidance"])
def test_a_slider_changes_the_picture(tab, name): assert changes(tab, name, push)


def test_nothing_changes_by_itself(tab):
    picture, seen = cell(tab, "map").locator("img.widget-image").first, None
    for _ in range(60):                                   # what was moved before has arrived
        if seen == (seen := picture.get_attribute("src")): break
        tab.wait_for_timeout(3000)
    tab.wait_for_timeout(3000)
    assert picture.get_attribute("src") == seen


def test_the_vowel_is_heard(tab):
    c = cell(tab, "vowel"); c.scroll_into_view_if_needed()
    before = c.locator("audio").get_attribute("src")
    c.get_by_role("button", name="say it").click()
    for _ in range(300):
        tab.wait_for_timeout(200)
        if c.locator("audio").get_attribute("src") != before: break
    assert c.locator("audio").get_attribute("src") != before


def test_the_rating_page_writes_answers(tab, lab):
    c = cell(tab, "rating"); c.scroll_into_view_if_needed()
    c.get_by_role("button", name="real", exact=True).click()
    tab.wait_for_timeout(500)
    c.get_by_role("button", name="synthesised").click()
    c.get_by_role("button", name="3", exact=True).click()
    for _ in range(100):
        tab.wait_for_timeout(200)
        if (lab[1]/"answers.csv").exists() and len((lab[1]/"answers.csv").read_text().splitlines()) == 3: break
    rows = (lab[1]/"answers.csv").read_text().splitlines()
    assert len(rows) == 3 and rows[1].split(",")[6] == "1" and rows[2].split(",")[6:8] == ["0", "3"]
