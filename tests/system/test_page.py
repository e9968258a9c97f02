"""Protects the page in a real browser: upload, restore, compare, download, cancel, bad files, phones, keyboard, axe.

Each test also fails if the page asks another host for anything, or if its scripts raise an error.
"""

import sqlite3
from contextlib import closing

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import ImageCms
from playwright.sync_api import expect
from skimage import data

from srsys.image import open_picture
from tests.system.conftest import encoded

pytestmark = pytest.mark.timeout(900)
PATIENCE = 180_000  # ms, for a machine that is busy with other things
expect.set_options(timeout=PATIENCE)
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.fixture
def open_page(browser, served):
    "Opens the page in a new window. Fails at the end if another host was asked or a script raised an error."
    contexts, other_hosts, errors = [], [], []

    def check_host(request):
        if not request.url.startswith((served.page, "data:", "blob:")):
            other_hosts.append(request.url)

    def open_one(width=1280, height=900, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("request", check_host)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(served.page)
        expect(page.get_by_role("button", name="Restore")).to_be_visible()
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert not other_hosts and not errors, (other_hosts, errors)


def file(pixels, name="holiday.png", kind="PNG", **options):
    "A file as a person would choose it."
    return {"name": name, "mimeType": "application/octet-stream", "buffer": encoded(pixels, kind, **options)}


def choose(page, chosen):
    page.get_by_label("Choose a picture").set_input_files(chosen)


def restore(page):
    page.get_by_role("button", name="Restore").click()
    page.get_by_role("link", name="Download the result").wait_for()


def download_result(page):
    with page.expect_download() as download:
        page.get_by_role("link", name="Download the result").click()
    return download.value.suggested_filename, open_picture(download.value.path())


def share_of_after(page):
    "Where the restored picture begins, from 0 to 1 of the width."
    return page.evaluate(
        "parseFloat(document.querySelector('.after').style.clipPath.split('px)')[0].split(' ').pop())"
        " / document.querySelector('.sheet').clientWidth"
    )


def test_a_picture_is_restored_compared_and_downloaded(open_page):
    page = open_page()
    choose(page, file(data.astronaut()[:120, 160:320], icc_profile=PROFILE))
    expect(page.get_by_alt_text("The picture you chose: holiday.png, 160 × 120 pixels")).to_be_visible()
    restore(page)
    for alt in ("Before: holiday.png, 160 × 120 pixels", "After: the same picture restored, 640 × 480 pixels"):
        assert page.get_by_alt_text(alt).evaluate("img => img.complete && img.naturalWidth > 0")
    facts = page.locator(".facts").inner_text()
    assert "photo-x4, version 1" in facts and "160×120 → 640×480" in facts and "colour profile" in facts
    name, picture = download_result(page)
    assert (name, picture.width, picture.height, picture.depth, picture.icc) == ("holiday-x4.png", 640, 480, 8, PROFILE)

    slider = page.get_by_role("slider")
    assert share_of_after(page) == pytest.approx(0.5, abs=0.02)
    slider.focus()
    page.keyboard.press("End")
    assert share_of_after(page) == pytest.approx(1, abs=0.02)
    page.keyboard.press("Home")
    for _ in range(25):
        page.keyboard.press("ArrowRight")
    assert share_of_after(page) == pytest.approx(0.25, abs=0.02)
    page.evaluate("scrollTo(0, 0)")
    box = page.locator(".sheet").bounding_box()
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 50)
    page.mouse.up()
    assert share_of_after(page) == pytest.approx(0.75, abs=0.02)

    page.get_by_role("button", name="Look at 100 %").press("Enter")
    ratio = page.get_by_alt_text("After:").evaluate(
        "img => img.getBoundingClientRect().width * devicePixelRatio / img.naturalWidth"
    )
    assert ratio == pytest.approx(1), "one pixel of the result on one of the screen"


