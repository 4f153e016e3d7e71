# make demo   the main job, end to end, from nothing: ends by naming out/demo/report.html
# make test   the book and the tests
# make test-browser  panels and pages in a real browser (Debian's chromium)
# make bench  times beside those of other packages, about ten minutes on a machine that does nothing else
# make bench-keep  the same, and one line more in results/bench_history.jsonl
# make studies  the long runs that chapter 95 reads, about an hour; results stay in out/study
# make venv   the set-up alone
# make lint   ruff and the type checker over the package
# make docs   the site, by quarto; without quarto make preview, which also says what is broken
# make run NB=...   a notebook is run and its outputs stored
# make readme / make export / make clean-nb / make hooks: for those who write notebooks (CONTRIBUTING.md)
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := fast,evaluation,moonshine,usc75,dicom,cluster,notebook,dev,peers
export OMP_NUM_THREADS ?= 2
export MPLBACKEND ?= Agg

.PHONY: venv demo test book pytest test-browser bench bench-keep studies lint readme docs preview export run clean-nb hooks

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

bench-keep: bench
	$(BIN)/python -c "from sirem_nb.bench import keep; keep('out/bench', 'results/bench_history.jsonl')"

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

# One notebook: export, run from the top, store its outputs, clean. make run NB=nbs/10_kspace/11_spiral.ipynb FLAGS="slow"
run: export
	OMP_NUM_THREADS=1 MPLBACKEND=module://matplotlib_inline.backend_inline $(BIN)/python tools/run.py $(NB) $(FLAGS)
	$(BIN)/nbdev_clean

clean-nb: venv
	$(BIN)/nbdev_clean

hooks: venv
	$(BIN)/nbdev_install_hooks
	cp .githooks/pre-commit "$$(git rev-parse --git-path hooks)/pre-commit"

readme: venv
	$(BIN)/python tools/pages.py readme

lint: venv
	$(BIN)/ruff check
	$(BIN)/ty check --output-format concise

# Quarto renders a staged copy of nbs/. (nbdev_docs would run every cell with an import, and drop what stands under a title.)
docs: venv
	@if ! command -v quarto > /dev/null; then echo "quarto is not installed: a preview instead"; $(MAKE) preview; else set -e; \
	$(BIN)/python tools/pages.py stage _proc; (cd _proc && quarto render --no-cache); \
	rm -rf _docs; mv _proc/_docs _docs; $(BIN)/python tools/check_site.py _docs; fi

preview: venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[preview]" --no-build-isolation
	$(BIN)/python tools/preview.py
