"""Methods: what a student learns, and from whom. ``METHODS`` is the registry; a new method is one line here."""

from methods.attmask import AttMask
from methods.base import Method
from methods.dino import DINO
from methods.esvit import EsViT
from methods.ibot import IBOT
from methods.mugs import Mugs
from methods.udi import UDI
from methods.unic import UNIC
from utils import UsageError, nearest

METHODS: dict[str, type[Method]] = {method.name: method for method in (DINO, IBOT, AttMask, UDI, UNIC, EsViT, Mugs)}


def method_class(name: str) -> type[Method]:
    """The method of that name. Raises UsageError for an unknown one."""
    if name not in METHODS:
        raise UsageError(f"--method {name}: unknown method{nearest(name, METHODS)}; there are {', '.join(METHODS)}")
    return METHODS[name]
