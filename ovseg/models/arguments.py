"""Arguments of the methods of a model, looked at before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..dense import FLOATS, check_dense
from ..errors import InputError

if TYPE_CHECKING:
    from .base import OVSegModel


def check_model(model: Any) -> None:
    """Check that it is a system, whatever wraps it."""
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "encode_image"):
        raise InputError(f"model is a {type(model).__name__}; expected a model of create_model or from_pretrained")


def check_name(argument: str, value: Any) -> None:
    """A name or a path of a model or of weights."""
    if not isinstance(value, str | Path):
        raise InputError(f"{argument} is a {type(value).__name__}; expected a name or a path")


def check_device(device: Any) -> torch.device:
    """Return the device, if it is one that ``torch.device`` takes.

    Raises:
        InputError: for anything else, a tensor among it, which ``Module.to`` would take for its dtype.
    """
    if isinstance(device, str | int | torch.device) and not isinstance(device, bool):
        try:
            return torch.device(device)
        except RuntimeError as error:
            raise InputError(f"device is {device!r}; expected cpu, cuda, cuda:1, ...") from error
    raise InputError(f"device is a {type(device).__name__}; expected a device such as 'cpu'")


def check_images(images: Any, model: OVSegModel) -> None:
    """Check that ``images`` are what ``model.normalize`` gives."""
    check_dense("images", images, "[B, 3, H, W]", meta=True)
    if images.dim() != 4 or images.shape[1] != 3:
        raise InputError(f"images has shape {list(images.shape)}; expected [B, 3, H, W]")
    if images.dtype not in FLOATS:
        raise InputError(f"images has dtype {images.dtype}; expected floats from model.normalize")
    _one_device("images", images, next(model.parameters()))


def check_pixels(pixels: Any) -> None:
    """RGB [B, 3, H, W], or without B; uint8 or floats."""
    check_dense("pixels", pixels, "[B, 3, H, W]", meta=True)
    if pixels.dim() < 3 or pixels.shape[-3] != 3:
        raise InputError(f"pixels has shape {list(pixels.shape)}; expected [B, 3, H, W]")
    if pixels.dtype not in (*FLOATS, torch.uint8):
        raise InputError(f"pixels has dtype {pixels.dtype}; expected uint8 or floats in 0..1")


def check_ids(token_ids: Any, model: OVSegModel) -> None:
    """Ids of a tokenizer, [T, L], on the CPU or where the model is."""
    check_dense("token_ids", token_ids, "[T, L], from model.tokenizer", meta=next(model.parameters()).device.type == "meta")
    if token_ids.dim() != 2 or token_ids.dtype not in (torch.int64, torch.int32):
        raise InputError(f"token_ids is {token_ids.dtype} of shape {list(token_ids.shape)}; expected int64 [T, L], from model.tokenizer")


def check_compared(images: Any, texts: Any, features: Any, *, encoded: bool = False) -> None:
    """Images, or only what was ``encoded`` of them, the type ``features``; and the texts [T, E] that they are compared with."""
    if encoded and not isinstance(images, features):
        raise InputError(f"features is a {type(images).__name__}; expected what model.encode_image gives")
    if not isinstance(images, torch.Tensor | features):
        raise InputError(f"images is a {type(images).__name__}; expected a tensor [B, 3, H, W] or what model.encode_image gives")
    check_dense("texts", texts, "[T, E], from model.encode_labels", meta=True)
    if texts.dim() != 2 or texts.dtype not in FLOATS:
        raise InputError(f"texts is {texts.dtype} of shape {list(texts.shape)}; expected floats [T, E], from model.encode_labels")
    if not isinstance(images, torch.Tensor):
        _one_device("texts", texts, images.tokens)


def _one_device(name: str, x: torch.Tensor, other: torch.Tensor) -> None:
    if x.device.type != other.device.type:
        raise InputError(f"{name} is on {x.device} and what it meets on {other.device}; expected one device")
