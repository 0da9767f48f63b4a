"""One copy for all tensors of a dataclass, here from host to host; the GPU pack has the real one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from skyrl_spec.models.pack import Pack, pack_documents
from skyrl_spec.models.upload import copied, upload

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Item:
    pack: Pack
    flags: Tensor
    parts: tuple[Tensor, ...]
    nothing: Tensor | None
    rows: tuple[int, ...]


def make_item() -> Item:
    pack = pack_documents(np.arange(7), np.arange(7) > 2, [3, 4])
    parts = (torch.zeros(0), torch.arange(6, dtype=torch.int32).view(2, 3), torch.tensor(2.5, dtype=torch.float64))
    # Contiguous, with a stride of 0.
    parts += (torch.tensor(7).expand(1),)
    # Three bytes, so that the next tensor does not begin where this one ends.
    return Item(pack, torch.tensor([True, False, True]), parts, None, (4, 5))


def test_every_tensor_arrives_with_its_dtype_and_shape() -> None:
    item = make_item()
    copy = copied(item, CPU)
    assert (copy.nothing, copy.rows, copy.pack.documents.lengths) == (None, (4, 5), (3, 4))
    pairs = [(getattr(copy.pack, name), getattr(item.pack, name)) for name in ("token_ids_T", "position_T")]
    pairs += [(copy.pack.loss_mask_T, item.pack.loss_mask_T), (copy.pack.segment_ids_T, item.pack.segment_ids_T)]
    pairs += [(copy.pack.documents.start_N, item.pack.documents.start_N), (copy.flags, item.flags)]
    pairs += list(zip(copy.parts, item.parts, strict=True))
    for mine, theirs in pairs:
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        assert torch.equal(mine, theirs)
    filled = [mine for mine, _ in pairs if mine.numel()]
    assert len({mine.untyped_storage().data_ptr() for mine in filled}) == 1, "more than one copy"


def test_nothing_is_copied_on_a_cpu() -> None:
    item = make_item()
    assert upload(item, CPU) is item
