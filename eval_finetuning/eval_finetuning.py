"""Fine-tuning a network with labels, every layer with its own learning rate: BEiT's recipe as iBOT and UDI use it.

    torchrun --nproc_per_node=8 eval_finetuning/eval_finetuning.py --finetune checkpoint.pth --data_path /imagenet \\
        --disable_rel_pos_bias --abs_pos_emb --use_cls --layer_scale_init_value 0 --imagenet_default_mean_and_std

Published (ImageNet-1k, top-1): iBOT ViT-S/16 82.3, ViT-B/16 84.0. Commands, protocol and numbers: README.md here.
"""

from evaluation.finetune import finetune
from evaluation.finetune_options import check_arguments, get_args_parser
from utils import run_cli


def main() -> None:
    args = get_args_parser().parse_args()
    check_arguments(args)
    finetune(args)


if __name__ == "__main__":
    run_cli(main)
