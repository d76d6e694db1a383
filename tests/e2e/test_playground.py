"""The playground's tabs in a real browser, over a stack with every modality: real speech, the rest tiny checkpoints."""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from tests.e2e.conftest import RunningStack
from tests.e2e.pages import shots, signed_in

pytestmark = pytest.mark.timeout(600)  # the first test's includes making the checkpoints and starting it all
MODELS = (
    "sd-turbo",
    "cogvideox-2b",
    "qwen2.5-vl-3b",
    "qwen3-14b",
    "smollm2-135m",
    "kokoro-82m",
    "whisper-tiny.en",
    "minilm-l6-v2",
)
READY_SECONDS = 240
QUESTION = "Why is the sky blue?"
LOADED = """media => new Promise((done, fail) => {
    media.onerror = () => fail(media.error.message);
    media.onloadeddata = () => done({ seconds: media.duration, width: media.videoWidth ?? null });
    media.preload = "auto";
    media.load();
})"""


@pytest.fixture(scope="module")
def studio(media_stack: RunningStack) -> RunningStack:
    """Every modality, with all its models loaded, as far as they fit beside each other: the pages say otherwise until then."""
    _await_all(media_stack, set(MODELS))
    return media_stack


def _await_all(stack: RunningStack, names: set[str]) -> None:
    deadline = time.monotonic() + READY_SECONDS
    with stack.client() as client:
        while True:
            states = {model["id"]: model["state"] for model in client.get("/v1/models").json()["data"]}
            if {name for name, state in states.items() if state in ("ready", "on_demand")} >= names:
                return
            assert time.monotonic() < deadline, states
            time.sleep(0.5)


@pytest.fixture
def page(browser: Browser, studio: RunningStack) -> Iterator[Page]:
    with signed_in(browser, studio) as page:
        yield page


