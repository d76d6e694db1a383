"""Images and videos on tiny pipelines of the real classes: against diffusers' own, stepwise, together, dropped, damaged."""

from __future__ import annotations

import gc
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import av
import diffusers
import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from gpu_daemon.engine.sequence import EngineKind
from gpu_daemon.engine.task import ImageWork, Progress, SpeechWork, Task, VideoWork, Work
from gpu_daemon.errors import InvalidCommand, LoadFailed
from gpu_daemon.runners.denoiser import Denoiser, noise
from gpu_daemon.runners.image import ImageRunner
from gpu_daemon.runners.opening import loader_of
from gpu_daemon.runners.tiny.__main__ import make
from gpu_daemon.runners.torch_runner import RunnerOptions, set_threads
from gpu_daemon.runners.video import VideoRunner

RECIPES = Path(__file__).parents[2] / "fixtures" / "tiny"
PROMPT = "a small red boat"


def make_folder(tmp_path_factory, name: str) -> Path:
    folder = tmp_path_factory.mktemp("diffusion") / name
    make(json.loads((RECIPES / f"{name}.json").read_text()), folder, seed=1)
    return folder


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory, "sd-turbo")


@pytest.fixture(scope="module")
def video_folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory, "cogvideox-2b")


def load_runner(folder: Path, report=lambda *_: None) -> Denoiser:
    set_threads(1)
    runner = loader_of(folder, EngineKind.CONTINUOUS)(folder, RunnerOptions("cpu", max_model_len=0), report)
    assert isinstance(runner, Denoiser)
    return runner


@pytest.fixture(scope="module")
def images(image_folder) -> ImageRunner:
    return load_runner(image_folder)


@pytest.fixture(scope="module")
def videos(video_folder) -> VideoRunner:
    return load_runner(video_folder)


