"What the scripts of several stages share: each stage replaces its own records, and its line of the meta file."
import datetime
import json
import os
import platform
import time

import torch

from sirem_nb.data.mrd import write_json


def keep_stage(
    out,       # the .json of the study; beside it the .meta.json
    stage,     # name; what it left before is replaced
    records,   # list of dict
    about,     # dict: what the meta file says of the stage
    command,   # that made it
    **facts,   # that hold for all stages: seed, ...
):
    "Put one stage's results into a study's files."
    old = [r for r in json.loads(out.read_text()) if r["stage"] != stage] if out.exists() else []
    file = out.with_suffix(".meta.json"); meta = json.loads(file.read_text()) if file.exists() else {}
    write_json(out, old + [{**r, "stage": stage} for r in records])
    about = about | {"command": command, "date": datetime.date.today().isoformat(), "cpu_s": round(time.process_time())}
    machine = {"cores": os.cpu_count(), "threads": 1, "python": platform.python_version(), "torch": torch.__version__, **facts}
    write_json(file, {**meta, **machine, "stages": {**meta.get("stages", {}), stage: about}})
