import pytest

from core.errors import UserError
from core.hub import HubDataset, parse_hub_dataset


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hf:org/set", HubDataset("org/set", None, "train", None)),
        ("hf:org/set:test_sft", HubDataset("org/set", None, "test_sft", None)),
        ("hf:Org-1/the.set/en:test@v1.0", HubDataset("Org-1/the.set", "en", "test", "v1.0")),
        ("hf:org/set@refs/convert/parquet", HubDataset("org/set", None, "train", "refs/convert/parquet")),
        ("demo-dialogues", None),
        ("folder/hf:set.jsonl", None),
    ],
)
def test_a_hubs_data_set_is_named_by_its_parts(name: str, expected: HubDataset | None) -> None:
    assert parse_hub_dataset(name) == expected


@pytest.mark.parametrize(
    "name", ["hf:", "hf:set", "hf:org/", "hf:org/set/en/more", "hf:../set", "hf:org/set:", "hf:o g/s"]
)
def test_what_names_none_says_how_one_is_named(name: str) -> None:
    with pytest.raises(UserError, match="write hf:ORG/NAME") as caught:
        parse_hub_dataset(name, "data.train.0.dataset")
    assert (caught.value.code, caught.value.field) == ("hub.bad_name", "data.train.0.dataset")
