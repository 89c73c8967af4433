"""Values that blocks leave for later ones follow the samples."""

from __future__ import annotations

import pytest
import torch

from auto_round.calibrate.front import Walk
from auto_round.calibrate.handed import Left
from auto_round.errors import SourceError

CPU = torch.device("cpu")
SETTINGS = Walk(batch_size=2, quantised_inputs=True, device=CPU, dtype=torch.float32, store=CPU)


def left() -> Left:
    """Keys and values of four samples, those of sample i being i and -i, left in two batches."""
    found = Left("left", 4, SETTINGS)
    for rows in (torch.tensor([2, 0]), torch.tensor([1, 3])):
        handed = found.view(rows)
        assert "full" not in handed or rows[0] == 1
        handed["full"] = (rows.float()[:, None].expand(-1, 5), -rows.float())
        found.keep(handed)
    return found


def test_a_later_block_reads_what_was_left_for_its_samples() -> None:
    handed = left().view(torch.tensor([3, 2]))
    assert "full" in handed
    keys, values = handed["full"]
    assert torch.equal(keys, torch.tensor([3.0, 2.0])[:, None].expand(-1, 5))
    assert torch.equal(values, torch.tensor([-3.0, -2.0]))
    with pytest.raises(KeyError, match="sliding"):
        handed["sliding"]


def test_what_cannot_follow_the_samples_is_refused() -> None:
    found = left()
    handed = found.view(torch.tensor([0, 1]))
    handed["full"] = tuple(2 * part for part in handed["full"])  # tuning would run the block on its own result
    with pytest.raises(SourceError, match="'full'"):
        found.keep(handed)
    for value in ((torch.zeros(3, 5),), torch.zeros(2), ("text",)):
        handed = found.view(torch.tensor([0, 1]))
        handed["other"] = value
        with pytest.raises(SourceError, match="'other'"):
            found.keep(handed)
