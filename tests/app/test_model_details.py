"""What the panel says of a model."""

from app.pages.model_details import model_details
from tests.app.conftest import House
from tests.app.scene import MODEL, connect_host, put_data
from tests.app.test_pages import filled
from tests.app.test_profiles import measure
from tests.core.shapes import llama

SHAPE = llama(hidden=64, layers=2, heads=4, key_value_heads=2, intermediate=128, vocabulary=256)


def test_parameters_are_told_by_kind_and_their_shares_are_all_of_them() -> None:
    details = model_details(MODEL.model_copy(update={"shape": SHAPE}), None)
    assert [part.title for part in details.parts] == ["embedding", "attention", "MLP", "norms", "head"]
    assert sum(part.num_parameters for part in details.parts) == SHAPE.parameters.total
    assert abs(sum(float(part.share.removesuffix(" %").removesuffix("\xa0%")) for part in details.parts) - 100) < 0.5
    assert model_details(MODEL, None).parts == (), "measured by a release of before"


def test_the_panel_says_what_the_model_is_and_that_a_licence_is_unknown(house: House) -> None:
    host = connect_host(house)
    put_data(house)
    browser = house.browser("bob")

    def panel(**changed: str) -> str:
        sent = filled(browser, **{key.replace("__", "."): value for key, value in changed.items()})
        return browser.post("/jobs/preflight", data=sent, headers={"HX-Request": "true"}).text

    waiting = panel()
    assert "The model: demo/tiny-llama" in waiting, "which is known before the data is"
    measure(host)
    shown = panel()
    assert "LlamaForCausalLM" in shown and "4,096 tokens" in shown
    assert "unknown: neither its model card nor its config names one" in shown
    assert "the model&#39;s own" in shown or "the model's own" in shown
    assert "chatml, built in, as the job asks" in panel(model__chat_template="chatml")
