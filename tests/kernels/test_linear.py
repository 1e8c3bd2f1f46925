"""Products without autograd, in every form that a size or a memory layout may choose, against float64."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modelspec.kernels.linear import matmul_nt, matmul_tn


@pytest.mark.parametrize("rows", [0, 1, 33, 1023, 1024, 1500])
def test_weight_gradient_is_the_transposed_product(rows: int) -> None:
    grad, x = torch.randn(rows, 5), torch.randn(rows, 7)
    torch.testing.assert_close(matmul_tn(grad, x), (grad.double().T @ x.double()).float(), rtol=1e-5, atol=1e-4)


def test_weight_gradient_of_views_is_the_transposed_product() -> None:
    grad, x = torch.randn(1100, 9)[:, 2:7], torch.randn(7, 1100).T
    torch.testing.assert_close(matmul_tn(grad, x), (grad.double().T @ x.double()).float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", [0, 1, 33])
@pytest.mark.parametrize("transposed", [False, True])
def test_product_reads_a_weight_where_it_lies(rows: int, transposed: bool) -> None:
    x, weight = torch.randn(rows, 7), torch.randn(7, 5).T if transposed else torch.randn(5, 7)
    torch.testing.assert_close(matmul_nt(x, weight), (x.double() @ weight.double().T).float(), rtol=1e-5, atol=1e-5)


class Weights(TorchDispatchMode):
    """The weights that oneDNN's product is given while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.mkldnn._linear_pointwise.default:
            self.seen.append(args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_onednn_never_gets_a_weight_with_gaps_which_it_multiplies_a_thousand_times_slower() -> None:
    x, wide = torch.randn(33, 7), torch.randn(5, 9)
    with Weights() as weights:
        product = matmul_nt(x, wide[:, :7])
        gradient = matmul_tn(torch.randn(33, 5), torch.randn(33, 9)[:, 2:])
    torch.testing.assert_close(product, (x.double() @ wide[:, :7].double().T).float(), rtol=1e-5, atol=1e-5)
    assert gradient.shape == (5, 7) and len(weights.seen) == 2
    assert all(weight.is_contiguous() or weight.T.is_contiguous() for weight in weights.seen)