def test_16_bits_are_kept_and_a_large_result_is_shown_at_its_middle(open_page):
    page = open_page()
    deep = np.linspace(0, 65535, 700 * 60).reshape(60, 700).astype(np.uint16)
    choose(page, file(deep, "scan.tif", "TIFF"))
    page.get_by_text("To 4K").click()
    restore(page)
    expect(page.get_by_text("At 100 % you see the middle")).to_be_visible()
    name, picture = download_result(page)
    assert (name, picture.width, picture.height, picture.bands, picture.depth) == ("scan-x5.49.png", 3840, 329, 1, 16)
    page.get_by_role("button", name="Look at 100 %").click()
    before, after = (
        page.locator(f".{which}").evaluate(
            "async img => { await img.decode(); return [img.naturalWidth, img.clientWidth] }"
        )
        for which in ("before", "after")
    )
    assert after[0] < 3840 and before[1] == after[1], "both show the same part at the same size"


def test_cancel_ends_the_work_at_the_next_tile(open_page):
    page = open_page()
    choose(page, file(np.tile(data.coffee(), (5, 4, 1)), "large.jpg", "JPEG"))
    page.get_by_text("×2", exact=True).click()
    page.get_by_role("button", name="Restore").click()
    page.get_by_role("progressbar").wait_for()
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_text("Cancelled; nothing was kept.")).to_be_visible()
    expect(page.get_by_role("button", name="Cancel")).to_be_hidden()
    choose(page, file(data.coffee()[:60, :80]))
    expect(page.get_by_alt_text("The picture you chose: holiday.png, 80 × 60 pixels")).to_be_visible()
    restore(page)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"Dear Sir or Madam,", "not a picture in an accepted format"),
        (b"", "the file is empty"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "broken or incomplete"),
    ],
    ids=["text", "empty", "broken"],
)
def test_a_bad_file_is_one_plain_line(open_page, content, words):
    page = open_page()
    choose(page, {"name": "holiday.jpg", "mimeType": "image/jpeg", "buffer": content})
    said = page.locator(".drop-message")
    expect(said).to_contain_text(words)
    assert "holiday.jpg" in said.inner_text() and "Traceback" not in page.content()
    expect(page.get_by_role("button", name="Restore")).to_be_disabled()


def test_an_example_and_a_pasted_picture_are_loaded(open_page):
    page = open_page()
    page.get_by_role("button", name="A clean small picture").click()
    expect(page.get_by_alt_text("The picture you chose: coffee.png, 200 × 133 pixels")).to_be_visible()
    expect(page.get_by_role("radio", name="A clean small picture")).to_be_checked()
    page.evaluate("""async () => {
      const blob = await (await fetch('page/examples/cat.jpg')).blob(), held = new DataTransfer();
      held.items.add(new File([blob], 'pasted.jpg'));
      document.dispatchEvent(new ClipboardEvent('paste', { clipboardData: held, bubbles: true }));
    }""")
    expect(page.get_by_alt_text("The picture you chose: pasted.jpg, 225 × 150 pixels")).to_be_visible()


def test_another_champion_can_be_chosen(open_page):
    page = open_page()
    choose(page, file(data.coffee()[:60, :80]))
    page.get_by_role("button", name="Choose a model yourself").click()
    page.get_by_label("Model").click()
    page.get_by_role("option", name="fast-x2").click()
    page.get_by_text("×2", exact=True).click()
    restore(page)
    assert "fast-x2, version 1" in page.locator(".facts").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone(open_page, scheme):
    page = open_page(390, 844, color_scheme=scheme, has_touch=True, is_mobile=True, device_scale_factor=2)

    def fits():
        return page.evaluate("document.documentElement.scrollWidth") <= 390

    assert fits()
    choose(page, file(data.astronaut()[:120, 160:320]))
    restore(page)
    assert fits()
    page.get_by_role("button", name="Look at 100 %").click()
    assert fits() and page.get_by_role("slider").bounding_box()["width"] > 90


