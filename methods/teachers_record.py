"""What tells early that a student of several frozen teachers is failing: how each of them fared in the epoch so far."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn as nn

from utils import all_gather_rows, all_reduce_sum, world_size

FEW = 64  # images, of which a share says little


class TeachersRecord(nn.Module):
    """Sums since an epoch began, for every teacher: images, how many of them it was the hardest of, what their class
    tokens cost, and what these would cost a student that always says zero.
    """

    def __init__(self, names: Sequence[str]):
        super().__init__()
        self.names, self.epoch = list(names), -1
        self.register_buffer("sums", torch.zeros(4, len(self.names), dtype=torch.float64), persistent=False)

    @torch.no_grad()
    def add(self, epoch: int, losses: torch.Tensor, silent: torch.Tensor) -> None:
        """``losses`` (teachers, class token and patches, batch); ``silent`` (teachers,), the mean over the images."""
        if epoch != self.epoch:
            self.epoch = epoch
            self.sums.zero_()
        teachers = torch.arange(len(self.names), device=losses.device)
        hits = (losses.mean(dim=1).argmax(dim=0) == teachers[:, None]).sum(dim=1)
        images = torch.full_like(silent, losses.shape[2])
        sums = torch.stack((images, hits, losses[:, 0].sum(dim=1), silent * images)).to(self.sums.dtype)
        self.sums += torch.where(sums.isfinite().all(), sums, torch.zeros_like(sums))  # a skipped step is not seen

    def measures(self) -> dict[str, torch.Tensor]:
        """``hardest_of_<t>``: share of the epoch's images; of few images it is held down, since it says little.
        ``relative_loss_of_<t>``: of class tokens, where 1 is what a student that says nothing has.
        """
        images, hits, costs, silent = all_reduce_sum(self.sums.clone())
        shares, relative = hits / images.clamp_min(FEW), costs / silent
        found = {f"relative_loss_of_{name}": value for name, value in zip(self.names, relative.unbind(), strict=True)}
        if len(self.names) > 1:
            found |= {f"hardest_of_{name}": value for name, value in zip(self.names, shares.unbind(), strict=True)}
        return found

    def epoch_state(self) -> dict:
        return {"epoch": self.epoch, "sums": all_gather_rows(self.sums[None])}

    def load_epoch_state(self, state: dict) -> None:
        """Each process goes on from its own sums; when their number has changed, each from its share."""
        if not state:  # files of before
            return
        self.epoch, sums = state["epoch"], state["sums"]
        own = len(sums) == world_size() > 1
        self.sums.copy_(sums[dist.get_rank()] if own else sums.sum(dim=0) / world_size())
