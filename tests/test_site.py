"The site: its checker finds what is broken, its pages carry their Colab lines, every data card has its header."
import json
import subprocess
import sys

import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT/"tools"))
import check_site
import pages

NOTEBOOKS = [p.relative_to(ROOT/"nbs").as_posix() for p in sorted((ROOT/"nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]


@pytest.fixture
def whole(tmp_path):
    "A small site with nothing wrong."
    (tmp_path/"a").mkdir()
    (tmp_path/"index.html").write_text('<h1 id="top-of-it">x</h1><a href="a/one.html#part">one</a> <img src="a/p.png"> <a href="https://elsewhere.invalid/x">away</a>')
    (tmp_path/"a"/"one.html").write_text('<p id="part">y</p><a href="../index.html#top-of-it">back</a>')
    (tmp_path/"a"/"p.png").write_bytes(b"p")
    return tmp_path


def test_a_whole_site_passes(whole): assert check_site.check(whole, ["index.html", "a/one.html"]) == []


@pytest.mark.parametrize("text, says", [
    ('<a href="a/two.html">', "broken link: index.html -> a/two.html"),
    ('<a href="a/one.html#nowhere">', "no such place in the page"),
    ('<img src="a/q.png">', "missing file: index.html -> a/q.png"),
    ('<script src="lib.js"></script>', "missing file: index.html -> lib.js"),
    (f'<a href="{pages.repository()}/blob/main/no_such_file.md">', "no such file in the repository"),
])
def test_what_is_planted_is_found(whole, text, says):
    (whole/"index.html").write_text((whole/"index.html").read_text() + text)
    wrong = check_site.check(whole)
    assert len(wrong) == 1 and says in wrong[0]


def test_missing_and_lost_pages_are_found(whole):
    (whole/"a"/"alone.html").write_text("nobody links here")
    assert check_site.check(whole, ["a/three.html"]) == ["missing page: a/three.html", "nothing leads to a/alone.html"]


def test_the_command_ends_with_1(whole):
    r = subprocess.run([sys.executable, ROOT/"tools"/"check_site.py", whole], capture_output=True, text=True)
    assert r.returncode == 1 and "missing page: 10_kspace/11_spiral.html" in r.stdout


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("staged")/"pages"
    pages.stage(folder)
    return folder


def test_every_notebook_opens_in_colab(staged):
    for page in NOTEBOOKS:
        said = ["".join(c["source"]) for c in json.loads((staged/page).read_text())["cells"][:3]]
        address = f"https://colab.research.google.com/github/sirem-nb/sirem-nb/blob/main/nbs/{page}"
        assert sum(address in s for s in said) == ("/" in page), page


def test_nothing_but_flags_is_lost(staged):
    for page in NOTEBOOKS:
        before, after = (["".join(c["source"]) for c in json.loads((at/page).read_text())["cells"]] for at in (ROOT/"nbs", staged))
        assert not any(line.startswith("#| ") for text in after for line in text.splitlines()), page
        kept = [t for t in before if not t.startswith("#| hide") and "".join(line for line in t.splitlines() if not line.startswith("#|")).strip()]
        assert len(kept) == len(after) and kept[0].splitlines()[-1] in after[0], page


def test_quarto_and_nbdev_name_the_same_addresses():
    yaml = pytest.importorskip("yaml")
    site, ini = yaml.safe_load((ROOT/"_quarto.yml").read_text()), pages.settings()
    assert site["website"]["repo-url"] == ini["git_url"] and site["website"]["site-url"] == ini["doc_host"] + ini["doc_baseurl"]
    assert site["project"]["output-dir"] == ini["doc_path"] and site["website"]["title"] == ini["title"]


@pytest.mark.parametrize("target, page, now", [
    ("12_nufft.ipynb", "10_kspace/11_spiral.ipynb", "12_nufft.ipynb"),
    ("../../data_cards/usc75.md", "20_data/23_usc75.ipynb", "../data_cards/usc75.md"),
    ("../data_cards/usc75.md", "index.ipynb", "data_cards/usc75.md"),
    ("../../results/bench.json", "95_studies/954_speed.ipynb", f"{pages.repository()}/blob/main/results/bench.json"),
])
def test_links_that_leave_the_notebooks_are_turned(target, page, now): assert pages.site_link(target, page) == now


def test_every_module_names_its_notebook():
    found = pages.modules()
    assert found["sirem_nb.kspace.spiral"] == "10_kspace/11_spiral.ipynb" and set(found.values()) <= set(NOTEBOOKS)


def test_a_module_has_its_page(staged):
    page = (staged/"api"/"sirem_nb.kspace.nufft.md").read_text()
    assert "(../10_kspace/12_nufft.ipynb)" in page and "## Nufft.adjoint" in page and "ktraj, # (..., 2) cycles/pixel" in page
    listed = (staged/"api"/"index.md").read_text()
    assert all(f"({m}.md)" in listed and (staged/"api"/f"{m}.md").stat().st_size > 100 for m in pages.modules())


def test_the_landing_page_begins_with_a_film():
    from PIL import Image
    first = "".join(json.loads((ROOT/"nbs"/"index.ipynb").read_text())["cells"][0]["source"]).splitlines()
    picture = next(line for line in first[1:] if line.strip())
    film = ROOT/"nbs"/picture.split("](")[1].split(")")[0]
    assert first[0].startswith("# ") and film.stat().st_size < 1.5e6 and Image.open(film).n_frames > 20
    assert f"](nbs/{film.relative_to(ROOT/'nbs')})" in (ROOT/"README.md").read_text()


CARDS = sorted((ROOT/"data_cards").glob("*.md"))


@pytest.mark.parametrize("path", CARDS, ids=lambda p: p.stem)
def test_a_data_card_has_its_header(path):
    "As Hugging Face reads it, with what a reader looks for first."
    from huggingface_hub import DatasetCard
    card = DatasetCard(path.read_text())
    data = card.data.to_dict()
    assert {"pretty_name", "license", "language", "size_categories", "task_categories", "tags"} <= {k for k, v in data.items() if v}
    assert data["license"] != "other" or data.get("license_name")
    assert card.text.lstrip().startswith("# ") and "## Known trouble" in card.text


def test_every_data_set_has_its_card():
    assert {"usc75", "annot16", "usc_timit", "xray_microbeam", "cine_tagged", "virtual_speakers"} <= {p.stem for p in CARDS}
    listed = (ROOT/"_quarto.yml").read_text()
    assert all(f"data_cards/{p.name}" in listed for p in CARDS)
