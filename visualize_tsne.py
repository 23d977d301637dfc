"""A picture of a frozen network's features in the plane: images of a few classes, laid out by exact t-SNE.

    python visualize_tsne.py --pretrained_weights checkpoint.pth --data_path /imagenet
    python visualize_tsne.py --pretrained_weights checkpoint.pth --classes n01440764 n01443537 --num_per_class 200
    python visualize_tsne.py --pretrained_weights checkpoint.pth            tiles of the bundled photographs

The feature is that of k-NN, the class token, L2-normalised. Written are ``tsne.png``, a colour for every class, and
``tsne.npz``: coordinates (seeds, images, 2), labels (images,) that count classes, images by name, divergences. t-SNE
begins at the principal components, so that a picture can be made again; with --init random several --seed show what
of it is chance. Needs scikit-learn (requirements-eval.txt). Mugs (2203.14415), figure of six classes.
"""

from pathlib import Path

from data.chosen import ChosenClasses
from data.datasets import open_source, training_path
from data.decode import add_reading_arguments, reading_from
from data.published import add_dataset_arguments, place_from
from evaluation.network import add_network_arguments, network_from_options, parse_network_args
from evaluation.plane import check_library
from evaluation.plane_run import check_options, lay_out
from evaluation.sets import crop_and_resize
from utils import Parser, init_world, run_cli


def get_args_parser() -> Parser:
    parser = Parser(prog="visualize_tsne.py", description="Features of a few classes in the plane, by t-SNE.")
    add_network_arguments(parser.add_argument_group("which network"))
    group = parser.add_argument_group("which images")
    add = group.add_argument
    add("--data_path", default=None, help="folder per class, or a root with train/; left out: bundled photographs")
    add("--classes", default=None, nargs="+", metavar="NAME", help="which classes; left out: the first six")
    add("--num_per_class", default=100, type=int, help="images of each class at most; memory grows with the square")
    add("--crop_size", default=None, type=int, help="pixels; left out: the checkpoint's own, else 224")
    add("--resize_size", default=None, type=int, help="shorter side before the crop; left out: crop * 256 / 224")
    add("--batch_size_per_gpu", default=64, type=int, help="images per forward pass")
    add("--num_workers", default=4, type=int, help="processes that decode images")
    add_dataset_arguments(group)
    add_reading_arguments(group)
    add = parser.add_argument_group("t-SNE").add_argument
    add("--perplexity", default=30.0, type=float, help="about how many neighbours an image has")
    add("--iters", default=1000, type=int, help="iterations, of which 250 exaggerate early")
    add("--seed", default=[0], nargs="+", type=int, help="several, with --init random: a panel for each")
    add("--init", default="pca", choices=("pca", "random"), help="where the points begin")
    add = parser.add_argument_group("results").add_argument
    add("--output_dir", "--output", default=".", help="where tsne.png and tsne.npz are written")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: the GPU if there is one")
    return parser


def main() -> None:
    args = parse_network_args(get_args_parser())
    check_options(args)
    check_library()
    world = init_world(args.device)
    images = open_source(training_path(place_from(args)))
    images = ChosenClasses(images, args.classes, args.num_per_class).read_as(reading_from(args))
    network = network_from_options(args)
    lay_out(args, world, network, images, crop_and_resize(args, network), Path(args.output_dir))


if __name__ == "__main__":
    run_cli(main)
