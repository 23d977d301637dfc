"""What the documents say is so: commands parse, files exist, tests that hold a promise are there."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

import evaluate
import visualize_attention
import visualize_correspondence as correspondence
import visualize_neighbours
import visualize_relative
import visualize_tsne
from eval_clustering import eval_clustering
from eval_copy_detection import eval_copy_detection as copies
from eval_detection import eval_detection
from eval_finetuning import extract_backbone_weights_for_finetuning as extract
from eval_knn import eval_knn
from eval_linear import eval_linear
from eval_retrieval import eval_retrieval
from eval_robustness import eval_robustness
from eval_segmentation import eval_segmentation
from eval_semi_supervised import eval_semi_supervised as few_labels
from eval_video import eval_video
from eval_zero_shot import eval_zero_shot
from evaluation.finetune_options import get_args_parser as finetune_parser
from evaluation.finetune_options import get_deit_parser as deit_parser
from evaluation.network import parse_network_args
from evaluation.transfer_options import get_args_parser as transfer_parser
from training.options import parse_options

ROOT = Path(__file__).resolve().parent.parent
NAMES = "clustering copy_detection detection finetuning knn linear retrieval robustness segmentation semi_supervised"
EVALUATIONS = [f"eval_{name}/README.md" for name in f"{NAMES} transfer video zero_shot".split()]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", *EVALUATIONS, "benchmarks/RESULTS.md")]
DOCUMENTS += sorted((ROOT / "configs").glob("*/README.md"))
WRITTEN_BY_A_RUN = {"log.txt"}


def commands() -> list[tuple[str, str]]:
    """(document, command) of every code block, continued lines joined, remarks cut off."""
    found = []
    for document in DOCUMENTS:
        for block in re.findall(r"```\n(.*?)```", document.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                command = re.split(r"\s{2,}(?=[^-\s])|\s#", line.strip())[0]
                if command:
                    found.append((document.name, " ".join(command.split())))
    return found


@pytest.mark.parametrize(("document", "command"), commands(), ids=lambda text: text)
def test_a_documented_command_parses(document, command):
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    script = next(i for i, word in enumerate(words) if word.endswith((".py", ".sh")) or word == "models.checkpoints")
    name, options = words[script], words[script + 1 :]
    parsers = {
        "main_pretrain.py": parse_options,
        "scripts/slurm_pretrain.sh": parse_options,
        "eval_knn/eval_knn.py": lambda argv: parse_network_args(eval_knn.get_args_parser(), argv),
        "eval_linear/eval_linear.py": lambda argv: parse_network_args(eval_linear.get_args_parser(), argv),
        "eval_detection/eval_detection.py": lambda argv: eval_detection.get_args_parser().parse_args(argv),
        "eval_segmentation/eval_segmentation.py": lambda argv: eval_segmentation.get_args_parser().parse_args(argv),
        "eval_finetuning/eval_finetuning.py": lambda argv: finetune_parser().parse_args(argv),
        "eval_finetuning/extract_backbone_weights_for_finetuning.py": lambda argv: extract.paths(
            extract.get_args_parser().parse_args(argv)
        ),
        "eval_zero_shot/eval_zero_shot.py": lambda argv: eval_zero_shot.get_args_parser().parse_args(argv),
        "eval_video/eval_video.py": lambda argv: parse_network_args(eval_video.get_args_parser(), argv),
        "evaluate.py": lambda argv: evaluate.get_args_parser().parse_args(argv),
        "visualize_relative.py": lambda argv: visualize_relative.get_args_parser().parse_args(argv),
        "eval_semi_supervised/eval_semi_supervised.py": lambda argv: few_labels.get_args_parser().parse_args(argv),
        "eval_semi_supervised/eval_semi_supervised_finetuning.py": lambda argv: deit_parser("").parse_args(argv),
        "eval_transfer/eval_transfer.py": lambda argv: transfer_parser().parse_args(argv),
        "eval_transfer/eval_transfer_finetuning.py": lambda argv: deit_parser("").parse_args(argv),
        "visualize_attention.py": lambda argv: parse_network_args(visualize_attention.get_args_parser(), argv),
        "visualize_tsne.py": lambda argv: parse_network_args(visualize_tsne.get_args_parser(), argv),
        "visualize_neighbours.py": lambda argv: parse_network_args(visualize_neighbours.get_args_parser(), argv),
        "visualize_correspondence.py": lambda argv: parse_network_args(correspondence.get_args_parser(), argv),
        "eval_clustering/eval_clustering.py": lambda argv: parse_network_args(eval_clustering.get_args_parser(), argv),
        "eval_copy_detection/eval_copy_detection.py": lambda argv: parse_network_args(copies.get_args_parser(), argv),
        "eval_retrieval/eval_retrieval.py": lambda argv: parse_network_args(eval_retrieval.get_args_parser(), argv),
        "eval_robustness/eval_robustness.py": eval_robustness.parse_arguments,
        "models.checkpoints": lambda argv: None,
        "check_parity.py": lambda argv: None,
    }
    parsers[name](options)
    assert (ROOT / (name if "/" in name or name.endswith(".py") else "models/checkpoints.py")).exists()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.parent.name + "/" + path.name)
def test_files_and_tests_that_are_named_exist(document):
    text = document.read_text()
    ours = [folder for folder in ROOT.iterdir() if folder.is_dir() and not folder.name.startswith(".")]
    names = {path.name for folder in ours for path in folder.rglob("*.py")}
    for path in re.findall(r"`([\w./]+\.(?:py|md|sh|yaml|txt|toml))`", text):
        known = path in names or path in WRITTEN_BY_A_RUN  # rooms name their files without the folder
        assert known or (ROOT / path).exists(), path
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)(?:\.\.\.)?`", text):
        assert f"def {name}" in tests, name


METHOD_FOLDERS = sorted(path.name for path in (ROOT / "configs").iterdir() if path.is_dir())


@pytest.mark.parametrize("method", METHOD_FOLDERS)
def test_the_table_of_a_methods_rows_says_what_its_presets_say(method):
    folder = ROOT / "configs" / method
    table = (folder / "README.md").read_text().split("| preset |")[1].split("\n\n")[0]
    head, _, *rows = (re.split(r"\s*\|\s*", line.strip("| ")) for line in f"preset |{table}".splitlines())
    rows = {row[0].strip("`"): dict(zip(head, row, strict=True)) for row in rows}
    assert sorted(rows) == sorted({path.stem for path in folder.glob("*.yaml")} - {"quickstart"})
    for name, row in rows.items():
        preset = yaml.safe_load((folder / f"{name}.yaml").read_text())
        said = preset["expected"]
        found = {"epochs": preset["epochs"], "images per step": said["global_batch"], "k-NN": said["knn"]}
        further = ("fine-tuned", "zero-shot", "ADE20K")
        found |= {"linear": said["linear"]} | {name: said.get(name, "not published") for name in further}
        for column in found.keys() & row.keys():
            assert str(found[column]).split(" (")[0] == row[column], (name, column)
