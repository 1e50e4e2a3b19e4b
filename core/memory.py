"""Bytes per GPU as a sum of named terms."""

from typing import Literal

OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]


def optimizer_state_bytes(num_values: int, name: OptimizerName) -> int:
    """On the device, of one tensor: two moments in fp32, or in 8 bits with an fp32 scale for every 256 values."""
    if name == "adamw" or num_values < 4096:
        return 8 * num_values
    scales = 2 * 4 * -(-num_values // 256)
    is_paged = name == "paged_adamw_8bit" and num_values >= 100_000
    return scales if is_paged else 2 * num_values + scales
