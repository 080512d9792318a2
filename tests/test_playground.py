"""The playground in real Chromium, over a real generator."""

import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import uvicorn
from safetensors.numpy import load_file

from serve.api import Access, build_api
from serve.ids import Ids

pytestmark = pytest.mark.browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
SAMPLE = Path(__file__).parents[1] / "serve" / "static" / "samples" / "digits-five.png"


@pytest.fixture(scope="module")
def url(backend, port, tmp_path_factory):
    ids = Ids(b"key", storage=tmp_path_factory.mktemp("serve"), keep_s=1000)
    config = uvicorn.Config(
        build_api(backend, ids, Access()), host="127.0.0.1", port=port, log_level="warning"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


@pytest.fixture
def page(url):
    if not CHROMIUM:
        pytest.skip("needs Chromium: apt install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1000, "height": 800})
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("requestfailed", lambda request: errors.append(request.url))
        page.goto(url)
        page.wait_for_selector(".chips li")
        yield page
        assert errors == []
        browser.close()


def clear(side):
    while chips := side.locator(".chips button").all():
        chips[0].click()


def drop(place, digit):
    """Drop a sample somewhere."""
    place.evaluate(
        """async (place, digit) => {
            const content = await (await fetch(`static/samples/digits-${digit}.png`)).blob();
            const transfer = new DataTransfer();
            transfer.items.add(new File([content], `${digit}.png`, { type: "image/png" }));
            const event = new DragEvent("drop", { dataTransfer: transfer, bubbles: true });
            place.dispatchEvent(event);
        }""",
        digit,
    )


def test_from_classes_to_bars_and_weights(page, tmp_path):
    left = page.locator(".side").first
    clear(left)
    name = left.get_by_label("Add a class")
    for word in ("three", "five", "eight"):
        name.fill(word)
        name.press("Enter")
    assert left.locator(".chips li").count() == 3
    left.get_by_role("button", name="Generate").click()
    left.locator(".status", has_text="parameters").wait_for()
    page.locator("#file").set_input_files(SAMPLE)
    left.locator(".bars li").nth(2).wait_for()
    shares = [
        float(text.split()[0])
        for text in left.locator(".bars li span:last-child").all_inner_texts()
    ]
    assert sum(shares) == pytest.approx(100, abs=0.3)
    for link, suffix in (("safetensors", ".safetensors"), ("ONNX", ".onnx")):
        with page.expect_download(timeout=120_000) as download:  # ms; the export is a process
            left.get_by_role("button", name=link).click()
        assert download.value.suggested_filename == f"tina-three-five-eight{suffix}"
        download.value.save_as(tmp_path / f"m{suffix}")
    assert load_file(tmp_path / "m.safetensors")["fc.weight"].shape[0] == 3
    if shot := os.environ.get("TINA_SCREENSHOT"):
        right = page.locator(".side").nth(1)
        clear(right)
        right.get_by_label("Add a class").fill("round: zero, six, nine; five")
        right.get_by_label("Add a class").press("Enter")
        right.get_by_role("button", name="Generate").click()
        right.locator(".bars li").nth(1).wait_for()
        page.screenshot(path=shot, full_page=True)


def test_two_prompts_on_one_dropped_picture_by_keyboard(page):
    for side in page.locator(".side").all():
        side.get_by_label("Add a class").focus()
        page.keyboard.press("Enter")  # with an empty field it sends the form
        side.locator(".status", has_text="parameters").wait_for()
    drop(page.locator("#drop"), "three")
    for side in page.locator(".side").all():
        side.locator(".bars li").nth(1).wait_for()
        for meter in side.locator(".bars meter").all():
            assert "%" in meter.get_attribute("aria-label")
    page.locator("#samples button").first.focus()
    page.keyboard.press("Enter")
    page.locator('#shown[alt="digits-zero.png"]').wait_for()


@pytest.fixture
def asked(backend, monkeypatch):
    """The prompts that come to the endpoint."""
    found, create = [], backend.create

    async def watched(request, format):
        found.append(request)
        return await create(request, format)

    monkeypatch.setattr(backend, "create", watched)
    return found


def test_a_class_of_several_words(page, asked):
    left = page.locator(".side").first
    clear(left)
    left.get_by_label("Add a class").fill("five, low: two, three; eight")
    left.get_by_label("Add a class").press("Enter")
    assert left.locator(".chips li > span").all_inner_texts() == [
        "five",
        "low: two, three",
        "eight",
    ]
    left.get_by_role("button", name="Generate").click()
    left.locator(".status", has_text="parameters").wait_for()
    assert asked[-1].classes == ["five", "low", "eight"]
    assert asked[-1].descriptions == [None, ["two", "three"], None]


def test_pictures_beside_names_are_examples(page, asked):
    left = page.locator(".side").first
    clear(left)
    name = left.get_by_label("Add a class")
    name.fill("three, five, eight")
    name.press("Enter")
    generate = left.get_by_role("button", name="Generate")
    content, other = (
        SAMPLE.with_name(f"digits-{word}.png").read_bytes() for word in ("five", "eight")
    )
    left.get_by_label("Add pictures of three").set_input_files([SAMPLE, SAMPLE])
    assert left.locator(".chips img").count() == 2
    generate.click()
    left.locator(".status.bad", has_text="of two classes at least").wait_for()
    drop(left.locator(".chips li").nth(2), "eight")
    left.get_by_label("Remove picture 1 of three").click()
    focused = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert focused == "Add pictures of three"
    generate.click()
    left.locator(".status", has_text="parameters").wait_for()
    assert asked[-1].classes == ["three", "five", "eight"]
    assert asked[-1].examples == [[content], [], [other]]
    left.get_by_label("Remove three", exact=True).click()
    left.get_by_label("Remove eight", exact=True).click()
    name.fill("eight")
    name.press("Enter")
    assert left.locator(".chips img").count() == 0
    generate.click()
    left.locator(".status", has_text="parameters").wait_for()
    assert asked[-1].examples is None


def test_the_sample_that_was_chosen_last_is_shown(page):
    held = []
    page.route("**/digits-zero.png", lambda route: held.append(route))
    for i in (0, 1):
        page.locator("#samples button").nth(i).click()
    page.locator('#shown[alt="digits-three.png"]').wait_for()
    held.pop().continue_()
    page.wait_for_timeout(300)
    assert page.locator("#shown").get_attribute("alt") == "digits-three.png"


def test_a_sample_that_does_not_come_is_said_and_forgotten(page):
    bad = page.locator(".status.bad")
    page.route("**/digits-zero.png", lambda route: route.fulfill(status=503, body="busy"))
    page.locator("#samples button").nth(0).click()
    bad.nth(1).wait_for()
    assert bad.first.inner_text() == "Sample: Status 503"
    assert not page.locator("#shown").is_visible()
    page.locator("#samples button").nth(1).click()
    page.locator('#shown[alt="digits-three.png"]').wait_for()
    assert bad.count() == 0


def test_what_is_said_of_a_model_stays_while_classes_change(page):
    left = page.locator(".side").first
    name, status, chips = left.get_by_label("Add a class"), left.locator(".status"), ".chips li"
    held = []
    page.route("**/v1/models", lambda route: held.append(route))
    left.get_by_role("button", name="Generate").click()
    status.get_by_text("Generating").wait_for()
    name.fill("nine")
    name.press("Enter")
    assert status.inner_text() == "Generating…"
    while not held:
        page.wait_for_timeout(50)
    held.pop().continue_()
    left.locator(".status", has_text="parameters").wait_for()
    said, many = status.inner_text(), left.locator(chips).count()
    name.press("Backspace")
    assert (status.inner_text(), left.locator(chips).count()) == (said, many - 1)
    page.keyboard.down("Backspace")
    page.keyboard.down("Backspace")  # held down it takes no more
    assert left.locator(chips).count() == many - 2
    page.keyboard.up("Backspace")
    name.fill("a, b, c, d, e")
    name.press("Enter")
    assert "At most" in name.evaluate("input => input.validationMessage")
    assert status.inner_text() == said


def test_downloads_say_how_they_go_and_only_of_their_model(page):
    left = page.locator(".side").first
    generate, status = left.get_by_role("button", name="Generate"), left.locator(".status")
    generate.click()
    left.locator(".status", has_text="parameters").wait_for()
    held = []
    page.route("**format=onnx", lambda route: held.append(route))
    download = left.get_by_role("button", name="ONNX")
    download.click()
    left.locator(".status", has_text="Preparing").wait_for()
    generate.click()
    left.locator(".status", has_text="parameters").wait_for()
    said = status.inner_text()
    held.pop().fulfill(status=500, body="no")  # the older model's
    page.wait_for_timeout(300)
    assert status.inner_text() == said
    download.click()
    left.locator(".status", has_text="Preparing").wait_for()
    while not held:
        page.wait_for_timeout(50)
    held.pop().fulfill(status=500, body="no")
    left.locator(".status.bad", has_text="Status 500").wait_for()
    with page.expect_download():
        left.get_by_role("button", name="safetensors").click()
    left.locator(".status:not(.bad)", has_text="parameters").wait_for()
    assert status.inner_text() == said


def test_a_seed_that_would_be_rounded_is_not_sent(page):
    left = page.locator(".side").first
    left.locator(".seed").fill(str(2**53 + 1))
    left.get_by_role("button", name="Generate").click()
    page.wait_for_timeout(200)
    assert left.locator(".seed:invalid").count() == 1
    assert left.locator(".status").inner_text() == ""


def test_a_picture_is_chosen_by_keyboard_and_by_mouse(page):
    # Playwright does not wait until Chromium hands choosers over: that begins here, not at the key
    page.on("filechooser", lambda chooser: None)
    page.get_by_label(page.locator("#hint").inner_text()).focus()
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(SAMPLE)
    page.locator(f'#shown[alt="{SAMPLE.name}"]').wait_for()
    with page.expect_file_chooser():
        page.locator("#drop").click()
    assert page.locator("#file").input_value() == ""  # so that the same file again is a change


def test_a_known_name_with_commas_is_one_class(page):
    def rename(route):
        info = route.fetch().json()
        route.fulfill(json=info | {"classes": ["tench, Tinca tinca", *info["classes"]]})

    page.route("**/v1/info", rename)
    page.reload()
    chips = page.locator(".side").first.locator(".chips li")
    chips.first.wait_for()
    assert chips.first.inner_text().startswith("tench, Tinca tinca")
    right = page.locator(".side").nth(1)
    clear(right)
    name = right.get_by_label("Add a class")
    for typed in ("tench, Tinca tinca", "one, two"):
        name.fill(typed)
        name.press("Enter")
    assert right.locator(".chips li").count() == 3
    page.unroute("**/v1/info")


def test_a_refusal_is_shown_and_can_be_mended(page):
    left = page.locator(".side").first
    clear(left)
    left.get_by_role("button", name="Generate").click()
    left.locator(".status.bad", has_text="classes").wait_for()
    name = left.get_by_label("Add a class")
    name.fill("three, five")
    left.get_by_role("button", name="Generate").click()
    left.locator(".status", has_text="parameters").wait_for()


def test_bars_are_the_shown_pictures(page):
    left = page.locator(".side").first
    left.get_by_role("button", name="Generate").click()
    left.locator(".status", has_text="parameters").wait_for()
    held = []
    page.route("**/predict", lambda route: held.append(route))
    page.locator("#samples button").nth(0).click()
    page.locator('#shown[alt="digits-zero.png"]').wait_for()
    page.locator("#samples button").nth(1).click()
    page.locator('#shown[alt="digits-three.png"]').wait_for()
    page.wait_for_timeout(300)
    first, second = held
    bars = left.locator(".bars li")
    second.continue_()
    bars.nth(1).wait_for()
    shown = bars.all_inner_texts()
    first.continue_()
    page.wait_for_timeout(500)
    assert bars.all_inner_texts() == shown
    page.unroute("**/predict")


def test_a_picture_that_comes_while_a_model_is_made_waits_for_it(page):
    left = page.locator(".side").first
    left.get_by_role("button", name="Generate").click()
    left.locator(".status", has_text="parameters").wait_for()
    held, asked = [], []
    page.route("**/v1/models", lambda route: held.append(route))
    page.on("request", lambda request: asked.append(request.url))
    left.get_by_role("button", name="Generate").click()
    left.locator(".status", has_text="Generating").wait_for()
    page.locator("#file").set_input_files(SAMPLE)
    page.wait_for_timeout(300)
    assert not [url for url in asked if url.endswith("/predict")]
    assert not left.locator(".links").is_visible()
    held.pop().continue_()
    left.locator(".bars li").nth(1).wait_for()
    assert left.locator(".links").is_visible()
    page.unroute("**/v1/models")


def test_nothing_stays_of_a_picture_that_cannot_be_read(page):
    left = page.locator(".side").first
    left.get_by_role("button", name="Generate").click()
    left.locator(".status", has_text="parameters").wait_for()
    bars, file = left.locator(".bars li"), page.locator("#file")
    file.set_input_files(SAMPLE)
    bars.nth(1).wait_for()
    file.set_input_files({"name": "b.png", "mimeType": "image/png", "buffer": b"none"})
    left.locator(".status.bad").wait_for()
    assert bars.count() == 0
    file.set_input_files(SAMPLE)
    bars.nth(1).wait_for()
    assert left.locator(".status.bad").count() == 0
    clear(left)
    left.get_by_role("button", name="Generate").click()
    left.locator(".status.bad").wait_for()
    assert bars.count() == 0
    assert not left.locator(".links").is_visible()


def test_a_service_that_does_not_answer_is_said(page, url):
    document = {"title": "Busy", "detail": "try again in 1 s"}
    other = page.context.browser.new_page()
    other.route("**/v1/info", lambda route: route.fulfill(status=503, json=document))
    other.goto(url)
    other.locator("#served", has_text="Busy: try again in 1 s").wait_for()
    other.close()
