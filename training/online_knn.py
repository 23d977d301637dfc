"""Is it learning? Weighted k-NN of the teacher's features during training, on images with labels."""

import argparse
from pathlib import Path

import torch

from data.datasets import Source, SubsetSource
from data.preprocess import eval_transform
from eval_knn.eval_knn import knn_classify
from evaluation import common_labels, open_train_and_test
from features import extract_features
from utils import UsageError, World, log

NEIGHBOURS = (10, 20)


class OnlineKNN:
    """The test, or nothing where no labelled images are known (``reason`` says why)."""

    def __init__(self, args: argparse.Namespace, world: World):
        self.args, self.world = args, world
        self.sets: tuple[Source, Source] | None = None
        folder = args.knn_data
        if folder is None and args.data_path is not None:
            folder = str(Path(args.data_path).parent)
        self.reason = self._open(folder) if args.knn_every else "off (--knn_every 0)"
        log.info("online k-NN: %s", self.reason or " against ".join(source.name for source in self.sets))
        crop = getattr(args, "global_crops_size", 224)
        self.transform = eval_transform(crop, crop if folder is None else round(crop * 256 / 224))

    def _open(self, folder: str | None) -> str:
        """Open the images. Returns why there are none; raises UsageError only for a folder the user named."""
        try:
            train, test = open_train_and_test(folder, None)
            bank_labels, query_labels = common_labels(train, test)
        except UsageError as error:
            if self.args.knn_data is not None:
                raise UsageError(f"--knn_data {folder}: {error}") from None
            return f"off, since there are no labelled images beside the training data ({error})"
        bank = SubsetSource(train, self.args.knn_per_class, fewer=True)
        self.sets, self.labels = (bank, test), (bank_labels[bank.positions], query_labels)
        return ""

    def __call__(self, backbone: torch.nn.Module) -> dict[str, float]:
        """Top-1 in percent for every number of neighbours; the same on all processes."""
        if self.sets is None:
            return {}
        bank, queries = (
            extract_features(
                backbone,
                source,
                self.transform,
                world=self.world,
                batch_size=self.args.batch_size_per_gpu,
                num_workers=self.args.num_workers,
                device=self.world.device,
            )[0]
            for source in self.sets
        )
        accuracy = knn_classify(bank, self.labels[0], queries, self.labels[1], NEIGHBOURS, world=self.world)
        results = {f"knn{k}_top1": top1 for k, (top1, _) in accuracy.items()}
        log.info("online k-NN: %s", ", ".join(f"{name} {value:.2f}" for name, value in results.items()))
        return results
