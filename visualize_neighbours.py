"""A contact sheet of what the memory of a Mugs run finds: for every given image the stored ones nearest to it.

    python visualize_neighbours.py --pretrained_weights out/checkpoint.pth --image_path photo.jpg
    python visualize_neighbours.py --pretrained_weights out/checkpoint.pth --topk 12         bundled photographs

An image is compared as in training, by the mean of all its tokens before the final norm, with the rows of the memory
that were written; the run remembers which of its images each is of. Written is ``neighbours.png``: a row for every
image, beside it the cosines and the names of what was found. The images are those the run was trained on, where it
found them or at --data_path. Mugs (2203.14415), section 3.2.
"""

from evaluation.image_files import add_file_arguments
from evaluation.neighbours_run import check_options, draw_neighbours
from evaluation.network import add_network_arguments, parse_network_args
from utils import Parser, init_world, run_cli


def get_args_parser() -> Parser:
    parser = Parser(prog="visualize_neighbours.py", description="What a Mugs run's memory finds for given images.")
    add_network_arguments(parser.add_argument_group("which network"))
    group = parser.add_argument_group("which images")
    add_file_arguments(group)
    add = group.add_argument
    add("--data_path", default=None, help="the images of the run; left out: where it found them")
    add("--crop_size", default=None, type=int, help="pixels; left out: the run's own")
    add("--resize_size", default=None, type=int, help="shorter side before the crop; left out: crop * 256 / 224")
    add = parser.add_argument_group("pictures").add_argument
    add("--topk", default=8, type=int, help="neighbours of every image; Mugs uses 8")
    add("--output_dir", default=".", help="where neighbours.png is written")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: the GPU if there is one")
    return parser


def main() -> None:
    args = parse_network_args(get_args_parser())
    check_options(args)
    draw_neighbours(args, init_world(args.device))


if __name__ == "__main__":
    run_cli(main)
