"""A training checkpoint of a small student of UNIC."""

import torch

from models import build_backbone
from models.ladder import Ladder

HEADS = {"timm/b.c": 5, "a": 7}


def student_file(path, heads=HEADS, hidden=(0, 2), **changed):
    """A training checkpoint of a small student; ``changed``: top-level keys, tensors of the model; None takes away."""
    torch.manual_seed(0)
    encoder = build_backbone("vit_micro", patch_size=8, img_size=16)
    ladder = Ladder(128, heads, dict.fromkeys(hidden, 6), midnorm=True)
    model = {f"module.encoder.{name}": value for name, value in encoder.state_dict().items()}
    model |= {f"module.lp.{name}": torch.randn_like(value) for name, value in ladder.state_dict().items()}
    statistics = {
        name: {
            kind: {"mean": torch.randn(*(1,) * dims, width), "std": torch.rand(*(1,) * dims, width)}
            for kind, dims in (("cls", 1), ("patch", 2))
        }
        for name, width in heads.items()
    }
    file = {"model": model, "teacher_ft_stats": statistics, "epoch": 1}
    for key, value in changed.items():
        part = model if key.startswith("module.") else file
        part[key] = value
        if value is None:
            del part[key]
    torch.save(file, path / "unic.pth")
    return file
