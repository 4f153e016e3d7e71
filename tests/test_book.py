"""The book itself: notebooks and package in step, notebooks clean and of readable size, the wheel whole."""
import ast, filecmp, json, re, shutil, subprocess, sys, zipfile
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
NOTEBOOKS = sorted(p for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
CHAPTERS = ["kspace", "data", "speaker", "evaluate", "learning", "fusion", "translate", "diffusion"]
EXTRAS = ["finufft", "pytorch_finufft", "pesq", "pystoi", "torchmetrics", "onnxruntime", "dask", "distributed", "ipywidgets",
          "jupyterlab", "nbdev", "fastcore", "execnb", "sigpy", "torchvision", "torchaudio", "IPython"]


def cells(p): return json.loads(p.read_text())["cells"]
def source(c): return "".join(c["source"])
def flags(c): return set(re.findall(r"^#\|\s*(\w+)", source(c), re.M))
def name(p): return str(p.relative_to(ROOT/"nbs"))


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    "A copy of what nbdev reads and writes, exported and cleaned again."
    d = tmp_path_factory.mktemp("fresh")
    for f in ("settings.ini", "pyproject.toml", "_quarto.yml", "README.md"): shutil.copy(ROOT/f, d/f)
    shutil.copytree(ROOT/"nbs", d/"nbs", symlinks=True, ignore=shutil.ignore_patterns(".ipynb_checkpoints", "*.tmp"))
    shutil.copytree(ROOT/"sirem_nb", d/"sirem_nb", ignore=shutil.ignore_patterns("__pycache__"))
    for cmd in ("nbdev_export", "nbdev_clean"):
        r = subprocess.run([BIN/cmd], cwd=d, capture_output=True, text=True)
        assert r.returncode == 0, r.stderr
    return d


def test_package_is_what_the_notebooks_export(fresh):
    old = {p.relative_to(ROOT): p for p in (ROOT/"sirem_nb").rglob("*.py")}
    new = {p.relative_to(fresh): p for p in (fresh/"sirem_nb").rglob("*.py")}
    assert old.keys() == new.keys()
    differ = [str(k) for k in old if not filecmp.cmp(old[k], new[k], shallow=False)]
    assert not differ, f"run nbdev_export: {differ}"


def test_every_module_has_its_notebook():
    exported = {re.search(r"#\| default_exp (\S+)", "\n".join(map(source, cells(p)))) for p in NOTEBOOKS}
    exported = {m.group(1) for m in exported if m}
    have = {".".join(p.relative_to(ROOT/"sirem_nb").with_suffix("").parts) for p in (ROOT/"sirem_nb").rglob("*.py")
            if p.name not in ("__init__.py", "_modidx.py")}
    assert have == exported


@pytest.mark.parametrize("p", NOTEBOOKS, ids=name)
def test_notebook_is_clean(p, fresh):
    assert p.read_text() == (fresh/p.relative_to(ROOT)).read_text(), "run nbdev_clean"


@pytest.mark.parametrize("p", NOTEBOOKS, ids=name)
def test_notebook_is_of_readable_size(p):
    cs = cells(p)
    assert len(cs) <= 60
    assert p.stat().st_size < 1e6
    long = [source(c).splitlines()[0] for c in cs if c["cell_type"] == "code" and len(source(c).splitlines()) > 25]
    assert not long, f"cells over 25 lines: {long}"
    assert source(cs[0]).startswith("# "), "a notebook begins with its title"
    prose = sum(c["cell_type"] == "markdown" for c in cs)
    assert prose*4 >= len(cs), f"only {prose} of {len(cs)} cells are prose"


@pytest.mark.parametrize("p", NOTEBOOKS, ids=name)
def test_notebook_is_stored_executed(p):
    "What prints or draws has its output stored; no error is; no picture of real data is."
    for c in cells(p):
        if c["cell_type"] != "code": continue
        kinds = {k for o in c["outputs"] for k in o.get("data", {})} | {o["output_type"] for o in c["outputs"]}
        assert "error" not in kinds
        if "data" in flags(c): assert not any(k.startswith("image/") for k in kinds), "a picture of real data may not be stored"
        elif not {"gpu", "export", "exports"} & flags(c) and re.search(r"^(print|plt\.show)\(", source(c), re.M):
            assert kinds, f"not executed: {source(c)[:60]}"


def test_numbers_are_unique():
    numbers = [p.stem.split("_")[0] for p in NOTEBOOKS if p.stem[0].isdigit()]
    assert len(numbers) == len(set(numbers))


def test_sidebar_has_every_notebook_once_and_in_order():
    listed = re.findall(r"href: (\S+\.ipynb)", (ROOT/"_quarto.yml").read_text().split("navbar:")[0])
    assert listed == ["index.ipynb"] + [name(p) for p in NOTEBOOKS if p.stem != "index"]


def test_links_inside_the_book_lead_somewhere():
    lost = []
    for p in NOTEBOOKS:
        for c in cells(p):
            if c["cell_type"] != "markdown": continue
            for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", source(c)):
                if not re.match(r"[a-z]+:", target) and not (p.parent/target).exists(): lost.append(f"{name(p)}: {target}")
    assert not lost, lost


def test_readme_is_the_index():
    sys.path.insert(0, str(ROOT/"tools"))
    from pages import readme
    assert (ROOT/"README.md").read_text() == readme(), "run make readme"


def test_chapters_import_only_upwards():
    "A chapter imports only chapters above it; fusion, translate and diffusion never each other; evaluate imports none of ours."
    allowed = {"kspace": [], "data": ["kspace"], "speaker": ["kspace", "data"], "evaluate": [],
               "learning": ["kspace", "data", "speaker", "evaluate"]}
    for late in CHAPTERS[5:]: allowed[late] = CHAPTERS[:5]
    wrong = []
    for p in (ROOT/"sirem_nb").rglob("*.py"):
        chapter = p.relative_to(ROOT/"sirem_nb").parts[0]
        if chapter not in allowed or p.name in ("_modidx.py", "__init__.py"): continue
        for node in ast.walk(ast.parse(p.read_text())):
            if not isinstance(node, ast.ImportFrom): continue
            other = (node.module or "").split(".")[0] if node.level == 2 else (node.module or "").removeprefix("sirem_nb.").split(".")[0]
            if other in CHAPTERS and other != chapter and other not in allowed[chapter]: wrong.append(f"{p.name} imports {node.module}")
    assert not wrong


def test_no_path_of_a_machine_is_named():
    hits = []
    pattern = re.compile(r"(?<![\w.])/(work|root|home|tmp)/\w|py" r"pi\.org|python" r"hosted|npm" r"js\.")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    for f in filter(None, files):
        p = ROOT/f
        if not p.is_file() or p.suffix in (".safetensors", ".png", ".gif"): continue
        text = p.read_text(errors="ignore")
        if p.suffix == ".ipynb":   # not inside pictures
            text = "\n".join(source(c) + json.dumps([{k: v for k, v in o.items() if k != "data"} for o in c.get("outputs", [])]) for c in cells(p))
        hits += [f"{f}: {m.group(0)}" for m in pattern.finditer(text)]
    assert not hits, hits[:5]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    src, out = tmp_path_factory.mktemp("src"), tmp_path_factory.mktemp("wheel")
    for f in ("settings.ini", "pyproject.toml", "README.md", "LICENSE"): shutil.copy(ROOT/f, src/f)
    shutil.copytree(ROOT/"sirem_nb", src/"sirem_nb", ignore=shutil.ignore_patterns("__pycache__"))
    r = subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, src], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]
    return next(out.glob("*.whl"))


def test_wheel_is_whole(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    missing = [str(p.relative_to(ROOT)) for p in (ROOT/"sirem_nb").rglob("*") if p.is_file() and "__pycache__" not in p.parts
               and str(p.relative_to(ROOT)) not in inside]
    assert not missing
    assert "sirem_nb/py.typed" in inside
    assert not any(n.startswith(("nbs/", "tests/", "checkpoints/")) for n in inside)


def test_wheel_imports_without_the_extras(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = f"""
import sys, pathlib, importlib
class Bare:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {EXTRAS!r}: raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Bare()); sys.path.insert(0, {str(tmp_path)!r})
root = pathlib.Path({str(tmp_path)!r})/'sirem_nb'
for p in sorted(root.rglob('*.py')):
    if p.name != '_modidx.py': importlib.import_module('.'.join(p.relative_to(root.parent).with_suffix('').parts).removesuffix('.__init__'))
import sirem_nb; assert pathlib.Path(sirem_nb.__file__).is_relative_to(root), sirem_nb.__file__
"""
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert r.returncode == 0, r.stderr[-2000:]
