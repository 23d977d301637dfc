"""Transfer of whole networks: fine-tuned on CIFAR, Flowers, Cars or iNaturalist by DeiT's recipe.

    torchrun --nproc_per_node=8 eval_transfer/eval_transfer_finetuning.py --finetune checkpoint.pth \\
        --data_set CIFAR10 --data_path /cifar-10-batches-bin --batch_size 96 --lr 7.5e-6 --epochs 1000

iBOT (2111.07832), AttMask, Mugs, UDI. Every image three times an epoch; commands and published numbers: README.md here.
"""

from evaluation.finetune import finetune
from evaluation.finetune_options import check_arguments, get_deit_parser
from utils import run_cli


def main() -> None:
    parser = get_deit_parser("eval_transfer_finetuning")
    parser.set_defaults(repeated_aug=True)
    args = parser.parse_args()
    check_arguments(args)
    finetune(args)


if __name__ == "__main__":
    run_cli(main)
