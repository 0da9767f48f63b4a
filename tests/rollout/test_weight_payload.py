from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from skyrl_spec.sync.payload import pack_chunks, pack_weights, payload_bytes, unpack_weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip_keeps_every_bit_and_copies_nothing(dtype: torch.dtype) -> None:
    weight = torch.randn(3, 5).to(dtype)
    payload = pack_weights([("a", weight), ("b", weight[1])])
    (_, a), (_, b) = unpack_weights(**payload)
    assert a.dtype == dtype
    assert torch.equal(a, weight)
    assert torch.equal(b, weight[1])
    assert a.data_ptr() == weight.data_ptr()
    assert payload_bytes(payload) == 20 * weight.element_size()


def test_parameters_and_transposed_tensors_are_packed() -> None:
    parameter = torch.nn.Parameter(torch.randn(3, 5))
    ((_, tensor),) = unpack_weights(**pack_weights([("a", parameter.t())]))
    assert torch.equal(tensor, parameter.t())


def test_a_scalar_travels() -> None:
    ((_, tensor),) = unpack_weights(**pack_weights([("scale", torch.tensor(2.5, dtype=torch.bfloat16))]))
    assert tensor.shape == ()
    assert tensor == 2.5


def test_read_only_arrays_are_read_without_a_warning() -> None:
    payload = pack_weights([("a", torch.ones(4))])
    payload["arrays"][0].flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ((_, tensor),) = unpack_weights(**payload)
    assert torch.equal(tensor, torch.ones(4))


def test_chunks_are_bounded_and_complete() -> None:
    weights = [(f"w{index}", torch.full((size,), float(index))) for index, size in enumerate([2, 2, 2, 9, 1, 1])]
    chunks = list(pack_chunks(iter(weights), max_bytes=16))
    assert [chunk["names"] for chunk in chunks] == [["w0", "w1"], ["w2"], ["w3"], ["w4", "w5"]]


def test_bad_payloads_are_refused() -> None:
    with pytest.raises(ValueError, match=r"w: cannot send torch\.int64"):
        pack_weights([("w", torch.ones(2, dtype=torch.int64))])
    payload = pack_weights([("w", torch.ones(2, 3))])
    with pytest.raises(ValueError, match="w: unknown dtype 'float8'"):
        unpack_weights(**payload | {"dtype_names": ["float8"]})
    with pytest.raises(ValueError, match="one length"):
        unpack_weights(**payload | {"names": []})
    with pytest.raises(ValueError, match=r"w: announced with shape \[2, 3\], but its array has \[6\]"):
        unpack_weights(**payload | {"arrays": [np.ones(6, dtype=np.float32)]})
