"The workflows: valid against the published schema, and in step with the project."
import re
import subprocess
import sys
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")


@pytest.fixture(scope="module")
def workflows(root): return {p.stem: p for p in sorted((root/".github"/"workflows").glob("*.yml"))}


def load(path): return yaml.safe_load(path.read_text())


def steps(path): return [s for job in load(path)["jobs"].values() for s in job["steps"]]


def test_schema(workflows):
    pytest.importorskip("check_jsonschema")
    assert set(workflows) == {"tests", "gpu", "docs", "release"}
    r = subprocess.run([sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", *map(str, workflows.values())], capture_output=True, text=True)
    assert r.returncode == 0, r.stdout + r.stderr


def test_the_schema_check_can_fail(workflows, tmp_path):
    pytest.importorskip("check_jsonschema")
    bad = tmp_path/"bad.yml"
    bad.write_text(workflows["tests"].read_text().replace("runs-on: ubuntu-latest", "runs-onn: ubuntu-latest"))
    assert subprocess.run([sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(bad)], capture_output=True).returncode == 1


def test_every_promised_python_is_tested(workflows, root):
    least = re.search(r'requires-python="?>=3\.(\d+)', (root/"pyproject.toml").read_text())[1]
    readme = re.search(r"Python 3\.(\d+) to 3\.(\d+)", (root/"README.md").read_text())
    assert load(workflows["tests"])["jobs"]["test"]["strategy"]["matrix"]["python"] == [f"3.{n}" for n in range(int(least), int(readme[2]) + 1)] and readme[1] == least


def test_make_targets_and_files_exist(workflows, root):
    targets = set(re.findall(r"^([\w-]+):", (root/"Makefile").read_text(), re.M))
    for path in workflows.values():
        for s in steps(path):
            run = s.get("run", "")
            assert set(re.findall(r"\bmake ([\w-]+)", run)) <= targets, run
            for nb in re.findall(r"(?:nbs|tools)/\S+\.(?:ipynb|py)", run): assert (root/nb).is_file(), nb


def test_the_gpu_runs_what_is_flagged(workflows, root):
    flags = re.search(r"tst_flags = (.+)", (root/"settings.ini").read_text())[1].split()
    asked = re.search(r'--flags "([^"]+)"', workflows["gpu"].read_text())[1].split()
    assert set(asked) == set(flags) - {"data"}


def test_the_gpu_machine_renders_what_it_ran(workflows, root):
    "Its loop finds the flagged notebooks, and the site is made after it."
    runs = [s["run"] for s in steps(workflows["gpu"]) if "tools/run.py" in s.get("run", "")]
    search = re.search(r"\$\((grep .*)\); do", runs[0])[1]
    found = subprocess.run(["bash", "-c", search], cwd=root, capture_output=True, text=True).stdout.split()
    assert len(runs) == 1 and runs[0].rstrip().endswith("make docs") and {"nbs/90_use/94_bench.ipynb", "nbs/index.ipynb"} <= set(found)


def test_ci_looks_the_code_over(workflows, root):
    assert any(s.get("run") == "make lint" for s in steps(workflows["tests"]))
    assert subprocess.run([Path(sys.executable).parent/"ruff", "check", "--quiet"], cwd=root).returncode == 0


@pytest.mark.parametrize("tool, line", [("ruff", "print(undefined_name)"), ("ty", "read_mrd('x', no_such=1)"), ("ty", "USC13.ktrajj()")])
def test_what_lint_is_for(tool, line, root, tmp_path):
    "A planted mistake is found with the settings of pyproject.toml."
    bad = tmp_path/"bad.py"
    bad.write_text("from sirem_nb.data.mrd import read_mrd\nfrom sirem_nb.kspace.spiral import USC13\n" + line + "\nprint(read_mrd, USC13)\n")
    check = ["check", "--config", root/"pyproject.toml"] if tool == "ruff" else ["check", "--project", root]
    r = subprocess.run([Path(sys.executable).parent/tool, *check, bad], cwd=root, capture_output=True, text=True)
    assert r.returncode == 1 and ("undefined" in r.stdout.lower() or "no_such" in r.stdout or "ktrajj" in r.stdout), r.stdout + r.stderr
    bad.write_text(bad.read_text().replace(line, ""))
    assert subprocess.run([Path(sys.executable).parent/tool, *check, bad], cwd=root, capture_output=True).returncode == 0


def test_the_hook_cleans_exports_and_looks(root):
    hook = root/".githooks"/"pre-commit"
    assert hook.stat().st_mode & 0o111 and all(w in hook.read_text() for w in ("nbdev_clean", "nbdev_export", "ruff check"))
    assert subprocess.run(["bash", "-n", str(hook)]).returncode == 0
