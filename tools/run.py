"""Run one notebook from the top and store its outputs. Used by make run.

    python tools/run.py nbs/10_kspace/11_spiral.ipynb [slow] [data] [gpu]

Cells with a flag that is not named are left out and keep the output they have. Pictures of data cells are not stored.
"""
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def run(path, flags=()):
    "Execute the notebook at `path` in its own folder; it is written only if every cell went well."
    path = Path(path)
    nb = nbformat.read(path, 4)
    client = NotebookClient(nb, timeout=3600, resources={"metadata": {"path": str(path.parent)}})
    with client.setup_kernel():
        for i, cell in enumerate(nb.cells):
            has = set(re.findall(r"^#\| *(slow|data|gpu)\b", cell.source, re.M))
            if cell.cell_type != "code" or has - set(flags): continue
            client.execute_cell(cell, i)
            if "data" in has: cell.outputs = [o for o in cell.outputs if not any(k.startswith("image/") for k in o.get("data", {}))]
    nbformat.write(nb, path)


if __name__ == "__main__":
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file(): sys.exit(__doc__)
    run(sys.argv[1], sys.argv[2:])
