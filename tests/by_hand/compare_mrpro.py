"""Our operator and CG-SENSE beside mrpro's, by hand: mrpro needs torchvision, so it lives in an environment of its own.

    .venv/bin/python tests/by_hand/compare_mrpro.py make frames.npz      # here: simulates four frames, our gridding and CG-SENSE
    python -m venv /some/where && /some/where/bin/pip install mrpro
    /some/where/bin/python tests/by_hand/compare_mrpro.py check frames.npz results/mrpro.json
"""
import datetime
import json
import sys
import tempfile

import numpy as np
import torch

torch.set_num_threads(1)
RUNS = {"cg-sense, density weights, 30 iterations": (True, 30), "cg-sense, no weights, 15 iterations": (False, 15)}


def make(path):
    from sirem_nb.data.frames import cut_frames, weights_and_maps
    from sirem_nb.data.mrd import read_mrd
    from sirem_nb.kspace.gridding import gridding
    from sirem_nb.kspace.iterative import cg_sense
    from sirem_nb.speaker.corpus import simulate_corpus
    with tempfile.TemporaryDirectory() as folder:
        scan = read_mrd(simulate_corpus(folder, 1, ["ageese"], seed=3, seconds=1., transient=False)[0].raw)
    dcf, smaps = weights_and_maps(scan)
    k = cut_frames(scan).kspace[2:6]
    ours = {name: cg_sense(k, scan.ktraj, smaps, weights=dcf if w else None, n_iter=n).image.numpy() for name, (w, n) in RUNS.items()}
    np.savez(path, k=k, ktraj=scan.ktraj, dcf=dcf, smaps=smaps, gridding=gridding(k, scan.ktraj, dcf, smaps, scan.im_size), **ours)


def check(path, out):
    import mrpro
    from mrpro.algorithms.optimizers import cg
    from mrpro.data import KTrajectory, SpatialDimension
    from mrpro.operators import NonUniformFastFourierOp
    d = np.load(path)
    k, ktraj, smaps, dcf = (torch.tensor(d[n]) for n in ("k", "ktraj", "smaps", "dcf"))
    size = SpatialDimension(1, *smaps.shape[-2:])
    axis = lambda i, n: (ktraj[..., i] * n)[None, None, None]                      # cycles per field of view
    traj = KTrajectory(kz=torch.zeros(1, 1, 1, 1, 1), ky=axis(1, size.y), kx=axis(0, size.x))
    op = NonUniformFastFourierOp(direction=("y", "x"), recon_matrix=size, encoding_matrix=size, traj=traj)
    S = smaps[None, :, None]
    adjoint = lambda y: (op.adjoint(y)[0] * S.conj()).sum(1, keepdim=True)
    y, records = k[:, :, None], []

    def record(name, theirs):
        error = [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(theirs.reshape(len(k), size.y, size.x).numpy(), d[name])]
        records.append({"table": "mrpro", "task": name, "method": "mrpro", "metric": "nrmse to sirem-nb", "value": max(error), "n": len(error)})
        print(records[-1])
    record("gridding", adjoint(y * dcf))
    for name, (weighted, n) in RUNS.items():
        w = dcf if weighted else torch.ones(1)
        normal = lambda v: (adjoint(op(v * S)[0] * w),)
        record(name, torch.cat([cg(normal, adjoint(f[None] * w), max_iterations=n, tolerance=0.)[0] for f in y]))
    meta = {"mrpro": mrpro.__version__, "torch": torch.__version__, "date": str(datetime.date.today()), "command": "python tests/by_hand/compare_mrpro.py check frames.npz results/mrpro.json"}
    with open(out, "w") as f: json.dump({"meta": meta, "records": records}, f, indent=1)


if __name__ == "__main__": {"make": make, "check": check}[sys.argv[1]](*sys.argv[2:])
