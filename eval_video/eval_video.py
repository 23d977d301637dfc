"""Video object segmentation on DAVIS 2017: do a frozen network's patches find objects again from frame to frame?

    python eval_video/eval_video.py --pretrained_weights checkpoint.pth --data_path /DAVIS --output_dir masks
    torchrun --nproc_per_node=8 eval_video/eval_video.py --pretrained_weights checkpoint.pth --data_path /DAVIS

Labels of the first frame are carried on by the likeness of patch tokens; nothing is trained. Published with DINO
(2104.14294): J&F 61.8 with ViT-S/16, 69.9 with ViT-S/8. Protocol and more numbers: README.md in this folder.
"""

from data.decode import add_reading_arguments
from evaluation.network import add_network_arguments, add_process_arguments, parse_network_args
from evaluation.propagation import Settings
from evaluation.video_run import check_options, evaluate
from utils import Parser, init_world, keep_large_blocks, run_cli


def get_args_parser() -> Parser:
    parser = Parser(prog="eval_video.py", description="Video object segmentation by propagated labels.")
    add_network_arguments(parser.add_argument_group("what is evaluated"))
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--data_path", required=True, help="DAVIS 2017: the folder with ImageSets/, JPEGImages/ and Annotations/")
    add("--split", default="val", help="which list of ImageSets/2017")
    add("--partial", action="store_true", help="take a copy of a split that has not its published number of videos")
    add_reading_arguments(group)
    add = parser.add_argument_group("propagation").add_argument
    defaults = Settings()
    add("--n_last_frames", default=defaults.n_last_frames, type=int, help="frames that labels come from, and the first")
    what = "labels come from at most so many patches away, in rows and columns; 0: from anywhere"
    add("--size_mask_neighborhood", default=defaults.size_mask_neighborhood, type=int, help=what)
    add("--topk", default=defaults.topk, type=int, help="patches that labels come from")
    add("--short_side", default=480, type=int, help="pixels of a frame's shorter side")
    add("--bs", default=6, type=int, help="accepted and ignored, as in the originals")
    add = parser.add_argument_group("results").add_argument
    add("--output_dir", default=".", help="where masks and eval_video.json are written; a stopped run goes on there")
    add_process_arguments(parser.add_argument_group("processes"))
    return parser


def main() -> None:
    args = parse_network_args(get_args_parser())
    check_options(args)
    keep_large_blocks()
    evaluate(args, init_world(args.device, args.dist_url, args.backend))


if __name__ == "__main__":
    run_cli(main)
