import torch

from utils import UsageError


class CheckpointError(UsageError):
    pass


def load_file(path):
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as e:
        raise CheckpointError(f"{path}: damaged {type(e).__name__}")
