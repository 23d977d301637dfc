import torch

from evaluation.network import untrained
from models.checkpoints import weights_hash


def test_untrained_networks_are_the_same_every_time_and_disturb_no_generator():
    state = torch.get_rng_state()
    first, second = (untrained("vit_micro", {"patch_size": 16}) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert weights_hash(first) == weights_hash(second)
    assert weights_hash(untrained("vit_micro", {"patch_size": 16}, seed=1)) != weights_hash(first)
