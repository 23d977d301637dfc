"""Weighted k-NN: how well do a frozen network's features separate classes it was never told about?

    python eval_knn/eval_knn.py --pretrained_weights checkpoint.pth --data_path /imagenet
    torchrun --nproc_per_node=8 eval_knn/eval_knn.py --pretrained_weights checkpoint.pth --data_path /imagenet
    python eval_knn/eval_knn.py --pretrained_weights checkpoint.pth --baselines        on the bundled photographs

Features are L2-normalised; the k training images most similar to a test image vote for their classes with weight
exp(similarity / temperature) (Wu et al., 1805.01978). Published with DINO: ViT-S/16 74.5, ViT-S/8 78.3 % top-1 at
k = 20. Protocol and more numbers: README.md in this folder.
"""

import argparse
import statistics
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F

from data.datasets import ALL, Source, images_per_class
from data.preprocess import MEAN, STD, eval_transform
from evaluation.features import FeatureCache, extract_features, weights_hash
from evaluation.network import (
    add_data_arguments,
    add_feature_arguments,
    add_network_arguments,
    add_process_arguments,
    check_common_arguments,
    chosen_features,
    common_labels,
    crop_and_resize,
    network_from_options,
    open_train_and_test,
    untrained,
    write_result,
)
from models.checkpoints import Network
from utils import Parser, UsageError, World, all_reduce_sum, bool_flag, init_world, keep_large_blocks, log, run_cli

Accuracies = dict[int, tuple[float, float]]  # k -> (top-1, top-5) in percent

# ---------------------------------------------------------------------------------------------------------------------
# The classifier
# ---------------------------------------------------------------------------------------------------------------------

WORKING_BYTES = 128 * 2**20  # beyond the features themselves, whatever the number of images
QUERIES = 512  # test images compared at once


