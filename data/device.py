"""Pieces of batches on the device: the next one is copied while the present one is worked on, and images normalised."""

from collections.abc import Callable, Iterable, Iterator

import torch

from data.preprocess import MEAN, STD
from utils import to_device


def to_device_ahead(pieces: Iterable[dict], device: torch.device, dtype: torch.dtype = torch.float32) -> Iterator[dict]:
    """The same pieces with tensors on ``device`` and uint8 images normalised; these and all crops in ``dtype``.

    On a GPU the next piece is copied and normalised on a stream of its own while the present one is worked on.
    """
    if torch.device(device).type != "cuda":
        constants = _constants(device, dtype)
        for piece in pieces:
            yield _sent(piece, device, dtype, constants)
        return
    side, main = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(side):
        constants = _constants(device, dtype)  # nothing but this stream ever reads them

    def send(piece: dict) -> dict:
        with torch.cuda.stream(side):
            return _sent(piece, device, dtype, constants)

    ahead = None
    for piece in pieces:
        sent = send(piece)
        if ahead is not None:
            yield ahead
        main.wait_stream(side)
        ahead = _map_tensors(sent, lambda tensor: _used_on(tensor, main))
    if ahead is not None:
        yield ahead


Constants = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # white, mean, deviation


def normalise(
    images: torch.Tensor, dtype: torch.dtype = torch.float32, constants: Constants | None = None
) -> torch.Tensor:
    """(batch, 3, height, width) uint8 -> zero mean and unit variance over ImageNet.

    parity: (x / 255 - mean) / std in this order, in float32 (float64 for that dtype), as ToTensor and Normalize.
    """
    white, mean, std = _constants(images.device, dtype) if constants is None else constants
    return images.to(white.dtype).div_(white).sub_(mean).div_(std).to(dtype)


def _constants(device: torch.device, dtype: torch.dtype) -> Constants:
    """Tensors on the device: by a Python number, a GPU would multiply with the reciprocal, which is not the same."""
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    white, mean, std = (to_device(torch.tensor(value, dtype=precision), device) for value in (255.0, MEAN, STD))
    return white, mean.view(3, 1, 1), std.view(3, 1, 1)


def _sent(piece: dict, device: torch.device, dtype: torch.dtype, constants: Constants) -> dict:
    piece = _map_tensors(piece, lambda tensor: _prepare(tensor, device, dtype, constants))
    if "crops" in piece:  # a recipe may make them normalised, in float32
        piece["crops"] = [crop.to(dtype) for crop in piece["crops"]]
    return piece


def _prepare(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype, constants: Constants) -> torch.Tensor:
    tensor = tensor.to(device, non_blocking=True)
    is_image = tensor.dtype == torch.uint8 and tensor.ndim == 4 and tensor.shape[1] == 3
    return normalise(tensor, dtype, constants) if is_image else tensor


def _used_on(tensor: torch.Tensor, stream: "torch.cuda.Stream") -> torch.Tensor:
    tensor.record_stream(stream)
    return tensor


def _map_tensors(value, function: Callable):
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: _map_tensors(part, function) for name, part in value.items()}
    if isinstance(value, list):
        return [_map_tensors(part, function) for part in value]
    return value
