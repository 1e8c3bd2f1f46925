"""Tokens to their experts and back on a GPU: the order of rows, what is copied, and what is summed."""

import torch
from torch import Tensor

from modelspec.kernels.permute import permute, permute_scales, unpermute
from modelspec.kernels.quantize import quantize
from modelspec.kernels.sort_by_expert import sort_by_expert

# Tokens, experts of a token, experts, width.
SMALL = ((7, 2, 4, 40), (150, 3, 5, 130))
LARGE = ((8192, 8, 256, 7168), (1000, 1, 3, 2112), (4096, 6, 512, 1536))


def chosen(tokens: int, k: int, num: int, device: torch.device) -> Tensor:
    """k different experts of `num` for each token, none the last but one."""
    scores = torch.rand(tokens, num, device=device)
    scores[:, -2] = -1
    return scores.topk(k).indices


def test_pairs_are_sorted_by_expert_and_then_by_token(device: torch.device, large: bool) -> None:
    for tokens, k, num, _ in LARGE if large else SMALL:
        choices = chosen(tokens, k, num, device), torch.full((tokens, 1), num - 1, device=device)
        for choice in choices:
            pairs = sort_by_expert(choice, num)
            order = choice.flatten().cpu().argsort(stable=True)
            assert torch.equal(pairs.token.cpu().long(), order // choice.shape[1]), (tokens, k, num)
            assert torch.equal(pairs.row.flatten().cpu().long()[order], torch.arange(len(order))), (tokens, k, num)
            counts = choice.flatten().cpu().bincount(minlength=num)
            assert torch.equal(pairs.ends.cpu().long(), counts.cumsum(0)), (tokens, k, num)


def test_rows_are_copied_and_summed_as_defined(device: torch.device, large: bool) -> None:
    for tokens, k, num, width in LARGE if large else SMALL:
        row = sort_by_expert(chosen(tokens, k, num, device), num).row
        x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
        weights = torch.rand(tokens, k, device=device)
        assert torch.equal(permute(x, row), permute.reference(x, row))
        rows = permute(x, row, weights)
        assert torch.equal(rows, permute.reference(x, row, weights))
        for given in (None, weights):
            ours, theirs = unpermute(rows, row, given), unpermute.reference(rows, row, given)
            torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-3)
            assert torch.equal(ours, unpermute(rows, row, given)), "not the same a second time"


def test_rows_in_fp8_keep_their_bytes_and_scales(device: torch.device, large: bool) -> None:
    for tokens, k, num, width in LARGE if large else SMALL:
        pairs = sort_by_expert(chosen(tokens, k, num, device), num)
        q, scales = quantize(torch.randn(tokens, width, device=device, dtype=torch.bfloat16), False)
        rows = permute(q, pairs.row)
        assert torch.equal(rows.view(torch.uint8), q.view(torch.uint8)[pairs.token]), (tokens, width)
        assert torch.equal(permute_scales(scales, pairs.token), scales[pairs.token]), (tokens, width)
