"""The spectrogram scores of every run that translators.py made, in one small file (study 955): python tests/by_hand/translators_runs.py RUN"""
import datetime
import json
import sys
from pathlib import Path

import numpy as np
import torch

from sirem_nb.data.mrd import write_json
from sirem_nb.evaluate.speech import mel_scores

records = []
for here in sorted(p.parent for p in Path(sys.argv[1]).glob("*/*/about.json")):
    a, z = json.loads((here/"about.json").read_text()), np.load(here/"guess.npz")
    for method in ("mel", "mean-spectrogram", "mean-of-word", "other-speaker"):
        s = mel_scores(torch.from_numpy(z[method]), torch.from_numpy(z["true-mel"]))
        for metric in ("l1", "corr2d"):
            records.append({"table": "translate-runs", "kind": a["kind"], "run": here.parent.name, "row": a["row"], "given": a["given"], "seed": a["seed"], "method": a["row"] if method == "mel" else method,
                            "metric": metric, "value": round(float(s[metric].mean()) if hasattr(s[metric], "mean") else float(s[metric]), 5), "n": len(z["test"])})
out = Path(__file__).resolve().parents[2]/"results"
write_json(out/"translators_runs.json", records)
write_json(out/"translators_runs.meta.json", {"command": "python tests/by_hand/translators.py run DATA RUN KIND ROW ...; python tests/by_hand/translators_runs.py RUN", "date": str(datetime.date.today()), "machine": "CPU, one thread of a busy machine", "torch": torch.__version__})