def nearest_neighbours(
    bank: torch.Tensor, queries: torch.Tensor, k: int, working_bytes: int = WORKING_BYTES
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``k`` rows of ``bank`` (images, dim) with the largest cosine similarity to every row of ``queries``.

    Returns similarities and row numbers, both (queries, k), most similar first. The bank is read in pieces that take
    no more than ``working_bytes``, normalised and compared, and the best of all pieces so far are kept.
    """
    k, queries = min(k, len(bank)), F.normalize(queries, dim=1)
    rows = max(1, working_bytes // (sum(queries.shape) * bank.element_size()))
    best = queries.new_empty(len(queries), 0)
    indices = best.long()
    for start in range(0, len(bank), rows):
        piece = queries @ F.normalize(bank[start : start + rows], dim=1).T
        similarities, found = piece.topk(min(k, piece.shape[1]))
        del piece  # before the next one is made
        best, indices = torch.cat((best, similarities), dim=1), torch.cat((indices, found + start), dim=1)
        best, order = best.topk(min(k, best.shape[1]))
        indices = indices.gather(1, order)
    return best, indices


def class_votes(similarities: torch.Tensor, labels: torch.Tensor, temperature: float, num_classes: int) -> torch.Tensor:
    """Neighbours' similarities and labels, both (queries, k) -> total vote of every class (queries, num_classes)."""
    votes = torch.zeros(len(labels), num_classes, dtype=similarities.dtype, device=similarities.device)
    return votes.scatter_add_(1, labels, (similarities / temperature).exp())


def neighbours_in_chunks(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    k: int,
    num_classes: int,
    working_bytes: int = WORKING_BYTES,
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """For a slice of test images at a time: their neighbours' similarities and labels, both (images, k)."""
    step = max(1, min(QUERIES, working_bytes // (num_classes * train_features.element_size())))
    for start in range(0, len(test_features), step):
        part = slice(start, min(start + step, len(test_features)))
        similarities, indices = nearest_neighbours(train_features, test_features[part], k, working_bytes)
        yield part, similarities, train_labels[indices]


def rank_of_class(votes: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """How many classes come before the true one: (queries,), 0 is first. Of equal votes the lower class comes first.

    parity: among classes without votes too, which the original's sort leaves in the order of their numbers.
    """
    true = votes.gather(1, labels[:, None])
    before = torch.arange(votes.shape[1], device=votes.device) < labels[:, None]
    return ((votes > true) | ((votes == true) & before)).sum(dim=1)


def knn_classify(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    ks: Sequence[int],
    temperature: float = 0.07,
    num_classes: int | None = None,
    world: World | None = None,
    working_bytes: int = WORKING_BYTES,
) -> Accuracies:
    """Top-1 and top-5 accuracy in percent for every k in ``ks``.

    Features (images, dim) of any norm, labels (images,). Float64 features are compared in float64. Neighbours are
    searched once, for the largest k; a k beyond the bank takes all of it. Top-5 counts the true class among the first
    min(5, k). With ``world`` every process must call this with the same arguments, and does its share of the queries.
    """
    if not len(train_features) or not len(test_features):
        raise ValueError(f"k-NN of {len(test_features)} test images in a bank of {len(train_features)}")
    num_classes = num_classes or 1 + max(int(train_labels.max()), int(test_labels.max()))
    total = len(test_features)
    if world is not None:
        test_features, test_labels = test_features[world.rank :: world.size], test_labels[world.rank :: world.size]
    correct = torch.zeros(len(ks), 2, dtype=torch.long, device=test_features.device)
    chunks = neighbours_in_chunks(train_features, train_labels, test_features, max(ks), num_classes, working_bytes)
    for part, similarities, labels in chunks:
        # relative to the best one: the same ranking, and no overflow at low temperatures
        relative = similarities - similarities[:, :1]
        for row, k in enumerate(ks):
            rank = rank_of_class(
                class_votes(relative[:, :k], labels[:, :k], temperature, num_classes), test_labels[part]
            )
            correct[row] += torch.stack(((rank < 1).sum(), (rank < min(5, k)).sum()))
    if world is not None:
        correct = all_reduce_sum(correct.to(world.device))
    return {k: (100 * first / total, 100 * five / total) for k, (first, five) in zip(ks, correct.tolist(), strict=True)}


# ---------------------------------------------------------------------------------------------------------------------
# What a network has to beat
# ---------------------------------------------------------------------------------------------------------------------

RAW_SIDE = 32  # pixels
BINS = 4  # per colour channel


def raw_pixels(images: torch.Tensor) -> torch.Tensor:
    """Normalised crops (batch, 3, size, size), averaged over areas down to at most 32 x 32: (batch, 3072)."""
    return F.adaptive_avg_pool2d(images, min(RAW_SIDE, images.shape[-1])).flatten(1)


def colour_histogram(images: torch.Tensor) -> torch.Tensor:
    """Share of a crop's pixels in each of 4 x 4 x 4 cells of the RGB cube: (batch, 64)."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, STD))
    cells = ((images * std + mean) * BINS).long().clamp(0, BINS - 1).flatten(2)  # (batch, 3, pixels)
    cells = (cells[:, 0] * BINS + cells[:, 1]) * BINS + cells[:, 2]
    counts = torch.zeros(len(images), BINS**3, device=images.device)
    return counts.scatter_add_(1, cells, torch.ones_like(cells, dtype=counts.dtype)) / cells.shape[1]


def baseline_accuracies(
    args: argparse.Namespace, network: Network, sets: "Sets", world: World
) -> dict[str, Accuracies]:
    """Raw pixels, colour histogram and the same architecture untrained (seed 0), on the same images and the same k."""
    model = untrained(network.arch, network.arguments).to(world.device)

    def feature(model, images: torch.Tensor) -> torch.Tensor:
        return torch.cat((raw_pixels(images), colour_histogram(images), sets.feature(model, images)), dim=1)

    train, test = (extract(args, model, source, sets, world, feature) for source in (sets.train, sets.test))
    pixels = 3 * min(RAW_SIDE, sets.crop_size) ** 2
    widths = [pixels, BINS**3, train.shape[1] - pixels - BINS**3]
    names = ("raw pixels", "colour histogram", f"untrained {network.label}")
    return {
        name: mean_accuracies(classify(args, bank, queries, sets, world))
        for name, bank, queries in zip(names, train.split(widths, dim=1), test.split(widths, dim=1), strict=True)
    }


def table(rows: dict[str, Accuracies], ks: Iterable[int]) -> str:
    """Aligned top-1 accuracies: a line per row, a column per k."""
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"{f'k={k}':>9}" for k in ks)]
    lines += [f"{name:<{width}}" + "".join(f"{accuracies[k][0]:9.2f}" for k in ks) for name, accuracies in rows.items()]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# The evaluation
# ---------------------------------------------------------------------------------------------------------------------


class Sets:
    """The bank and the test images, what is taken from them, and their labels under common class numbers.

    With --subset the bank holds what all --subset_starts need; ``rows``: for every start the rows of its images.
    """

    def __init__(self, args: argparse.Namespace, network: Network):
        (self.feature,) = chosen_features(network, [args.n_last_blocks], [args.avgpool_patchtokens], [args.class_token])
        per_class = None if args.subset == ALL else args.subset
        first, last = min(args.subset_starts), max(args.subset_starts)
        span = per_class and last - first + per_class
        self.train, self.test = open_train_and_test(args.data_path, span, first)
        self.train_labels, self.test_labels = common_labels(self.train, self.test)
        self.rows = {
            start: bank_rows(self.train_labels, per_class, start - first) if per_class else slice(None)
            for start in args.subset_starts
        }
        self.crop_size, self.resize_size = crop_and_resize(args, network)
        self.transform = eval_transform(self.crop_size, self.resize_size)


def bank_rows(labels: torch.Tensor, per_class: int, start: int) -> torch.Tensor:
    """Rows of the images [start, start + per_class) of every class."""
    return torch.from_numpy(images_per_class(labels.numpy(), per_class, start))


def extract(args: argparse.Namespace, model, source: Source, sets: Sets, world: World, feature) -> torch.Tensor:
    features, _ = extract_features(
        model,
        source,
        sets.transform,
        world=world,
        batch_size=args.batch_size_per_gpu,
        num_workers=args.num_workers,
        device=world.device,
        feature=feature,
    )
    return features


def network_features(args: argparse.Namespace, network: Network, sets: Sets, world: World) -> list[torch.Tensor]:
    """Normalised features of the train and the test images, from a folder where one is given and fits."""
    key = {}
    if args.load_features or args.dump_features:
        key = {
            "weights": weights_hash(network.model),
            "arch": network.label,
            "feature": f"{sets.feature}, L2-normalised",
            "preprocessing": f"resize {sets.resize_size} bicubic, centre crop {sets.crop_size}, ImageNet normalisation",
            "train": sets.train.fingerprint,
            "test": sets.test.fingerprint,
        }
        cache = FeatureCache(args.load_features or args.dump_features)
        stored = cache.load(key)
        if args.load_features and stored is None:
            why = cache.difference(key) or "a file is damaged"
            raise UsageError(f"--load_features {args.load_features}: {why}; extract with --dump_features instead")
        hits = all_reduce_sum(torch.tensor([int(stored is not None)], device=world.device))
        if int(hits) == world.size:
            return list(stored[:2])
    features = [
        F.normalize(extract(args, network.model, source, sets, world, sets.feature), dim=1)
        for source in (sets.train, sets.test)
    ]
    if not all(torch.isfinite(matrix).all() for matrix in features):
        raise UsageError(f"{network.label}: features that are not finite numbers; its weights are damaged or diverged")
    if args.dump_features and world.rank == 0:
        cache.save(key, (*features, sets.train_labels, sets.test_labels))
    return features


def classify(
    args: argparse.Namespace, bank: torch.Tensor, queries: torch.Tensor, sets: Sets, world: World
) -> dict[int, Accuracies]:
    """For every one of --subset_starts."""
    device = world.device if args.use_cuda else torch.device("cpu")
    queries, test_labels = queries.to(device), sets.test_labels.to(device)
    results = {}
    for start, rows in sets.rows.items():
        known, labels = bank[rows].to(device), sets.train_labels[rows].to(device)
        classes = len(sets.train.class_names)
        results[start] = knn_classify(
            known, labels, queries, test_labels, args.nb_knn, args.temperature, classes, world
        )
    return results


def mean_accuracies(runs: dict[int, Accuracies]) -> Accuracies:
    """Over the starts."""
    first, *_ = runs.values()
    return {k: tuple(statistics.fmean(run[k][part] for run in runs.values()) for part in (0, 1)) for k in first}


def deviation(runs: dict[int, Accuracies], k: int) -> float:
    """Standard deviation of top-1 over the starts (of a sample, n - 1)."""
    return statistics.stdev(run[k][0] for run in runs.values())


def get_args_parser() -> Parser:
    parser = Parser(prog="eval_knn.py", description="Weighted k-NN on frozen features.")
    add_network_arguments(parser.add_argument_group("what is evaluated"))
    add_feature_arguments(parser.add_argument_group("feature"), n_last_blocks=1)
    add_data_arguments(parser.add_argument_group("data"))
    add = parser.add_argument_group("k-NN").add_argument
    add("--nb_knn", default=[10, 20, 100, 200], nargs="+", type=int, help="numbers of neighbours; 20 is usually best")
    add("--temperature", default=0.07, type=float, help="of the votes exp(similarity / temperature)")
    add(
        "--subset_starts",
        default=[0],
        nargs="+",
        type=int,
        help="first image of every class in the subset; for several, mean and standard deviation are given too",
    )
    add("--use_cuda", default=True, type=bool_flag, help="compare features on the GPU, if there is one")
    add("--baselines", action="store_true", help="also test raw pixels, a colour histogram and the untrained network")
    add = parser.add_argument_group("results").add_argument
    add("--dump_features", default=None, metavar="DIR", help="keep the features here, and use them if they are there")
    add("--load_features", default=None, metavar="DIR", help="use the features kept here, or stop if they are others")
    add("--output_dir", default=".", help="where eval_knn.json is written")
    add_process_arguments(parser.add_argument_group("processes"))
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    if min(args.nb_knn) < 1:
        raise UsageError(f"--nb_knn {min(args.nb_knn)}: a vote needs at least one neighbour")
    if not args.temperature > 0:
        raise UsageError(f"--temperature {args.temperature}: must be positive (the default is 0.07)")
    if min(args.subset_starts) < 0:
        raise UsageError(f"--subset_starts {min(args.subset_starts)}: the first image of a class is 0")
    if args.subset_starts != [0] and args.subset in (None, ALL):
        raise UsageError("--subset_starts chooses the first image of a --subset, and there is none; pass --subset too")
    if "," in args.checkpoint_key and (args.dump_features or args.load_features):
        raise UsageError(f"--checkpoint_key {args.checkpoint_key}: features are kept of one network; pass one key")
    check_common_arguments(args)


def main() -> None:
    args = get_args_parser().parse_args()
    check_arguments(args)
    keep_large_blocks()
    world = init_world(args.device, args.dist_url, args.backend)
    keys = args.checkpoint_key.split(",")
    for number, key in enumerate(keys):
        if len(keys) > 1:
            log.info(f"checkpoint key: {key}")
        evaluate(argparse.Namespace(**{**vars(args), "checkpoint_key": key}), world, append=number > 0)


def evaluate(args: argparse.Namespace, world: World, append: bool) -> None:
    """One network of a checkpoint; ``append``: its result becomes a further line of eval_knn.json."""
    network = network_from_options(args)
    network.model.to(world.device)
    sets = Sets(args, network)
    log.info(f"bank: {sets.train.name}; test: {sets.test.name}; crop {sets.crop_size} of {sets.resize_size} pixels")
    rows = baseline_accuracies(args, network, sets, world) if args.baselines else {}
    runs = classify(args, *network_features(args, network, sets, world), sets, world)
    show(runs)
    accuracies = mean_accuracies(runs)
    if args.baselines:
        weights = args.pretrained_weights or "random weights"
        log.info("k-NN top-1 in percent\n" + table(rows | {f"{network.label}, {weights}": accuracies}, args.nb_knn))
    if world.rank == 0:
        numbers = runs_as_numbers(runs)
        numbers |= {"baselines": {name: as_numbers(row) for name, row in rows.items()}} if rows else {}
        data = f"{sets.train.name}; {sets.test.name}"
        path = write_result(args.output_dir, "eval_knn", network, args.checkpoint_key, data, numbers, append)
        log.info(f"written to {path}")


def show(runs: dict[int, Accuracies]) -> None:
    for start, accuracies in runs.items():
        where = f"from image {start} on: " if len(runs) > 1 else ""
        for k, (top1, top5) in accuracies.items():
            log.info(f"{where}{k}-NN classifier result: Top1: {top1}" + f", Top5: {top5}" * (k > 1))
    if len(runs) > 1:
        for k, (top1, _) in mean_accuracies(runs).items():
            log.info(
                f"{k}-NN, mean of {len(runs)} subsets: Top1: {top1:.4f}, standard deviation {deviation(runs, k):.4f}"
            )


def runs_as_numbers(runs: dict[int, Accuracies]) -> dict:
    """Means over the starts; where there are several, with the deviation of top-1 and every start's own."""
    numbers = as_numbers(mean_accuracies(runs))
    if len(runs) > 1:
        for k in mean_accuracies(runs):
            numbers[str(k)]["top1_std"] = deviation(runs, k)
        numbers["starts"] = {str(start): as_numbers(run) for start, run in runs.items()}
    return numbers


def as_numbers(accuracies: Accuracies) -> dict[str, dict[str, float]]:
    """For logs and results; the first five of one neighbour are no more than the first."""
    return {str(k): {"top1": top1} | ({"top5": top5} if k > 1 else {}) for k, (top1, top5) in accuracies.items()}


if __name__ == "__main__":
    run_cli(main)
