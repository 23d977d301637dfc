"""Is it learning? Weighted k-NN of the teacher's features during training, on images with labels."""

import argparse
from pathlib import Path

import torch

from data.datasets import Source
from data.preprocess import eval_transform
from eval_knn.eval_knn import knn_classify
from evaluation import common_labels, open_train_and_test
from features import extract_features
from utils import World, log

NEIGHBOURS = (10, 20)


class OnlineKNN:
    """The test, or nothing where no labelled images are known (``reason`` says why)."""

    def __init__(self, args: argparse.Namespace, world: World):
        self.args, self.world = args, world
        self.sets: tuple[Source, Source] | None = None
        self.reason = self._open()
        log.info("online k-NN: %s", self.reason or " against ".join(source.name for source in self.sets))
        crop = getattr(args, "global_crops_size", 224)
        self.transform = eval_transform(crop, crop if args.data_path is None else round(crop * 256 / 224))

    def _open(self) -> str:
        """Open the images. Returns why there are none."""
        args = self.args
        if not args.knn_every:
            return "off (--knn_every 0)"
        folder = args.knn_data
        if folder is None and args.data_path is not None:
            folder = Path(args.data_path).parent
            if not all((folder / part).is_dir() for part in ("train", "val")):
                return f"off ({folder} has no train/ and val/; --knn_data names a folder that has)"
        self.sets = open_train_and_test(None if folder is None else str(folder), args.knn_per_class)
        self.labels = common_labels(*self.sets)
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
