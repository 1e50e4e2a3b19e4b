"""What a job's page makes of its plan."""

from app.pages.job import weight_facts


def test_the_weights_are_told_by_what_becomes_of_them() -> None:
    plan = {
        "total_parameters": 1_412_224,
        "trainable_parameters": 149_504,
        "quantised_parameters": 737_280,
        "trainable_by_kind": {"q_proj": 16_384, "experts": 3_000},
        "weight_bytes": {"float32": 2_699_776, "nf4": 380_368},
    }
    facts = dict(weight_facts(plan))
    assert facts["parameters"] == "1,412,224" and facts["of them in 4 bits"] == "737,280"
    assert facts["trained by layer"] == "q_proj 16.4 k, experts 3,000"
    assert facts["memory of the weights"] == "2.57 MiB float32, 371 KiB nf4"


def test_an_older_trainers_plan_tells_what_it_knows() -> None:
    assert weight_facts({"total_parameters": 10, "trainable_parameters": 1}) == [
        ("parameters", "10"),
        ("of them trained", "1"),
    ]
    assert weight_facts({}) == []
