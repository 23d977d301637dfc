"""Do the teacher's prototypes become classes? Agreement of every image's prototype with its label, epoch by epoch.

The original of iBOT and AttMask logs it as nmi, ari, fscore, and adjacc, which it leaves at -1.
"""

import numpy as np
import torch

from evaluation.clustering import adjusted_rand_index, contingency, fowlkes_mallows, normalized_mutual_information
from utils import World, all_gather_rows, all_reduce_sum, log


class PseudoLabels:
    """Collects what ``Method.pseudo_labels`` returns; nothing where labels are unknown or the method has none."""

    def __init__(self, labels: np.ndarray, world: World):
        self.labels, self.world = labels, world
        self.known = bool((np.asarray(labels) >= 0).all())
        self._pieces: list[torch.Tensor] = []  # of this process
        self._gathered: list[torch.Tensor] = []  # of all processes, (images, 2)

    def add(self, indices: torch.Tensor, predictions: torch.Tensor | None) -> None:
        """Images of a piece and their prototypes, both (batch,). Neither is looked at before the epoch's end."""
        if self.known and predictions is not None:
            # a copy: what a loading process sent keeps a file open as long as it lives
            pairs = (indices.to(self.world.device, non_blocking=True), predictions)
            self._pieces.append(torch.stack(pairs, dim=1))

    def end_epoch(self) -> dict[str, float]:
        """The measures over all images that were added on any process, the same on all; {} when there were none."""
        seen = self._gather()
        self._gathered.clear()
        if seen is None:
            return {}
        values = torch.zeros(3, dtype=torch.float64)
        if self.world.rank == 0:
            indices, predictions = seen.cpu().numpy().T
            table = contingency(np.asarray(self.labels)[indices], predictions)
            measures = (normalized_mutual_information, adjusted_rand_index, fowlkes_mallows)
            values = torch.tensor([measure(table) for measure in measures], dtype=torch.float64)
        nmi, ari, fscore = all_reduce_sum(values.to(self.world.device)).tolist()
        log.info("NMI: %s, ARI: %s, F: %s, ACC: -1", nmi, ari, fscore)
        return {"nmi": nmi, "ari": ari, "fscore": fscore, "adjacc": -1.0}

    def _gather(self) -> torch.Tensor | None:
        """Everything that was added in this epoch on any process, (images, 2); every one of them has added as many."""
        if self._pieces:
            self._gathered.append(all_gather_rows(torch.cat(self._pieces)))
            self._pieces.clear()
        if not self._gathered:
            return None
        self._gathered = [torch.cat(self._gathered)]
        return self._gathered[0]

    # ---- continuing -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What the unfinished epoch has gathered. All processes take part."""
        seen = self._gather()
        return {} if seen is None else {"seen": seen.int()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        if self.known and "seen" in state:
            self._gathered = [state["seen"].to(self.world.device).long()]
