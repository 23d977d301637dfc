"""Is it learning? Weighted k-NN of the teacher's features during training, on images with labels."""

import argparse
import os

import torch

from data.datasets import ALL, Place, Source, SubsetSource, open_source, train_and_test_paths, training_path
from data.decode import reading_from
from data.preprocess import eval_transform
from data.published import place_from
from evaluation.features import MEAN, extract_features, labels_of
from evaluation.knn import Bank, as_numbers, doubts, knn_classify, remark_on_k
from evaluation.network import chosen_features
from evaluation.sets import common_labels
from evaluation.unreadable import Unreadable, UnreadableImages, leave_out, readable, remark
from models.checkpoints import Network
from utils import UsageError, World, escape, log


class OnlineKNN:
    """The test, or nothing where no labelled images are known (``reason`` says why).

    Images that cannot be read are left out: no image ends a training.
    """

    def __init__(self, args: argparse.Namespace, world: World, backbone: torch.nn.Module, crop: int):
        """``crop``: pixels along a side of the images that ``backbone`` is shown."""
        self.args, self.world, self.backbone = args, world, backbone
        network = Network(backbone, args.arch, {}, None)
        pooling, token = args.avgpool_patchtokens, args.class_token
        (self.feature,) = chosen_features(network, [args.n_last_blocks], [pooling], [token])
        self.temperature = args.teacher_temp if args.knn_temperature is None else args.knn_temperature
        self.sets: tuple[Source, Source] | None = None
        self.reason = self._open() if args.knn_every else "off (--knn_every 0)"
        log.info("online k-NN: %s", self.reason or " against ".join(source.name for source in self.sets))
        self.left_out: list[list[Unreadable]] = [[], []]  # of bank and test images, at the last test
        for sentence in doubts(args.nb_knn, Bank.of(self.labels[0])) if self.sets else ():
            log.warning("warning: online k-NN: %s", sentence)
        bundled = args.knn_data is None and args.data_path is None
        self.transform = eval_transform(crop, crop if bundled else round(crop * 256 / 224))

    def _open(self) -> str:
        """Open the images. Returns why there are none; raises UsageError only for a folder the user named."""
        try:
            paths, reading = self._paths(), reading_from(self.args)
            train = open_source(paths[0]).read_as(reading)
            test = open_source(paths[1], split="test").read_as(reading)
            _, query_labels = common_labels(train, test)
        except UsageError as error:
            if self.args.knn_data is not None:
                raise UsageError(f"--knn_data {escape(self.args.knn_data)}: {error}") from None
            return f"off, since there are no labelled images beside the training data ({error})"
        subset = self.args.subset if self._trains_on(paths[0]) else None  # what it may learn from is what it may know
        limits = [limit for limit in (subset, self.args.knn_per_class) if limit not in (None, ALL)]
        bank = SubsetSource(train, min(limits), fewer=True) if limits else train
        self.sets, self.labels = (bank, test), (labels_of(bank), query_labels)
        return ""

    def _paths(self) -> tuple[Place | None, Place | None]:
        """Of the bank and of the queries: in --knn_data, else in or beside the training images, else bundled."""
        root, data_path = self.args.knn_data, place_from(self.args)
        if root is None and data_path is None:
            return None, None
        if root is None and isinstance(data_path, str) and training_path(data_path) == data_path:
            return train_and_test_paths(os.path.dirname(os.path.abspath(data_path)), watched=True, listed=False)
        return train_and_test_paths(root or data_path, watched=True)

    def _trains_on(self, bank: Place | None) -> bool:
        trained = training_path(place_from(self.args), self.args.split)
        if not isinstance(bank, str) or not isinstance(trained, str):
            return bank == trained  # None: the bundled photographs
        return os.path.realpath(bank) == os.path.realpath(trained)

    def due(self, epoch: int) -> bool:
        """In the first epoch, every --knn_every epochs after it, and in the last, as the original has it."""
        return self.sets is not None and (epoch % self.args.knn_every == 0 or epoch + 1 == self.args.epochs)

    def __call__(self) -> dict[str, dict[str, float]]:
        """Top-1 and top-5 in percent for every number of neighbours, {} where no image can be read; the same on all
        processes.
        """
        tensors = []
        for part, (source, labels) in enumerate(zip(self.sets, self.labels, strict=True)):
            features, unreadable = self._extract(source)
            try:
                leave_out(source, unreadable, told=self.left_out[part])
            except UnreadableImages as error:
                self.sets, self.reason = None, f"off, since there is nothing left to test it on ({error})"
                log.warning("warning: online k-NN: %s", self.reason)
                return {}
            self.left_out[part] = unreadable
            tensors += [features, labels[readable(len(labels), unreadable)]]
        bank, device = Bank.of(tensors[1]), self.world.device if self.args.use_cuda else torch.device("cpu")
        tensors = [tensor.to(device) for tensor in tensors]
        accuracies = knn_classify(*tensors, self.args.nb_knn, self.temperature, world=self.world)
        for k, (top1, top5) in accuracies.items():
            values = f"top1 {top1:.2f}" + f", top5 {top5:.2f}" * (k > 1)
            log.info("online k-NN, k = %s: %s", k, values + remark_on_k(k, bank) + remark(self.unreadable))
        return as_numbers(accuracies, bank)

    @property
    def unreadable(self) -> dict[str, int]:
        """How many images of "train" (the bank) and "test" the last test did without; {} when it had all."""
        counts = dict(zip(("train", "test"), map(len, self.left_out), strict=True))
        return counts if any(counts.values()) else {}

    def _extract(self, source: Source) -> tuple[torch.Tensor, list[Unreadable]]:
        return extract_features(
            self.backbone,
            source,
            self.transform,
            world=self.world,
            batch_size=self.args.batch_size_per_gpu,
            num_workers=self.args.num_workers,
            device=self.world.device,
            feature=self._feature,
        )

    def _feature(self, model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
        images = images.to(next(model.parameters()).dtype)
        if self.feature.avgpool == MEAN:  # parity: a teacher in training keeps its final norm (AttMask main_attmask.py)
            return model.get_intermediate_layers(images, 1)[0][:, model.num_prefix_tokens :].mean(dim=1)
        return self.feature(model, images)
