"""Products without autograd, in every form that a size or a memory layout may choose, against float64."""

import pytest
import torch

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
