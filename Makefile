# make demo   the main job, end to end, from nothing: ends by naming out/demo/report.html
# make test   the book and the tests
# make test-browser  panels and pages in a real browser (Debian's chromium)
# make bench  times beside those of other packages, about ten minutes on a machine that does nothing else
# make studies  the long runs that chapter 95 reads, about an hour; results stay in out/study
# make venv   the set-up alone
# make readme / make docs / make clean-nb / make hooks: for those who write notebooks (CONTRIBUTING.md)
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := fast,evaluation,moonshine,usc75,dicom,cluster,notebook,dev,peers
export OMP_NUM_THREADS ?= 2
export MPLBACKEND ?= Agg

.PHONY: venv demo test book pytest test-browser bench studies readme docs export clean-nb hooks

# Its last line lets numba compile once, alone: two processes that fill numba's cache at the same moment can leave it broken.
venv: .venv/.ready
.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "setuptools" "wheel"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[$(EXTRAS)]"
	$(BIN)/python -c "import numpy as np; from sirem_nb.evaluate.speech import formant_track, pitch_track; from sirem_nb.translate.mel import MEL, mel_spectrogram, to_wave; w = np.sin(np.arange(MEL.n_samples)/20).astype('f'); formant_track(w, MEL.rate), pitch_track(w, MEL.rate), to_wave(mel_spectrogram(w))"
	@touch $@

demo: venv
	$(BIN)/sirem demo --out out/demo

test: book pytest

book: venv
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --timing

pytest: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-browser: venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[browser]" --no-build-isolation
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/browser

bench: venv
	$(BIN)/sirem bench --out out/bench

STUDY := out/study
studies: venv
	$(BIN)/sirem simulate $(STUDY)/data --speakers 16 --recordings 2 --seconds 8 --seed 7
	for a in 13 6 4 3 2 1; do $(BIN)/sirem train fusion $(STUDY)/data --out $(STUDY)/runs/$$a-arms --arms-per-frame $$a --per-epoch 800 --cache $(STUDY)/cache || exit 1; done
	$(BIN)/sirem evaluate $(STUDY)/data --tables paper --run $(STUDY)/runs --arms-per-frame 2 --methods gridding,temporal-tv --targets truth --max-frames 300 --cache $(STUDY)/cache --out $(STUDY)/classic
	$(BIN)/sirem evaluate $(STUDY)/data --tables fusion --run $(STUDY)/runs --cache $(STUDY)/cache --max-frames 60 --out $(STUDY)/few_arms
	$(BIN)/sirem evaluate $(STUDY)/data --tables paper --run $(STUDY)/runs --arms-per-frame 13 --max-frames 40 --cache $(STUDY)/cache --out $(STUDY)/tables
	$(BIN)/sirem evaluate $(STUDY)/data --tables left-out --run $(STUDY)/runs --cache $(STUDY)/cache --out $(STUDY)/left_out

export: venv
	$(BIN)/nbdev_export

clean-nb: venv
	$(BIN)/nbdev_clean

hooks: venv
	$(BIN)/nbdev_install_hooks
	cp .githooks/pre-commit "$$(git rev-parse --git-path hooks)/pre-commit"

readme: venv
	$(BIN)/python -m nbconvert --log-level WARN --to markdown --stdout nbs/index.ipynb > README.md.tmp && mv README.md.tmp README.md

docs: venv
	$(BIN)/nbdev_docs
