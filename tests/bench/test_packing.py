import numpy as np
import pytest

from bench import packing
from bench.packing import Lengths, pack_ours


def test_what_is_too_long_is_dropped_and_the_rest_is_packed_near_the_bound(capsys: pytest.CaptureFixture[str]) -> None:
    packing.main(["--counts", "2000", "--without-peers"])
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if "Pegbox" in line]
    assert len(rows) == 4 and {row[2] for row in rows} == {"2,000"}
    by_name = {row[0]: row for row in rows}
    assert by_name["chat, some too long"][8].endswith("dropped")
    assert by_name["chat"][8] == "none"
    assert all(1.0 <= float(row[6]) < 1.01 for row in rows)


def test_every_sample_that_fits_has_a_place() -> None:
    packed = pack_ours(Lengths("given", 10, np.array([3, 10, 11, 7, 7, 3])))
    assert (packed.rows, packed.samples, packed.tokens) == (3, 5, 30)
