import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.engine.segments import BLOCK, Segments

CPU = torch.device("cpu")


def test_cuts_run_through_all_rows() -> None:
    segments = Segments(((3, 5), (8,), (1, 7)), CPU)
    assert segments.cumulative_lengths.tolist() == [0, 3, 8, 16, 17, 24]
    assert segments.cumulative_lengths.dtype == torch.int32 and segments.longest == 8


@st.composite
def rows_of_one_width(draw: st.DrawFn) -> tuple[tuple[int, ...], ...]:
    width = draw(st.integers(1, 5 * BLOCK))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        cuts = sorted(draw(st.sets(st.integers(1, width - 1), max_size=8))) if width > 1 else []
        rows.append(tuple(end - start for start, end in zip([0, *cuts], [*cuts, width], strict=True)))
    return tuple(rows)


@given(rows_of_one_width(), st.none() | st.integers(1, 3 * BLOCK))
@settings(max_examples=60, deadline=None)
def test_blocks_meet_where_a_pair_meets_and_are_whole_where_all_do(
    rows: tuple[tuple[int, ...], ...], window: int | None
) -> None:
    mask = Segments(rows, CPU).block_mask(window)
    width = sum(rows[0])
    number = torch.arange(width)
    of_sample = torch.stack([torch.repeat_interleave(torch.tensor(row)) for row in rows])
    sees = (of_sample[:, :, None] == of_sample[:, None]) & (number[:, None] >= number)
    if window is not None:
        sees &= number[:, None] - number < window
    by_formula = mask.mask_mod(torch.arange(len(rows))[:, None, None], torch.tensor(0), number[:, None], number[None])
    assert torch.equal(by_formula, sees)

    blocks = -(-width // BLOCK)
    padded = torch.zeros(len(rows), blocks * BLOCK, blocks * BLOCK, dtype=torch.bool)
    padded[:, :width, :width] = sees
    tiles = padded.view(len(rows), blocks, BLOCK, blocks, BLOCK).transpose(2, 3).flatten(3)
    taken = torch.zeros(2, *tiles.shape[:3], dtype=torch.bool)
    for kind, (counts, indices) in enumerate(
        ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices))
    ):
        for row in range(len(rows)):
            for block in range(blocks):
                chosen = indices[row, 0, block, : counts[row, 0, block]].long()
                taken[kind, row, block, chosen] = True
    assert torch.equal(taken[0] | taken[1], tiles.any(dim=-1)), "none is left out and none is visited for nothing"
    assert not (taken[0] & taken[1]).any()
    assert not (taken[1] & ~_seen_by_every_query(tiles, width)).any(), "a whole block needs no look at its pairs"


def _seen_by_every_query(tiles: torch.Tensor, width: int) -> torch.Tensor:
    """Queries behind the end of a row don't count."""
    blocks = tiles.shape[1]
    is_query = (torch.arange(blocks * BLOCK) < width).view(blocks, 1, BLOCK, 1).expand(-1, blocks, -1, BLOCK).flatten(2)
    return (tiles | ~is_query).all(dim=-1)
