#!/bin/sh
# Everything that only a card can show, in less than ten minutes on an A100 or H100:
#
#     sh benchmarks/gpu.sh [FOLDER]      the tests of tests/gpu, the benchmarks, a short training with k-NN around it
#     sh benchmarks/gpu.sh --list        its commands, one a line; nothing is run
#
# FOLDER (out/gpu) gets gpu.md, a section for RESULTS.md, and whatever the commands print and write. The card is used, never
# configured. PYTHON names another interpreter. Exit code 1: a command failed, and the section says which; 2: no card.
set -u
cd "$(dirname "$0")/.." || exit 2
PYTHON=${PYTHON:-python3}
[ -x .venv/bin/python ] && [ "$PYTHON" = python3 ] && PYTHON=.venv/bin/python
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

list=no
[ "${1:-}" = --list ] && { list=yes; shift; }
out=${1:-out/gpu}
failed=0

# take TITLE WORDS...: run python with the words; the section gets the title, the command and what it printed
take() {
    title=$1
    shift
    if [ $list = yes ]; then
        echo "python $*"
        return
    fi
    echo "$title: python $*"
    began=$(date +%s)
    "$PYTHON" "$@" >"$out/step.log" 2>&1
    code=$?
    seconds=$(($(date +%s) - began))
    cat "$out/step.log" >>"$out/all.log"
    {
        printf '\n### %s\n\n`python %s`, %s s\n\n```\n' "$title" "$*" "$seconds"
        # a training run says much; what it ends with is what counts
        tail -n 40 "$out/step.log" | cut -c 1-200
        printf '```\n'
    } >>"$out/gpu.md"
    if [ $code -ne 0 ]; then
        failed=$((failed + 1))
        echo "FAILED with exit code $code: $out/all.log"
        printf '\n**Failed** with exit code %s.\n' $code >>"$out/gpu.md"
    fi
}

if [ $list = no ]; then
    if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
        echo "error: $PYTHON finds no torch or no GPU here; run this on a machine that has both (PYTHON=... names another)" >&2
        exit 2
    fi
    mkdir -p "$out" || exit 2
    rm -rf "$out/run"
    : >"$out/all.log"
    "$PYTHON" - >"$out/gpu.md" <<'END' || exit 1
import os, platform, subprocess
import cv2, numpy, torch, torchvision
from utils import git_revision
card = torch.cuda.get_device_properties(0)
ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
try:
    driver = subprocess.run(ask, capture_output=True, text=True, timeout=20).stdout.split("\n")[0].strip() or "unknown"
except OSError:
    driver = "unknown"
print(f"## On a card: {card.name}\n")
print(f"`sh benchmarks/gpu.sh`: {card.name} ({card.total_memory / 2**30:.0f} GB, {torch.cuda.device_count()} shown, one used), "
      f"driver {driver}, CUDA {torch.version.cuda}, {os.cpu_count()} cores. Python {platform.python_version()}, torch "
      f"{torch.__version__}, torchvision {torchvision.__version__}, OpenCV {cv2.__version__}, NumPy {numpy.__version__}; "
      f"commit {git_revision()}.")
END
fi

take "Tests" -m pytest -p no:cacheprovider -q tests/gpu
for method in dino ibot attmask udi unic mugs; do
    take "A training step, $method" benchmarks/bench_step.py --method $method --batch 64 --steps 5 --device cuda
done
take "A training step, esvit" benchmarks/bench_step.py --method esvit --arch swin_tiny --batch 32 --steps 5 --device cuda
take "A training step, deterministic" benchmarks/bench_step.py --method dino --batch 64 --steps 5 --device cuda --deterministic
take "Decoding and augmentation" benchmarks/bench_data.py
take "k-NN at the size of ImageNet" benchmarks/bench_knn.py --device cuda
take "A short training" main_pretrain.py --config configs/dino/quickstart.yaml --device cuda --num_workers 8 --output_dir "$out/run"
take "k-NN before and after it" eval_knn/eval_knn.py --pretrained_weights "$out/run/checkpoint.pth" --baselines \
    --nb_knn 10 20 --device cuda --output_dir "$out/run"

[ $list = yes ] && exit 0
echo "written: $out/gpu.md, to be appended to benchmarks/RESULTS.md"
[ $failed -eq 0 ]
