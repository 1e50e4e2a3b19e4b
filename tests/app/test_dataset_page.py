"""The page of a data set: what the model sees of it, what it says twice, and what is known while a host still reads."""

import re
from typing import Any

from app.pages.token_drawing import MOST_TOKENS, MOST_WITH_IDS, NUM_OPEN, packed_row, shown_samples
from core.profile import AlikeRow, AlikeRows, Column, DataProfile, Duplicates, TokenPreview
from core.wire import ProfileResult
from tests.app.conftest import House
from tests.app.scene import ROW, FakeHost, connect_host, put_data
from tests.app.test_profiles import claim, facts, measure, orders, tell


def preview(
    line: int = 1, length: int = 6, *, is_trained: bool = True, num_hidden: int = 0, **more: Any
) -> TokenPreview:
    """<s> context ... answer <e>"""
    pieces = ("<s>", *(f" w{number}" for number in range(length - 2)), "<e>")
    mask = tuple(is_trained and number >= length // 2 for number in range(length))
    fields: dict[str, Any] = {
        "line": line,
        "pieces": pieces,
        "trained": mask,
        "ids": tuple(range(100, 100 + length)),
        "special": (True, *([False] * (length - 2)), True),
        "num_hidden": num_hidden,
        "num_trained": sum(mask),
        "num_turns": 1,
    }
    return TokenPreview(**(fields | more))


def page_of(house: House, profile: DataProfile, query: str = "") -> str:
    host = connect_host(house)
    put_data(house)
    house.api("bob").get("/api/v1/datasets/sums/profile?model=demo/tiny-llama")
    measure(host, ProfileResult(profile=profile))
    reply = house.browser("bob").get(f"/datasets/sums{query}")
    assert reply.status_code == 200
    return reply.text


def test_tokens_show_what_they_are_and_their_ids(house: House) -> None:
    page = page_of(house, facts(preview=(preview(line=3),)))
    assert "Line 3" in page and "6 tokens, 3 trained" in page
    assert '<b title="100: &#34;&lt;s&gt;&#34;">&lt;s&gt;</b>' in page
    assert '<span title="101: &#34; w0&#34;"> w0</span>' in page
    assert '<mark title="103: &#34; w2&#34;"> w2</mark>' in page
    assert '<mark class="special" title="105: &#34;&lt;e&gt;&#34;">&lt;e&gt;</mark>' in page


def test_the_parts_of_a_character_are_told_with_it() -> None:
    sample = preview(length=6, pieces=("<s>", "", "", "好", "", "<e>"), trained=(False,) * 4 + (True,) * 2)
    (shown,) = shown_samples([sample])
    assert [(run.text, run.title) for run in shown.runs] == [
        ("<s>", '100: "<s>"'),
        ("好", '101 + 102 + 103: "好"'),
        ("", '104: ""'),
        ("<e>", '105: "<e>"'),
    ]


def test_a_long_sample_is_short_on_the_page() -> None:
    (shown,) = shown_samples([preview(length=4000, num_hidden=1000)])
    titled = [run for run in shown.runs if run.title]
    assert len(titled) == MOST_WITH_IDS
    assert len(shown.runs) - len(titled) <= 2, "the rest in runs"
    assert "".join(run.text for run in shown.runs).count("w") == MOST_TOKENS - 1
    assert (shown.num_tokens, shown.num_hidden) == (5000, 5000 - MOST_TOKENS)


def test_twenty_long_samples_are_a_page_of_reasonable_size(house: House) -> None:
    page = page_of(house, facts(preview=tuple(preview(line=number, length=4096) for number in range(20))))
    assert page.count('<details class="sample" open>') == NUM_OPEN
    assert page.count('<details class="sample">') == 20 - NUM_OPEN
    assert len(page) < 1_000_000


def test_a_row_without_a_trained_token_says_why(house: House) -> None:
    silent = preview(line=9, is_trained=False, num_turns=0)
    empty = preview(line=10, is_trained=False, num_turns=1)
    page = page_of(house, facts(preview=(preview(), preview(), preview(), preview(), silent, empty)))
    assert page.count("nothing is trained") == 2
    assert "has weight 0" in page and "would be trained is empty" in page
    assert page.count('<details class="sample" open>') == NUM_OPEN + 2


def test_a_preview_of_an_earlier_release_is_shown_without_ids(house: House) -> None:
    old = TokenPreview(line=1, pieces=("1", "+", "1"), trained=(False, True, True))
    page = page_of(house, facts(preview=(old,)))
    assert "1<mark>+1</mark>" in page and "3 tokens, 2 trained" in page


def test_samples_lie_in_a_row_as_best_fit_packs_them(house: House) -> None:
    samples = [preview(line=1, length=30), preview(line=2, length=90), preview(line=3, length=60, is_trained=False)]
    row = packed_row(samples, 128)
    assert row is not None and row.num_free == 8
    assert [(sample.line, sample.start, sample.length) for sample in row.samples] == [(2, 0, 90), (1, 90, 30)]
    assert row.samples[0].offset == 0 and row.samples[1].offset == 90 / 128
    head = "".join(run.text for run in row.samples[0].head)
    tail = "".join(run.text for run in row.samples[0].tail)
    assert head.startswith("<s> w0") and tail.endswith("<e>")
    assert head.count("w") + tail.count("w") + 2 + row.samples[0].num_between == 90
    assert packed_row(samples, 100) is None, "no two share a row"
    assert packed_row([], 100) is None
    hidden = packed_row([preview(length=30, num_hidden=20), preview(length=6)], 64)
    assert hidden is not None and hidden.samples[0].tail == () and hidden.samples[0].num_between == 38
    page = page_of(house, facts(preview=tuple(samples)), "?max_length=128")
    assert page.count("position 0") == 2 and "90 tokens, at place 0 of the row" in page
    assert "line 1, 30 tokens, at place 90 of the row" in page


def test_duplicates_are_told_with_their_lines(house: House) -> None:
    rows = (
        AlikeRow(line=7, similarity=1, is_equal=True),
        AlikeRow(line=902, similarity=0.93, is_equal=False),
        AlikeRow(line=1200, similarity=1, is_equal=True),
    )
    groups = (AlikeRows(rows=rows, num_rows=5), AlikeRows(rows=rows[:2], num_rows=2))
    found = Duplicates(num_equal=3, num_alike=2, num_groups=4, groups=groups)
    none = Column([0] * 64)
    page = page_of(house, facts(duplicates=found, sample_group=none, sample_sketches=Column([0] * 128)))
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", page))
    assert "line 7, line 902 (about 93 % alike), line 1,200 (equal) and 2 more" in text
    assert "rows that say again what an earlier one says: 5" in text
    assert "the first 2 groups of 4" in text and "3 equal, about 2 nearly" in text


def test_a_job_that_measured_the_data_has_not_looked_for_duplicates(house: House) -> None:
    assert "a job measured this data" in page_of(house, facts())


def get(house: House, stage: str = "", *, is_swap: bool = True) -> str:
    headers = {"HX-Request": "true"} if is_swap else {}
    reply = house.browser("bob").get(f"/datasets/sums?stage={stage}", headers=headers)
    assert reply.status_code == 200
    return reply.text


def ordered(house: House) -> tuple[FakeHost, str]:
    host = connect_host(house)
    put_data(house, content=ROW * 9000)
    house.api("bob").get("/api/v1/datasets/sums/profile?model=demo/tiny-llama")
    (profile,) = orders(host)
    assert claim(host, profile) == 200
    return host, profile


def test_a_sample_comes_first_and_the_exact_numbers_without_a_reload(house: House) -> None:
    host, profile = ordered(house)
    page = get(house, is_swap=False)
    assert "Measuring …" in page and "stage=waiting" in page and "What the model sees" not in page
    assert "<hx-partial" not in get(house, "waiting"), "nothing new"

    assert tell(host, profile, 0.0, facts(100, preview=(preview(),))) == 200
    news = get(house, "waiting")
    assert news.count('<hx-partial hx-target="#measured"') == 1
    assert "from 100 of 9,000 rows" in news and "exact numbers follow" in news
    assert "<small>about</small> 9,000</dd>" in news, "samples, of the whole file"
    assert "As a sample of the rows has it" in news and "What the model sees" in news and "Duplicates" not in news
    assert tell(host, profile, 0.4) == 200
    progress = get(house, "sampled")
    assert "<hx-partial" not in progress and re.search(r'<progress max="1" value="0\.4"', progress)
    assert "What the model sees" not in progress, "what is shown already is not sent again"

    host.post(f"/profiles/{profile}/result", ProfileResult(profile=facts(9000, preview=(preview(),))))
    exact = get(house, "sampled")
    assert "<hx-partial" in exact and "hx-trigger" not in exact and "about</small>" not in exact
    assert "All of it is exact." in exact
    whole = get(house, is_swap=False)
    assert "exact numbers follow" not in whole and "<dd>9,000</dd>" in whole


def test_a_page_of_known_data_does_not_wait_for_another_tokenizer(house: House) -> None:
    host, profile = ordered(house)
    host.post(f"/profiles/{profile}/result", ProfileResult(profile=facts(9000)))
    house.api("bob").get("/api/v1/datasets/sums/profile?model=demo/tiny-llama&train_on=all")
    page = get(house, is_swap=False)
    assert "every 1s" not in page and "<dd>9,000</dd>" in page
