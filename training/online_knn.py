"""Is it learning? Weighted k-NN of the teacher's features during training, on images with labels."""

import argparse
from pathlib import Path

import torch

from data.datasets import Source, open_source
from data.preprocess import eval_transform
from eval_knn.eval_knn import knn_classify
from features import extract_features
from utils import UsageError, World, log

NEIGHBOURS = (10, 20)


class OnlineKNN:
    """The test, or nothing where no labelled images are known (``reason`` says why)."""

    def __init__(self, args: argparse.Namespace, world: World):
        self.args, self.world = args, world
        self.bank: Source | None = None
        self.queries: Source | None = None
        self.reason = self._open()
        log.info("online k-NN: %s", self.reason or f"{len(self.bank)} against {len(self.queries)} images")
        crop = getattr(args, "global_crops_size", 224)
        self.transform = eval_transform(crop, crop if args.data_path is None else round(crop * 256 / 224))

    def _open(self) -> str:
        args = self.args
        if not args.knn_every:
            return "off (--knn_every 0)"
        if args.knn_data is None and args.data_path is None:
            self.bank, self.queries = open_source(None, args.knn_per_class), open_source(None, split="test")
            return ""
        folder = Path(args.knn_data) if args.knn_data else Path(args.data_path).parent
        if not args.knn_data and not ((folder / "train").is_dir() and (folder / "val").is_dir()):
            return f"off ({folder} has no train/ and val/; --knn_data names a folder that has)"
        self.bank = open_source(str(folder / "train"), args.knn_per_class)
        self.queries = open_source(str(folder / "val"))
        if self.bank.class_names != self.queries.class_names:
            raise UsageError(f"--knn_data {folder}: train/ and val/ have different class folders")
        return ""

    def __call__(self, backbone: torch.nn.Module) -> dict[str, float]:
        """Top-1 in percent for every number of neighbours."""
        if self.reason:
            return {}
        sides = [
            extract_features(
                backbone,
                source,
                self.transform,
                world=self.world,
                batch_size=self.args.batch_size_per_gpu,
                num_workers=self.args.num_workers,
                device=self.world.device,
            )
            for source in (self.bank, self.queries)
        ]
        accuracy = knn_classify(*sides[0], *sides[1], NEIGHBOURS)
        results = {f"knn{k}_top1": top1 for k, (top1, _) in accuracy.items()}
        log.info("online k-NN: %s", ", ".join(f"{name} {value:.2f}" for name, value in results.items()))
        return results
