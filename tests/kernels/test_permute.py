"""Sums of bags."""

import torch

from moesaic.kernels.permute import sum_bags


def test_bags_of_uneven_size_by_hand() -> None:
    y = torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0], [8.0, 80.0]])
    # Bags 3 0 | none | 2, and row 1 as padding behind the last.
    got = sum_bags(y, torch.tensor([3, 0, 2, 1]), torch.tensor([0, 2, 2, 3]))
    assert got.tolist() == [[9, 90], [0, 0], [4, 40]]
    assert not got._is_view()  # the experts return it, and FSDP2 warns of modules that return a view
    assert sum_bags(y, torch.tensor([[0, 1], [2, 3]]), None).tolist() == [[3, 30], [12, 120]]
    assert sum_bags(y[:0], torch.zeros(0, dtype=torch.int64), torch.tensor([0, 0])).tolist() == [[0, 0]]
