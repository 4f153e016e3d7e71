"""The site without quarto: the same pages by Sphinx and MyST-NB. Nothing is executed.

    python tools/preview.py   # _preview/html/index.html; ends with 1 when a link, a picture or a page is missing
"""
import sys

import yaml
from check_site import check, wanted
from pages import ROOT, modules, repository, settings, stage

OUT = ROOT/"_preview"


def sidebar():
    "{chapter: [pages]} as _quarto.yml lists them."
    contents = yaml.safe_load((ROOT/"_quarto.yml").read_text())["website"]["sidebar"]["contents"]
    return {s["section"]: [c["href"].removesuffix(".ipynb") for c in s["contents"]] for s in contents if "section" in s}


def toctree(caption, pages): return "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```"])


def source(folder):
    "What Sphinx reads: the staged notebooks and pages, and who stands where in the sidebar."
    import nbformat
    stage(folder)
    nb = nbformat.read(folder/"index.ipynb", 4)
    trees = {**sidebar(), "Data cards": sorted(f"data_cards/{p.stem}" for p in (folder/"data_cards").glob("*.md")), "Modules": ["api/index", *(f"api/{m}" for m in modules())]}
    nb.cells.append(nbformat.v4.new_markdown_cell("\n\n".join(toctree(*t) for t in trees.items())))
    nbformat.write(nb, folder/"index.ipynb")


def build(out=OUT):
    "Render; the lines that Sphinx complained with."
    from sphinx.application import Sphinx
    source(out/"source")
    theme = {"repository_url": repository(), "use_repository_button": True, "use_download_button": False, "navbar_persistent": [], "home_page_in_toc": True, "show_navbar_depth": 1}
    conf = {"project": settings()["title"], "html_title": settings()["title"], "author": settings()["author"], "html_theme": "sphinx_book_theme", "html_theme_options": theme,
            "extensions": ["myst_nb"], "nb_execution_mode": "off", "myst_enable_extensions": ["dollarmath", "amsmath"], "myst_heading_anchors": 4,
            "nb_merge_streams": True, "suppress_warnings": ["mystnb.unknown_mime_type"], "html_copy_source": False}
    with open(out/"warnings.txt", "w") as said:
        Sphinx(out/"source", None, out/"html", out/"trees", "html", confoverrides=conf, status=None, warning=said, freshenv=True).build()
    return (out/"warnings.txt").read_text().splitlines()


if __name__ == "__main__":
    for line in build(): print(line)
    wrong = check(OUT/"html", wanted() + [f"api/{m}.html" for m in modules()])
    print("\n".join(wrong) or f"{OUT/'html'/'index.html'}: every link, picture and page is there")
    sys.exit(bool(wrong))
