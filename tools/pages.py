"""The pages of the site, before quarto (make docs) or Sphinx (make preview) renders them, and README.md.

    python tools/pages.py stage FOLDER   # nbs/ copied there, with Colab lines, data cards, a page for each module; links that leave nbs/ are turned
    python tools/pages.py readme         # README.md from nbs/index.ipynb

No notebook is executed, and nbs/ stays as it is.
"""
import configparser
import importlib
import inspect
import json
import posixpath
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?[^)]*\))")


def settings():
    "settings.ini as a dict."
    ini = configparser.ConfigParser()
    ini.read(ROOT/"settings.ini")
    return dict(ini["DEFAULT"])


def repository(): return settings()["git_url"]


def turned(text, turn): return LINK.sub(lambda m: m[1] + (m[2] if re.match(r"[a-z]+:", m[2]) else turn(m[2])) + m[3], text)


def site_link(target, page):
    "A relative link of nbs/PAGE, as it must read on the site: nbs/ and data_cards/ are there, all else is in the repository."
    full = posixpath.normpath(posixpath.join("nbs", posixpath.dirname(page), target))
    if full.startswith("nbs/"): return target
    return posixpath.relpath(full, posixpath.dirname(page)) if full.startswith("data_cards/") else f"{repository()}/blob/main/{full}"


def colab_line(page):
    "Markdown that opens nbs/PAGE in Colab, and says what to run there first, since Colab brings neither the package nor the stored results."
    home, name = repository(), settings()["repo"]
    address = f"{home.replace('https://github.com', 'https://colab.research.google.com/github')}/blob/main/nbs/{page}"
    first = f'!git clone --depth 1 {home}; pip install -q "./{name}[all]"\n%cd {name}/nbs/{posixpath.dirname(page)}'
    return f"[**Open in Colab**]({address})\n\n<details><summary>what to run there first</summary>\n\n```\n{first}\n```\n\n</details>"


def modules():
    "{module: notebook that it is exported from}, in the order of the book."
    at = {p: re.search(r"File to edit: (\S+\.ipynb)", p.read_text()) for p in sorted((ROOT/"sirem_nb").rglob("*.py"))}
    found = {".".join(p.relative_to(ROOT).with_suffix("").parts): m[1].lstrip("./").removeprefix("nbs/") for p, m in at.items() if m}
    return dict(sorted(found.items(), key=lambda kv: kv[1]))


def entry(thing):
    "A function or class as markdown: its head with the comments beside the parameters, and its docstring."
    from fastcore.docments import docments
    from nbdev.showdoc import BasicMarkdownRenderer, show_doc
    head = show_doc(thing, renderer=BasicMarkdownRenderer)._repr_markdown_().strip("-\n").split("\n```\n")[0].replace("###", "##", 1) + "\n```"
    said = docments(thing, full=True, returns=True).get("return", {}).get("docment") if inspect.isfunction(thing) else ""
    return "\n\n".join(filter(None, [head, plain(inspect.getdoc(thing) or ""), said and f"Returns {plain(said)}"]))


def plain(text): return re.sub(r"([\\*|`_<$\[])", r"\\\1", text)


def write_modules(folder):
    "A page for each module of the package, from what it exports, and one that lists them."
    folder.mkdir(exist_ok=True)
    lines = ["# Modules", ""]
    for name, notebook in modules().items():
        module = importlib.import_module(name)
        things = [getattr(module, n) for n in module.__all__ if n != "app"]
        mine = [t for t in things if inspect.isfunction(t) or inspect.isclass(t)]
        for c in [t for t in mine if inspect.isclass(t)]:
            mine[mine.index(c) + 1:mine.index(c) + 1] = [f for n, f in vars(c).items() if inspect.isfunction(f) and n[0] != "_" and f.__doc__]
        top = f"# {name}\n\nExported from [{Path(notebook).stem}](../{notebook}).\n\n"
        (folder/f"{name}.md").write_text(top + "\n\n".join(map(entry, mine)) + "\n")
        lines.append(f"- [{name}]({name}.md): {len(mine)} functions and classes")
    (folder/"index.md").write_text("\n".join(lines) + "\n")


def staged(nb, page):
    "Change a notebook for the site: its links, the Colab line under its title, no nbdev flags, no cell that is flagged hide."
    nb["cells"] = [c for c in nb["cells"] if not re.match(r"#\| *hide", "".join(c["source"]))]
    for c in nb["cells"]:
        text = "".join(c["source"])
        c["source"] = turned(text, lambda t: site_link(t, page)) if c["cell_type"] == "markdown" else re.sub(r"^#\| *\w.*\n?", "", text, flags=re.M)
    nb["cells"] = [c for c in nb["cells"] if c["source"].strip()]
    if "/" in page:
        title, _, rest = nb["cells"][0]["source"].partition("\n")
        nb["cells"][0]["source"] = f"{title}\n\n{colab_line(page)}\n\n{rest.lstrip()}"
    return nb


def stage(folder):
    "The site's sources in FOLDER, made anew."
    folder = Path(folder)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT/"nbs", folder, ignore=shutil.ignore_patterns(".ipynb_checkpoints", "*.mplstyle", "*.tmp"))
    for path in folder.rglob("*.ipynb"):
        path.write_text(json.dumps(staged(json.loads(path.read_text()), path.relative_to(folder).as_posix()), ensure_ascii=False, indent=1))
    (folder/"data_cards").mkdir()
    for card in (ROOT/"data_cards").glob("*.md"):                        # without the header, which is for Hugging Face
        (folder/"data_cards"/card.name).write_text(re.sub(r"\A---\n.*?\n---\n+", "", card.read_text(), flags=re.S))
    write_modules(folder/"api")


def readme():
    "README.md: the index as markdown, its links seen from the repository's root, without its flagged cells."
    import nbformat
    from nbconvert import MarkdownExporter
    nb = nbformat.read(ROOT/"nbs"/"index.ipynb", 4)
    nb.cells = [c for c in nb.cells if not re.match(r"#\| *(hide|slow)", c.source)]
    text, _ = MarkdownExporter().from_notebook_node(nb)
    return turned(text, lambda t: posixpath.normpath(posixpath.join("nbs", t))).rstrip() + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["readme"]: (ROOT/"README.md").write_text(readme())
    elif sys.argv[1:2] == ["stage"]: stage(sys.argv[2])
    else: sys.exit(__doc__)