def image(seed: int = 1, choice: int = 0, done: int = 0, **changes) -> Task:
    work = ImageWork(**{"prompt": PROMPT, "width": 64, "height": 64, "steps": 2, "seed": seed, **changes})
    return Task(0, "request", 1, choice, work, units=work.steps * (work.width * work.height // 256), done=done)


def video(seed: int = 1, **changes) -> Task:
    work = VideoWork(**{"prompt": PROMPT, "width": 64, "height": 48, "frames": 9, "steps": 2, "seed": seed, **changes})
    latent_frames = (work.frames - 1) // 4 + 1
    return Task(0, "request", 1, 0, work, units=work.steps * latent_frames * (work.width * work.height // 256))


def run(runner: Denoiser, *tasks: Task) -> dict[Task, list[Progress]]:
    """Everything that is told of each, until all are finished."""
    told: dict[Task, list[Progress]] = {task: [] for task in tasks}
    going = list(tasks)
    while going:
        for progress in runner.step(going):
            told[progress.task].append(progress)
        going = [task for task in tasks if not (told[task] and told[task][-1].finished)]
    return told


def pixels(progress: list[Progress]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(progress[-1].media))).astype(int)


def frames(media: bytes) -> np.ndarray:
    with av.open(io.BytesIO(media)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(int)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What is freed while the collector rests was not in a cycle."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def tensors() -> int:
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


# Against diffusers


@pytest.mark.parametrize(("steps", "width"), [(1, 64), (4, 96)])
def test_an_image_is_the_one_that_diffusers_makes(image_folder, images, steps, width) -> None:
    task = image(seed=5, choice=3, steps=steps, width=width)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(image_folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    start = noise((4, 8, width // 8), 5, 3)[None]
    options = {"num_inference_steps": steps, "guidance_scale": 0.0, "width": width, "height": 64, "output_type": "np"}
    expected = (pipeline(PROMPT, latents=start, **options).images[0] * 255).round()
    found = pixels(run(images, task)[task])
    assert found.std() > 5  # a picture, not a plain
    assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize(("guidance", "count"), [(6.0, 17), (1.0, 21)])
def test_a_video_is_the_one_that_diffusers_makes(video_folder, videos, guidance, count) -> None:
    task = video(seed=5, frames=count, steps=3, guidance=guidance)
    pipeline = diffusers.CogVideoXPipeline.from_pretrained(video_folder)
    pipeline.set_progress_bar_config(disable=True)
    start = noise(((count - 1) // 4 + 1, 16, 6, 8), 5, 0)[None]
    options = {"num_frames": count, "num_inference_steps": 3, "guidance_scale": guidance, "width": 64, "height": 48}
    latents = pipeline(PROMPT, latents=start.clone(), output_type="latent", **options).frames
    expected = pipeline(PROMPT, latents=start.clone(), output_type="np", **options).frames[0] * 255
    while not (videos.step([task]) == [] and videos._states[task].pieces):
        found_latents = videos._states[task].latents
    assert torch.allclose(found_latents, latents[0], atol=1e-4)
    found = frames(run(videos, task)[task][-1].media)
    assert found.shape == (count, 48, 64, 3)
    grey = np.array([0.299, 0.587, 0.114])  # of the colours, H.264 keeps a quarter
    # Of an even number of latents, diffusers makes three frames too many, ahead.
    assert np.abs((found - expected[-count:]) @ grey).mean() < 2
    assert (found @ grey).std() > 5


# Step by step


@pytest.mark.parametrize("steps", [1, 3])
def test_an_image_tells_its_share_each_step_then_itself(images, steps) -> None:
    task = image(steps=steps, width=72, height=88)
    *denoised, last = run(images, task)[task]
    assert len(denoised) == steps
    assert sum(progress.units for progress in denoised) == task.units
    assert all(progress.units and not progress.media for progress in denoised)
    assert (last.units, last.mime, last.finished) == (0, "image/png", True)
    assert Image.open(io.BytesIO(last.media)).size == (72, 88)


def test_a_video_tells_its_share_each_step_and_decodes_a_piece_a_step(videos) -> None:
    task = video(frames=21, steps=3, fps=5)
    told: list[list[Progress]] = []
    while not (told and told[-1] and told[-1][0].finished):
        told.append(videos.step([task]))
    shares = [progress.units for step in told[:3] for progress in step]
    assert len(shares) == 3
    assert sum(shares) == task.units
    assert [len(step) for step in told[3:]] == [0, 0, 0, 1]  # six latent frames in three pieces, then the file's end
    last = told[-1][0]
    assert (last.units, last.mime) == (0, "video/mp4")
    assert last.media.index(b"moov") < last.media.index(b"mdat")
    with av.open(io.BytesIO(last.media)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height, stream.average_rate, stream.frames) == (64, 48, 5, 21)


def test_what_an_earlier_attempt_told_is_not_told_again(images) -> None:
    task = image(steps=4, done=24)
    told = run(images, task)[task]
    assert [progress.units for progress in told] == [0, 8, 16, 16, 0]


def test_previews_come_with_each_step_and_are_small(images) -> None:
    task = image(steps=2, width=256, height=192, previews=True)
    *sketches, last = run(images, task)[task]
    assert [(sketch.preview, sketch.mime) for sketch in sketches] == [(True, "image/jpeg")] * 2
    assert {Image.open(io.BytesIO(sketch.media)).size for sketch in sketches} == {(128, 96)}
    small = np.asarray(Image.fromarray(pixels([last]).astype(np.uint8)).resize((128, 96))).astype(int)
    assert np.abs(pixels(sketches) - small).mean() < np.abs(pixels(sketches) - np.roll(small, 40, axis=(0, 1))).mean()
    assert not last.preview


# Together


def count_forwards(runner: Denoiser, network: torch.nn.Module, tasks: list[Task]) -> int:
    counted: list[int] = []
    hook = network.register_forward_hook(lambda *_: counted.append(1))
    run(runner, *tasks)
    hook.remove()
    return len(counted)


def test_eight_images_take_one_forward_a_step(images) -> None:
    assert count_forwards(images, images._unet, [image(seed=n, steps=2) for n in range(8)]) == 2
    assert count_forwards(images, images._unet, [image(seed=n, width=64 + 8 * n, steps=2) for n in range(2)]) == 4


def test_images_made_together_are_those_made_alone(images) -> None:
    tasks = [image(seed=n, steps=1 + n % 4, prompt=f"{PROMPT} {n}", width=64 + 8 * (n % 2)) for n in range(8)]
    together = run(images, *tasks)
    for task in tasks:
        assert np.abs(pixels(together[task]) - pixels(run(images, task)[task])).max() <= 1


def test_one_may_join_while_another_is_half_done(images) -> None:
    early, late = image(seed=1, steps=4), image(seed=2, steps=4, prompt="rain")
    images.step([early])
    images.step([early])
    together = run(images, early, late)
    assert [progress.units for progress in together[early]] == [16, 16, 0]
    for task in (early, late):
        assert np.abs(pixels(together[task]) - pixels(run(images, task)[task])).max() <= 1


def test_videos_made_together_are_those_made_alone(videos) -> None:
    tasks = [video(seed=1, guidance=3.0), video(seed=2, guidance=6.0, steps=3), video(seed=3, guidance=1.0), video(frames=13)]
    together = run(videos, *tasks)
    for task in tasks:
        alone = frames(run(videos, task)[task][-1].media)
        assert np.abs(frames(together[task][-1].media) - alone).mean() < 1


def test_guided_videos_share_a_forward_with_their_like_only(videos) -> None:
    assert count_forwards(videos, videos._transformer, [video(seed=1), video(seed=2, guidance=2.0)]) == 2
    assert count_forwards(videos, videos._transformer, [video(seed=1), video(seed=2, guidance=0.0)]) == 4


def test_seed_and_choice_decide(images, videos) -> None:
    def made(runner: Denoiser, task: Task) -> bytes:
        return run(runner, task)[task][-1].media

    assert made(images, image(seed=4, choice=1)) == made(images, image(seed=4, choice=1))
    assert len({made(images, image(seed=seed, choice=choice)) for seed in (4, 5) for choice in (0, 1)}) == 4
    assert len({made(videos, video(seed=4)) for _ in range(5)}) == 1
    assert made(videos, video(seed=4)) != made(videos, video(seed=5))


def test_a_long_prompt_is_cut(images) -> None:
    words = " ".join(["boat"] * 200)
    first, second = image(prompt=words), image(prompt=words + " and a whale")
    assert run(images, first)[first][-1].media == run(images, second)[second][-1].media


# Dropped


def test_a_dropped_image_leaves_nothing(images, no_collector) -> None:
    run(images, image(steps=4))
    before = tensors()
    task, other = image(seed=1, steps=4), image(seed=2, steps=4)
    images.step([task, other])
    assert tensors() > before
    images.drop(task)
    images.drop(task)
    images.drop(image())
    finished = run(images, other)
    assert np.abs(pixels(finished[other]) - pixels(run(images, other)[other])).max() <= 1
    assert tensors() == before


@pytest.mark.parametrize("steps_done", [1, 3, 4])
def test_a_video_dropped_while_denoised_or_decoded_leaves_nothing(videos, no_collector, steps_done) -> None:
    run(videos, video(frames=17))
    before = tensors()
    task = video(frames=17)
    for _ in range(steps_done):
        assert not any(progress.finished for progress in videos.step([task]))
    assert tensors() > before
    videos.drop(task)
    assert tensors() == before


# Refused


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"width": 60}, "multiples of 8"), ({"height": 1032}, "64 to 1024"), ({"width": 0}, "64 to 1024"),
        ({"steps": 0}, "1 to 4 steps"), ({"steps": 5}, "1 to 4 steps"), ({"guidance": 7.5}, "must be 0"),
        ({"guidance": float("nan")}, "must be 0"),
    ],
)  # fmt: skip
def test_images_it_cannot_make(images, changes, reason) -> None:
    with pytest.raises(InvalidCommand, match=reason):
        images.check(image(**changes).work)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"width": 72}, "multiples of 16"), ({"height": 32}, "64 to 720"), ({"frames": 10}, "4 n"),
        ({"frames": 5}, "9 to"), ({"frames": 53}, "to 49"), ({"steps": 0}, "1 to 50"), ({"steps": 51}, "1 to 50"),
        ({"guidance": -1.0}, "guidance"), ({"guidance": float("nan")}, "guidance"), ({"fps": 0}, "1 to 60"),
    ],
)  # fmt: skip
def test_videos_it_cannot_make(videos, changes, reason) -> None:
    with pytest.raises(InvalidCommand, match=reason):
        videos.check(video(**{"height": 64, **changes}).work)


def test_each_model_refuses_others_work(images, videos) -> None:
    works: list[Work] = [SpeechWork("hello", "af_heart"), image().work, video(height=64).work]
    for runner, makes in ((images, ImageWork), (videos, VideoWork)):
        for work in works:
            if isinstance(work, makes):
                runner.check(work)
            else:
                with pytest.raises(InvalidCommand, match="this model makes"):
                    runner.check(work)


def test_every_number_of_steps_has_a_schedule_of_that_length(images, videos) -> None:
    for runner, most in ((images, 4), (videos, 50)):
        for steps in range(1, most + 1):
            assert len(runner._schedule(steps).timesteps) == steps


# Loaded


def test_loading_says_what_it_reads_and_warming_measures(image_folder) -> None:
    stages: list[tuple[str, float]] = []
    runner = load_runner(image_folder, lambda *stage: stages.append(stage))
    assert [stage for stage, _ in stages] == [*(f"reading {part}" for part in ImageRunner.PARTS), "warming"]
    assert [share for _, share in stages] == sorted(share for _, share in stages)
    assert runner.weight_bytes == 4 * (2_140_036 + 367_527 + 36_064)
    runner.warm()
    assert runner.input_ms_per_unit > 0
    assert runner.output_ms_per_unit > 0
    runner.close()


@pytest.fixture
def copied(image_folder, tmp_path) -> Path:
    return shutil.copytree(image_folder, tmp_path / "copied")


def _edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _unlist(folder: Path) -> None:
    (folder / "model_index.json").unlink()


def _other_pipeline(folder: Path) -> None:
    _edit(folder / "model_index.json", _class_name="StableDiffusionXLPipeline")


def _other_class(folder: Path) -> None:
    _edit(folder / "model_index.json", unet=["evil", "UNet"])


def _no_vae(folder: Path) -> None:
    shutil.rmtree(folder / "vae")


def _cut(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def _pickled(folder: Path) -> None:
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, folder / "vae" / "diffusion_pytorch_model.bin")


def _incomplete(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["conv_in.weight"]
    save_file(tensors, weights)


def _other_sizes(folder: Path) -> None:
    _edit(folder / "unet" / "config.json", block_out_channels=[32, 64, 64, 128])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_unlist, "config.json is missing"), (_other_pipeline, "StableDiffusionXLPipeline is not one of"),
        (_other_class, 'its unet is \\["evil", "UNet"\\]'), (_no_vae, "its vae is missing"), (_cut, "its unet cannot be read"),
        (_pickled, "its vae cannot be read"), (_other_sizes, "its unet cannot be read"),
        (_incomplete, "its unet has not the weights"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_refused_in_one_line(copied, damage, reason) -> None:
    damage(copied)
    with pytest.raises(LoadFailed, match=reason) as caught:
        load_runner(copied)
    assert "\n" not in str(caught.value)


def test_half_size_files_alone_do(copied, images) -> None:
    for part in ("unet", "vae", "text_encoder"):
        (weights,) = (copied / part).glob("*.safetensors")
        weights.rename(weights.with_suffix(".fp16.safetensors"))
    task = image()
    assert run(load_runner(copied), task)[task][-1].media == run(images, task)[task][-1].media


def test_a_tokenizer_as_published_is_read(video_folder, tmp_path) -> None:
    """A sentencepiece model, which the real one has and no tokenizer.json."""
    folder = shutil.copytree(video_folder, tmp_path / "published")
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([PROMPT] * 20), model_prefix=str(folder / "tokenizer" / "spiece"), vocab_size=24,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    task = video()
    assert run(load_runner(folder), task)[task][-1].finished
