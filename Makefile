# make demo   the main job, end to end, from nothing: ends by naming out/demo/report.html
# make test   the book and the tests
# make venv   the set-up alone
# make readme / make docs / make clean-nb: for those who write notebooks (CONTRIBUTING.md)
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := fast,evaluation,moonshine,dicom,cluster,notebook,dev,peers
export OMP_NUM_THREADS ?= 2
export MPLBACKEND ?= Agg

.PHONY: venv demo test book pytest readme docs export clean-nb

venv: .venv/.ready
.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "setuptools" "wheel"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[$(EXTRAS)]"
	@touch $@

demo: venv
	$(BIN)/sirem demo --out out/demo

test: book pytest

book: venv
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --timing

pytest: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

export: venv
	$(BIN)/nbdev_export

clean-nb: venv
	$(BIN)/nbdev_clean

readme: venv
	$(BIN)/python -m nbconvert --log-level WARN --to markdown --stdout nbs/index.ipynb > README.md.tmp && mv README.md.tmp README.md

docs: venv
	$(BIN)/nbdev_docs