def test_a_vote_is_stored_and_the_picture_only_with_consent(open_page, served):
    page, folder = open_page(), served.home / "feedback"
    for keep in (False, True):
        choose(page, file(data.astronaut()[:120, 160:320]))
        expect(page.get_by_alt_text("The picture you chose: holiday.png")).to_be_visible()  # the last result is gone
        restore(page)
        tick = page.get_by_label("Keep my picture")
        expect(tick).not_to_be_checked()
        page.get_by_label("No", exact=True).check()
        page.get_by_label("Why?").fill("the eyes are not hers")
        tick.set_checked(keep)
        page.get_by_role("button", name="Send").click()
        expect(
            page.get_by_text(f"Thank you. Your picture is {'kept with your vote' if keep else 'not kept'}.")
        ).to_be_visible()
        with closing(sqlite3.connect(served.home / "feedback.db")) as db:
            made, *kept, picture = db.execute(
                "SELECT request_id, vote, reason, model, picture FROM feedback ORDER BY rowid DESC"
            ).fetchone()
        assert kept == ["down", "the eyes are not hers", "srsys-photo-x4/1"] and picture == (
            f"{made}.png" if keep else None
        )
        assert (folder / f"{made}.png").exists() == keep
    assert np.array_equal(open_picture(folder / picture).pixels, data.astronaut()[:120, 160:320])


def press(page, key, until, at_most=80):
    "Press a key until the element with this name has the focus."
    for _ in range(at_most):
        page.keyboard.press(key)
        words = page.evaluate(
            "(e => e.ariaLabel || e.labels?.[0]?.textContent || e.textContent)(document.activeElement)"
        ).strip()
        if words.startswith(until):
            return
    raise AssertionError(f"no way to {until!r} with {key}; the last was {words!r}")


def test_the_page_works_with_the_keyboard_alone(open_page):
    "Choosing a picture, its kind and the size, restoring, comparing, zooming, downloading and voting."
    page = open_page()
    press(page, "Tab", "Choose a picture")
    press(page, "Tab", "A portrait")
    page.keyboard.press("Enter")
    expect(page.get_by_alt_text("The picture you chose: portrait.jpg")).to_be_visible()
    press(page, "Tab", "A damaged photo")
    for choice in ("A clean small picture", "×2"):  # Gradio's radio buttons are stops of their own
        press(page, "Tab", choice)
        page.keyboard.press("Space")
        expect(page.get_by_role("radio", name=choice)).to_be_checked()
    press(page, "Tab", "Restore")
    page.keyboard.press("Enter")
    page.get_by_role("link", name="Download the result").wait_for()
    press(page, "Tab", "Slider between")
    page.keyboard.press("End")
    assert share_of_after(page) == pytest.approx(1, abs=0.02)
    press(page, "Tab", "Look at 100 %")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Look at 100 %")).to_have_attribute("aria-pressed", "true")
    press(page, "Tab", "Download the result")
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    assert download.value.suggested_filename == "portrait-x2.png"
    press(page, "Tab", "Where does it differ?")
    page.keyboard.press("Enter")
    expect(page.get_by_alt_text("The picture in grey")).to_be_visible()
    press(page, "Tab", "Yes")
    page.keyboard.press("Space")
    press(page, "Tab", "Why?")
    page.keyboard.type("clearer")
    press(page, "Tab", "Send")
    page.keyboard.press("Enter")
    expect(page.get_by_text("Thank you. Your picture is not kept.")).to_be_visible()


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_accessibility_violation(open_page, width, scheme):
    page = open_page(width, 900, color_scheme=scheme)
    for state in ("empty", "failed", "restored"):
        if state == "failed":
            choose(page, {"name": "holiday.jpg", "mimeType": "image/jpeg", "buffer": b"Dear Sir or Madam,"})
            expect(page.locator(".drop-message")).to_contain_text("not a picture")
        if state == "restored":
            choose(page, file(data.astronaut()[:120, 160:320]))
            expect(page.get_by_alt_text("The picture you chose: holiday.png")).to_be_visible()
            restore(page)
            page.get_by_role("button", name="Where does it differ?").click()
            expect(page.get_by_alt_text("The picture in grey")).to_be_visible()
        found = Axe().run(page)
        assert found.violations_count == 0, f"{state}: {found.generate_report()}"
        assert page.evaluate("document.documentElement.scrollWidth") <= width