@pytest.fixture(scope="module")
def picture(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PNG, drawn by the browser itself."""
    page = browser.new_page()
    drawn = page.evaluate(
        """() => { const canvas = document.createElement("canvas"); canvas.width = canvas.height = 56;
        const pen = canvas.getContext("2d"); pen.fillStyle = "tomato"; pen.fillRect(8, 8, 40, 40);
        return canvas.toDataURL("image/png").split(",")[1]; }"""
    )
    page.close()
    path = tmp_path_factory.mktemp("picture") / "square.png"
    path.write_bytes(base64.b64decode(drawn))
    return path


def opened(page: Page, name: str) -> Locator:
    """The panel of a tab, with a model chosen."""
    page.get_by_role("tab", name=name).click()
    panel = page.get_by_role("tabpanel", name=name)
    expect(panel.get_by_label("Model")).not_to_have_value("")
    return panel


def code(page: Page, panel: Locator, language: str) -> str:
    panel.get_by_role("button", name="View code").click()
    page.get_by_role("button", name=language).click()
    shown = page.locator("#snippet").inner_text()
    page.get_by_role("button", name="Close").click()
    return shown


def run(command: list[str], stack: RunningStack, folder: Path) -> str:
    """What pasted code prints, run where its files may be left."""
    env = {**os.environ, "API_KEY": stack.key}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_both(page: Page, panel: Locator, stack: RunningStack, folder: Path) -> tuple[str, str]:
    """Of the call that the panel's settings make: what its code prints in the shell, and in Python."""
    in_shell = run(["bash", "-euc", code(page, panel, "curl")], stack, folder)
    return in_shell, run([sys.executable, "-c", code(page, panel, "Python")], stack, folder)


def test_the_tabs_are_walked_by_keyboard_and_kept_in_the_address(page: Page) -> None:
    page.get_by_role("tab", name="Chat").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Speech")).to_be_focused()
    expect(page.get_by_role("tabpanel", name="Speech")).to_be_visible()
    expect(page.locator("#composer")).to_be_hidden()
    page.keyboard.press("End")
    expect(page.get_by_role("tabpanel", name="Embeddings")).to_be_visible()
    page.reload()
    expect(page.get_by_role("tabpanel", name="Embeddings")).to_be_visible()


def test_tiny_checkpoints_are_said_to_be_tiny(page: Page) -> None:
    for name, tiny in (("Images", True), ("Video", True), ("Speech", False), ("Embeddings", False)):
        notice = opened(page, name).get_by_text("random")
        expect(notice).to_be_visible() if tiny else expect(notice).to_be_hidden()
    options = page.locator("#chat select[name=model] option")
    expect(options.filter(has_text="Qwen3 14B")).to_contain_text("tiny test checkpoint")
    expect(options.filter(has_text="SmolLM2 135M")).not_to_contain_text("tiny")


def _thoughtful_seed(stack: RunningStack) -> int:
    """One with which the tiny model, whose every token is drawn by chance, begins with a thought."""
    body = {"model": "qwen3-14b", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 4, "temperature": 2,
            "reasoning_effort": "medium"}  # fmt: skip

    def thinks(seed: int) -> bool:
        answer = client.post("/v1/chat/completions", json={**body, "seed": seed}).json()
        return bool(answer["choices"][0]["message"].get("reasoning_content"))

    with stack.client() as client, ThreadPoolExecutor(16) as threads:
        for first in range(0, 4096, 64):
            seeds = range(first, first + 64)
            if found := [seed for seed, thought in zip(seeds, threads.map(thinks, seeds), strict=True) if thought]:
                return found[0]
    raise AssertionError("it never thought")


def test_thinking_is_folded_and_can_be_switched_off(page: Page, studio: RunningStack) -> None:
    chat = opened(page, "Chat")
    expect(chat.get_by_label("Think before the answer")).to_be_hidden()
    chat.get_by_label("Model").select_option("qwen3-14b")
    chat.get_by_label("Max tokens").fill("48")
    chat.get_by_label("Temperature").fill("2")
    chat.get_by_label("Top p").fill("1")
    chat.get_by_label("Seed").fill(str(_thoughtful_seed(studio)))
    for thinks, thoughts in ((True, 1), (False, 1)):
        chat.get_by_label("Think before the answer").set_checked(thinks)
        chat.get_by_label("Message").fill(QUESTION)
        chat.get_by_role("button", name="Send").click()
        expect(chat.locator(".message.assistant small").last).to_contain_text("GPU-ms predicted", timeout=30_000)
        expect(chat.locator("details.thought")).to_have_count(thoughts)
    expect(chat.locator("details.thought summary")).to_have_text(re.compile(r"Thought for [\d.]+ m?s"))
    expect(chat.locator("details.thought p")).to_be_hidden()
    expect(chat.locator(".message.assistant small").last).to_contain_text("tiny test checkpoint")
    shots(page, "playground-thinking")


def test_pictures_are_attached_removed_and_seen(page: Page, picture: Path) -> None:
    chat = opened(page, "Chat")
    expect(chat.get_by_label("Attach pictures")).to_be_hidden()
    chat.get_by_label("Model").select_option("qwen2.5-vl-3b")
    chat.get_by_label("Max tokens").fill("16")
    expect(chat.get_by_label("Attach pictures")).to_be_visible()
    chat.locator("input[name=pictures]").set_input_files([picture, picture])
    expect(chat.locator(".thumb")).to_have_count(2)
    chat.get_by_label("Remove picture 2").click()
    expect(chat.locator(".thumb")).to_have_count(1)
    shots(page, "playground-attached")
    assert "data:image/png;base64," in code(page, chat, "curl")
    chat.get_by_label("Message").fill("What is this?")
    chat.get_by_role("button", name="Send").click()
    expect(chat.locator(".message.user img")).to_have_count(1)
    expect(chat.locator(".message.assistant small").last).to_contain_text("GPU-ms predicted", timeout=120_000)
    expect(chat.get_by_role("alert")).to_be_hidden()
    shots(page, "playground-vision")


def test_speech_is_heard_kept_and_written_down_again(page: Page, studio: RunningStack, tmp_path: Path) -> None:
    speech = opened(page, "Speech")
    expect(speech.locator("select[name=voice]")).to_have_value("af_heart")
    speech.get_by_label("Text").fill("The quick brown fox jumps over the lazy dog.")
    speech.get_by_role("button", name="Speak").click()
    expect(speech.locator(".result audio")).to_be_visible(timeout=60_000)
    expect(speech.locator(".stats")).to_contain_text(re.compile(r"first sound after .* 44 characters .* GPU-ms predicted"))
    assert speech.locator("audio").evaluate(LOADED)["seconds"] > 1
    shots(page, "playground-speech")
    with page.expect_download() as kept:
        speech.get_by_role("link", name="Download speech.wav").click()
    kept.value.save_as(tmp_path / "fox.wav")

    written = opened(page, "Transcribe")
    written.get_by_label("Recording").set_input_files(tmp_path / "fox.wav")
    written.get_by_role("button", name="Transcribe").click()
    expect(written.locator(".transcript")).to_contain_text("brown fox", timeout=60_000)
    expect(written.locator(".result .hint")).to_contain_text("GPU-ms predicted")
    shots(page, "playground-transcribe")
    in_shell, in_python = run_both(page, written, studio, tmp_path)
    assert "transcript.text.done" in in_shell
    assert "brown fox" in in_python


def test_the_code_of_speech_makes_its_file(page: Page, studio: RunningStack, tmp_path: Path) -> None:
    speech = opened(page, "Speech")
    speech.get_by_label("Text").fill("It's “so”.")
    speech.get_by_label("Format").select_option("mp3")
    run_both(page, speech, studio, tmp_path)
    assert (tmp_path / "speech.mp3").stat().st_size > 1000


def test_stop_ends_speech_at_once(page: Page) -> None:
    speech = opened(page, "Speech")
    speech.get_by_label("Text").fill("This sentence is one of very many. " * 100)
    speech.get_by_role("button", name="Speak").click()
    speech.get_by_role("button", name="Stop").click()
    expect(speech.get_by_role("button", name="Speak")).to_be_visible(timeout=3_000)
    expect(speech.get_by_role("alert")).to_be_hidden()


def test_a_picture_is_made_opened_and_made_again_by_its_seed(page: Page, studio: RunningStack, tmp_path: Path) -> None:
    images = opened(page, "Images")
    images.get_by_label("Size").select_option("256x256")
    images.get_by_label("Seed").fill("7")
    for made in (1, 2):
        images.get_by_role("button", name="Make").click()
        expect(images.get_by_role("button", name="Open picture 1")).to_have_count(made, timeout=60_000)
    first, second = images.locator(".picture .bare img").evaluate_all("all => all.map(one => one.src)")
    assert first == second
    expect(images.locator(".result .hint").first).to_contain_text("seed 7")
    expect(images.locator(".result .hint").first).to_contain_text("GPU-ms predicted")
    images.get_by_label("Pictures").fill("3")
    images.get_by_role("button", name="Make").click()
    expect(images.locator(".result").first.get_by_role("link", name="Download")).to_have_count(3, timeout=60_000)
    shots(page, "playground-images")
    images.get_by_role("button", name="Open picture 2").first.click()
    expect(page.get_by_role("dialog", name="Picture")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog", name="Picture")).to_be_hidden()
    images.get_by_label("Pictures").fill("1")
    in_shell, _ = run_both(page, images, studio, tmp_path)
    assert "image_generation.completed" in in_shell
    assert base64.b64encode((tmp_path / "image.png").read_bytes()).decode() == first.partition(",")[2]


def test_a_refusal_is_shown_as_the_api_words_it(page: Page) -> None:
    images = opened(page, "Images")
    images.get_by_label("Seed").fill("99999999999999999999")
    images.get_by_role("button", name="Make").click()
    expect(images.get_by_role("alert")).to_contain_text("seed")
    expect(images.get_by_role("alert")).to_contain_text("(invalid_value)")
    expect(images.locator(".result")).to_have_count(0)


def test_a_video_is_made_played_and_found_again(page: Page, studio: RunningStack, tmp_path: Path) -> None:
    video = opened(page, "Video")
    video.get_by_label("Size").select_option("64x64")
    video.get_by_label("Length").select_option("9")
    video.get_by_label("Steps").fill("8")
    video.get_by_role("button", name="Make").click()
    job = video.locator(".job").first
    expect(job.get_by_role("progressbar")).to_be_visible()
    shots(page, "playground-video-making")
    expect(job.locator("video")).to_be_visible(timeout=90_000)
    assert job.locator("video").evaluate(LOADED) == {"seconds": 1.125, "width": 64}
    expect(job.locator(".hint")).to_contain_text(re.compile("tiny test checkpoint.*made in .*GPU-ms predicted"))
    shots(page, "playground-video")
    jobs = video.locator(".job").count()
    page.reload()
    expect(page.locator("#video .job")).to_have_count(jobs)
    expect(page.locator("#video .job").first.locator("video")).to_be_visible()
    video = opened(page, "Video")
    video.get_by_label("Size").select_option("64x64")
    video.get_by_label("Length").select_option("9")
    video.get_by_label("Steps").fill("4")
    run_both(page, video, studio, tmp_path)
    assert (tmp_path / "video.mp4").read_bytes()[4:8] == b"ftyp"


def test_a_video_is_cancelled_and_deleted(page: Page) -> None:
    video = opened(page, "Video")
    video.get_by_label("Steps").fill("50")
    video.get_by_label("Length").select_option("49")
    video.get_by_role("button", name="Make").click()
    job = video.locator(".job").first
    job.get_by_role("button", name="Cancel").click()
    expect(job.locator(".state").first).to_have_text("cancelled")
    before = video.locator(".job").count()
    job.get_by_role("button", name="Delete").click()
    expect(video.locator(".job")).to_have_count(before - 1)


def test_alike_texts_are_found_alike(page: Page, studio: RunningStack, tmp_path: Path) -> None:
    embeddings = opened(page, "Embeddings")
    embeddings.get_by_role("button", name="Compare").click()
    cells = embeddings.locator(".likeness td")
    expect(cells).to_have_count(9, timeout=30_000)
    itself, alike, apart = (float(text) for text in cells.all_inner_texts()[:3])
    assert itself > 0.999 > alike > apart
    shots(page, "playground-embeddings")
    _, in_python = run_both(page, embeddings, studio, tmp_path)
    assert in_python.splitlines()[2].endswith("384")


def test_the_quickstart_works_from_its_first_line_to_its_last(
    page: Page, studio: RunningStack, picture: Path, tmp_path: Path
) -> None:
    page.get_by_role("link", name="Quickstart").click()
    shutil.copy(picture, tmp_path / "picture.png")
    samples = [page.locator("#python"), *page.locator("[id^=sample-]").all()]
    pasted = "\n\n".join(sample.inner_text() for sample in samples).replace('api_key="sk-..."', f'api_key="{studio.key}"')
    pasted = pasted.replace('seconds="2"', 'seconds="2", size="64x64"').replace("512x512", "256x256")  # as CI is slow
    said = run([sys.executable, "-c", pasted], studio, tmp_path)
    assert "good morning" in said.lower()
    assert said.endswith("2 384\n")
    assert {path.name for path in tmp_path.iterdir()} >= {"speech.wav", "image.png", "video.mp4"}
    shots(page, "quickstart")
