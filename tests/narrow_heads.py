"""main_pretrain.py with heads of Mugs that are 16 wide instead of 2048, so that a checkpoint is small.

As a module it is what ``tests.launch.start`` may run in its place.
"""

from methods.heads import ContrastiveHead, DINOHead

WIDTHS = {ContrastiveHead: {2048: 16, 4096: 24}, DINOHead: {2048: 16}}


def defaults(kind: type) -> tuple:
    return tuple(WIDTHS[kind].get(value, value) for value in kind.__init__.__defaults__)


def narrow(monkeypatch) -> None:
    for kind in WIDTHS:
        monkeypatch.setattr(kind.__init__, "__defaults__", defaults(kind))


if __name__ == "__main__":
    import main_pretrain
    from utils import run_cli

    for kind in WIDTHS:
        kind.__init__.__defaults__ = defaults(kind)
    run_cli(main_pretrain.main)
