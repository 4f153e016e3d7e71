"""Is a rendered site whole? Broken links, missing pictures, missing pages, pages that nothing leads to.

    python tools/check_site.py FOLDER   # _docs (quarto) or _preview/html (Sphinx); prints what is wrong, one line each, and ends with 1
"""
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pages import ROOT, repository


class Page(HTMLParser):
    "What a page points at, and the names in it that can be pointed at."
    def __init__(self, text):
        super().__init__()
        self.links, self.files, self.names = set(), set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.names |= {a[k] for k in ("id", "name") if a.get(k)}
        if tag == "a" and a.get("href"): self.links.add(a["href"])
        if tag in ("img", "source", "audio", "video", "script", "iframe") and a.get("src"): self.files.add(a["src"])
        if tag == "link" and a.get("href"): self.files.add(a["href"])


def wanted():
    "The pages that a site of this book must have: those of the sidebar."
    listed = re.findall(r"href: (\S+)\.ipynb", (ROOT/"_quarto.yml").read_text())
    return sorted({f"{p}.html" for p in listed})


def lost(address, at, folder, pages):
    "Why an address in the page `at` leads nowhere, or None. Other people's sites are not asked; our repository's files must exist."
    if address.startswith(repository() + "/blob/main/"):
        path = urlsplit(address).path.split("/blob/main/")[1]
        return None if (ROOT/unquote(path)).exists() else "no such file in the repository"
    parts = urlsplit(address)
    if parts.scheme or parts.netloc: return None
    path = unquote(parts.path)
    to = at if not path else ((folder/path.lstrip("/")) if path.startswith("/") else at.parent/path).resolve()
    if to.is_dir(): to = to/"index.html"
    if not to.is_file(): return "no such file"
    if to in pages and parts.fragment and unquote(parts.fragment) not in pages[to].names | {"top"}: return "no such place in the page"
    return None


def check(folder, must=()):
    "Everything that is wrong with the site in `folder`, as lines; `must`: pages that may not be missing."
    folder = Path(folder).resolve()
    pages = {p: Page(p.read_text(errors="replace")) for p in sorted(folder.rglob("*.html")) if "_static" not in p.parts and "site_libs" not in p.parts}
    wrong = [f"missing page: {m}" for m in must if folder/m not in pages]
    reached = {folder/"index.html"}
    for at, page in pages.items():
        for kind, addresses in (("broken link", page.links), ("missing file", page.files)):
            for address in sorted(addresses):
                if why := lost(address, at, folder, pages): wrong.append(f"{kind}: {at.relative_to(folder)} -> {address} ({why})")
        reached |= {(at.parent/unquote(urlsplit(a).path)).resolve() for a in page.links if not urlsplit(a).scheme and urlsplit(a).path}
    own = ("search.html", "genindex.html", "py-modindex.html", "404.html")
    return wrong + [f"nothing leads to {p.relative_to(folder)}" for p in pages if p not in reached and p.name not in own]


if __name__ == "__main__":
    wrong = check(sys.argv[1], wanted())
    print("\n".join(wrong) or f"{sys.argv[1]}: every link, picture and page is there")
    sys.exit(bool(wrong))
