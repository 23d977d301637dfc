# make quickstart   pretrain on the bundled photographs and evaluate: about six minutes on two cores, no GPU needed
# make test         lint and the whole test suite
# Both make .venv first if it is missing or older than the requirements.

PYTHON ?= python3
OUT ?= out/quickstart
BIN := .venv/bin

.PHONY: quickstart test

quickstart: .venv/installed
	$(BIN)/python main_pretrain.py --config configs/dino/quickstart.yaml --output_dir $(OUT)
	$(BIN)/python eval_knn/eval_knn.py --pretrained_weights $(OUT)/checkpoint.pth --baselines --nb_knn 10 20 \
		--output_dir $(OUT)
	$(BIN)/python visualize_attention.py --pretrained_weights $(OUT)/checkpoint.pth --output_dir $(OUT)/attention
	@echo
	@echo "Attention pictures are in $(OUT)/attention, logs in $(OUT)/tensorboard. What you may want next:"
	@echo "  $(BIN)/tensorboard --logdir $(OUT)/tensorboard"
	@echo "  $(BIN)/torchrun --nproc_per_node=8 main_pretrain.py --config configs/dino/vanilla.yaml --data_path /imagenet/train --output_dir out/dino"
	@echo "  $(BIN)/python eval_knn/eval_knn.py --pretrained_weights out/dino/checkpoint.pth --data_path /imagenet"

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8

.venv/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "error: $(PYTHON) is older than Python 3.11; name another: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -e '.[test]'
	@touch $@
