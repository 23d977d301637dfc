"""Few labels: a network fine-tuned from inside its projection head, by DeiT's recipe.

    torchrun --nproc_per_node=4 eval_semi_supervised/eval_semi_supervised_finetuning.py --finetune checkpoint.pth \\
        --data_path /imagenet --target_list_path 1percent.txt --finetune_head_layer 1 --epochs 1000 --lr 5e-6

SimCLR v2 (2006.10029), iBOT (2111.07832), Mugs, UDI. Commands and published numbers: README.md in this folder.
"""

from evaluation.finetune import finetune
from evaluation.finetune_options import check_arguments, get_deit_parser
from utils import run_cli


def main() -> None:
    args = get_deit_parser("eval_semi_supervised_finetuning").parse_args()
    check_arguments(args)
    finetune(args)


if __name__ == "__main__":
    run_cli(main)
