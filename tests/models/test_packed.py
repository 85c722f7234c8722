"""Packed linear layers compute what plain ones do, and a row of theirs does not depend on its neighbours."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from capfilt.models.packed import Activation, PackedLinear, activated, pack_linears, packed_copy
from capfilt.models.vit import VisionTransformer, ViTConfig

SIZES = [(32, 96), (768, 2304), (768, 3072), (3072, 768), (768, 256), (768, 2)]
ACTIVATIONS: list[Activation] = ["gelu", "silu"]


def needs_packing(dtype: torch.dtype) -> None:
    layer = nn.Sequential(nn.Linear(8, 8, dtype=dtype)).requires_grad_(False)
    pack_linears(layer)
    if not isinstance(layer[0], PackedLinear):
        pytest.skip(f"this CPU or torch has no packed {dtype} layers")


def draw_layer(inputs: int, outputs: int, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(inputs + outputs)
    return nn.Linear(inputs, outputs).to(dtype).requires_grad_(False)


@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_in_float32_packed_is_plain(inputs: int, outputs: int) -> None:
    needs_packing(torch.float32)
    layer = draw_layer(inputs, outputs)
    packed, x = PackedLinear(layer), torch.randn(3, 5, inputs)
    expected = (x.double() @ layer.weight.double().T + layer.bias.double()).float()
    torch.testing.assert_close(packed(x), expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(packed(x[:, 2]), expected[:, 2], atol=2e-5, rtol=0, msg="rows with gaps between them")
    torch.testing.assert_close(packed.activated(x, "gelu"), F.gelu(expected), atol=2e-5, rtol=0)
    torch.testing.assert_close(packed.activated(x, "silu"), F.silu(expected), atol=2e-5, rtol=0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_in_bfloat16_packed_is_as_exact_as_the_format(activation: Activation) -> None:
    needs_packing(torch.bfloat16)
    layer, x = draw_layer(768, 3072, torch.bfloat16), torch.randn(7, 768, dtype=torch.bfloat16)
    exact = {"gelu": F.gelu, "silu": F.silu}[activation](x.double() @ layer.weight.double().T + layer.bias.double())
    for found in (activated(PackedLinear(layer), x, activation), activated(layer, x, activation)):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), exact, atol=0.02, rtol=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_a_row_is_the_same_among_any_others(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    needs_packing(dtype)
    packed, x = PackedLinear(draw_layer(inputs, outputs, dtype)), torch.randn(90, inputs).to(dtype)
    plain, active = packed(x), {name: packed.activated(x, name) for name in ACTIVATIONS}
    for num_rows in (*range(2, 20), 31, 64, 80):
        for start in (0, 7):
            rows = slice(start, start + num_rows)
            assert torch.equal(packed(x[rows]), plain[rows])
            for name in ACTIVATIONS:
                assert torch.equal(packed.activated(x[rows], name), active[name][rows])


def test_every_linear_layer_inside_is_replaced_and_others_are_not() -> None:
    needs_packing(torch.float32)

    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4, bias=False)]), nn.LayerNorm(4), Special(4, 4))
    pack_linears(model.requires_grad_(False))
    assert [type(part).__name__ for part in model.modules()][1:] == [
        "PackedLinear", "ModuleList", "PackedLinear", "LayerNorm", "Special",
    ]  # fmt: skip


def test_half_precision_stays_plain() -> None:
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.float16)).requires_grad_(False)
    pack_linears(model)
    assert type(model[0]) is nn.Linear


@torch.no_grad()
def test_a_packed_copy_computes_alike_and_leaves_the_module_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_packing(torch.float32)
    monkeypatch.setattr("capfilt.models.packed.has_avx512", lambda: True)
    config = ViTConfig(image_size_px=16, patch_size_px=8, width=32, depth=2, num_heads=2, mlp_width=64)
    vision = VisionTransformer(config).eval().requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in vision.state_dict().items()}
    packed, images = packed_copy(vision), torch.randn(3, 3, 16, 16)
    assert not any(type(part) is nn.Linear for part in packed.modules())
    assert not any(isinstance(part, PackedLinear) for part in vision.modules())
    torch.testing.assert_close(packed(images), vision(images), atol=1e-5, rtol=0)
    after = vision.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    shared = {tensor.data_ptr() for tensor in packed.state_dict().values()}
    assert shared <= {tensor.data_ptr() for tensor in after.values()}
    assert shared
    monkeypatch.setattr("capfilt.models.packed.has_avx512", lambda: False)
    assert packed_copy(vision) is vision, "where packed layers are slower"


def test_activations_have_gradients() -> None:
    layer, x = nn.Linear(8, 6), torch.randn(3, 8, requires_grad=True)
    for name, plain in (("gelu", F.gelu), ("silu", F.silu)):
        found, expected = (
            torch.autograd.grad(y.square().sum(), x)[0] for y in (activated(layer, x, name), plain(layer(x)))
        )
        torch.testing.assert_close(found, expected)
