"""Pictures in prompts, against `transformers`' own processor, positions and `generate`."""

from __future__ import annotations

import random
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from gpu_daemon.engine.kv_cache import KvCache
from gpu_daemon.engine.picture import Picture, angles
from gpu_daemon.engine.sequence import Sequence
from gpu_daemon.engine.step_scheduler import StepScheduler
from gpu_daemon.errors import InvalidCommand, InvalidPicture
from gpu_daemon.wire import place
from tests.gpu_daemon.conftest import make_runner, make_tiny
from tests.gpu_daemon.driver import make_sequence, run_all
from tests.gpu_daemon.test_runner import load_reference, random_prompts
from tests.pictures import BOMBS, picture, saved

PAD, START, END = 299, 297, 296
SQUARE, WIDE, TALL = picture(56, 56), picture(150, 90, seed=1), picture(60, 200, seed=2)
PROMPTS: list[list[int | bytes]] = [
    [SQUARE, 5, 6, 7],
    [5, 6, 7, 8, 9, WIDE, 10],
    [5, WIDE, SQUARE, 6, TALL, 7, 8],
    [*range(20, 60), TALL, *range(60, 90), WIDE, SQUARE],
    [WIDE, 4, WIDE, 4, picture(150, 90, seed=3)],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("vision") / "tiny", "qwen2_5_vl")


@pytest.fixture(scope="module")
def runner(folder):
    return make_runner(folder)


@pytest.fixture(scope="module")
def reference(folder):
    return load_reference(folder)


def sequence_of(runner, parts: list[int | bytes], **options) -> Sequence:
    """A prompt of token ids and picture files."""
    pictures = [runner.eyes.read(part, 0) for part in parts if isinstance(part, bytes)]
    seen, ids = iter(pictures), []
    for part in parts:
        ids += [START, *[PAD] * next(seen).tokens, END] if isinstance(part, bytes) else [part]
    sequence = make_sequence(ids, **{"max_tokens": 10, **options})
    place([sequence], pictures, PAD)
    return sequence


def expected(folder, reference, parts: list[int | bytes], sequence: Sequence) -> list[int]:
    """What `generate` answers to the same files, read by the library's processor."""
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    files = [Image.open(BytesIO(part)) for part in parts if isinstance(part, bytes)]
    ids = torch.tensor([sequence.tokens[: sequence.prompt_length]])
    count = sequence.sampling.max_tokens
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "eos_token_id": None}
    seen = {**processor(images=files, return_tensors="pt"), "mm_token_type_ids": (ids == PAD).int()} if files else {}
    reference.model.rope_deltas = None
    return reference.generate(ids, attention_mask=torch.ones_like(ids), **seen, **options)[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("compiled", [True, False], ids=["kernels", "torch"])
def test_greedy_tokens_equal_transformers_alone_among_text_and_in_pieces(folder, reference, compiled: bool) -> None:
    runner = make_runner(folder, compiled=compiled)
    prompts = [*PROMPTS, *([min(token, 290) for token in prompt] for prompt in random_prompts(8))]
    wanted = [expected(folder, reference, parts, sequence_of(runner, parts)) for parts in prompts]
    assert len({tuple(tokens) for tokens in wanted}) == len(wanted)
    for parts, tokens in zip(PROMPTS, wanted, strict=False):
        assert run_all(runner, [sequence_of(runner, parts)]) == [tokens]
    for step_tokens in (512, 24, 7) if compiled else (24,):  # of which the last two cut pictures
        assert run_all(runner, [sequence_of(runner, parts) for parts in prompts], step_tokens=step_tokens) == wanted


def test_places_for_rope_equal_those_of_transformers(reference) -> None:
    rng = random.Random(3)
    for _ in range(50):
        pictures, ids = [], [1] * rng.randrange(4)
        for number in range(rng.randrange(1, 4)):
            rows, columns = rng.randrange(1, 7), rng.randrange(1, 7)
            pictures.append(Picture(b"%d" % number, rows, columns, np.zeros(0), start=len(ids)))
            ids += [PAD] * (rows * columns) + [1] * rng.randrange(1, 4)
        grid = torch.tensor([[1, 2 * p.rows, 2 * p.columns] for p in pictures])
        tokens = torch.tensor([ids])
        whole, delta = reference.model.get_rope_index(tokens, (tokens == PAD).int(), image_grid_thw=grid)
        cut = rng.randrange(len(ids))
        parts = [angles(pictures, 0, cut), angles(pictures, cut, len(ids) - cut)]
        assert np.array_equal(np.concatenate(parts, 1), whole[:, 0].numpy())
        assert angles(pictures, len(ids) + 5, 1).tolist() == [[len(ids) + 5 + int(delta)]] * 3


SIZES = [(28, 28), (1, 190), (30, 30), (640, 480), (333, 77), (1500, 1100)]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_patches_equal_those_of_the_models_processor(folder, runner, width: int, height: int) -> None:
    data = picture(width, height, seed=width)
    read = runner.eyes.read(data, 0)
    wanted = Qwen2VLImageProcessorPil.from_pretrained(folder)(images=[Image.open(BytesIO(data))], return_tensors="pt")
    assert [1, 2 * read.rows, 2 * read.columns] == wanted["image_grid_thw"][0].tolist()
    torch.testing.assert_close(runner.eyes._patches(read.pixels), wanted["pixel_values"], rtol=0, atol=1e-5)


def test_files_of_every_form_show_what_they_show(runner) -> None:
    image = Image.open(BytesIO(picture(84, 56, seed=4)))
    plain = runner.eyes.read(saved(image), 0)
    for data in (saved(image, "WEBP", lossless=True), saved(image.convert("RGBA")), saved(image.quantize(16))):
        assert np.abs(runner.eyes.read(data, 0).pixels.astype(int) - plain.pixels).max() <= 1
    grey = Image.fromarray((np.arange(56 * 56, dtype=np.uint32) * 20).astype(np.uint16).reshape(56, 56))
    assert runner.eyes.read(saved(grey), 0).pixels.max() == (56 * 56 - 1) * 20 >> 8
    sideways = image.getexif()
    sideways[0x0112] = 6
    turned = runner.eyes.read(saved(image, "JPEG", exif=sideways.tobytes()), 0)
    assert (turned.rows, turned.columns) == (plain.columns, plain.rows)


def test_a_picture_is_shrunk_to_the_pixels_it_may_have(runner) -> None:
    data = picture(700, 700)
    assert runner.eyes.read(data, 0).tokens == 625
    assert runner.eyes.read(data, 112 * 112).tokens == 16
    assert runner.eyes.read(data, 1).tokens == 4  # no fewer than the model wants


@pytest.mark.parametrize("name", sorted(BOMBS))
def test_what_must_not_be_decoded_is_refused(runner, name: str) -> None:
    with pytest.raises(InvalidPicture):
        runner.eyes.read(BOMBS[name], 0)


def test_pictures_of_one_size_share_no_kv_and_equal_ones_do(runner) -> None:
    cache = KvCache(64, 16)
    text = list(range(20, 40))
    one, other = picture(160, 160, seed=5), picture(160, 160, seed=6)
    alone = [run_all(runner, [sequence_of(runner, [*text, data, 3])], cache=KvCache(64, 16))[0] for data in (one, other)]
    assert alone[0] != alone[1]
    first, second, again = (sequence_of(runner, [*text, data, 3]) for data in (one, other, one))
    assert [run_all(runner, [sequence], cache=cache)[0] for sequence in (first, second, again)] == [*alone, alone[0]]
    assert second.cached == 16  # the words before the picture
    assert again.cached == (again.prompt_length - 1) // 16 * 16


def test_a_picture_at_another_size_is_another(runner) -> None:
    data = picture(160, 160, seed=5)
    assert runner.eyes.read(data, 0).key != runner.eyes.read(data, 112 * 112).key
    assert runner.eyes.read(data, 0).key == runner.eyes.read(saved(Image.open(BytesIO(data)), "WEBP", lossless=True), 0).key


def test_preempted_and_resumed_sequences_lose_no_token(runner) -> None:
    options = {"max_tokens": 60, "temperature": 1.0}
    wanted = run_all(runner, [sequence_of(runner, parts, **options) for parts in PROMPTS])
    scheduler = StepScheduler(KvCache(16, 16), 24, 32)
    assert run_all(runner, [sequence_of(runner, parts, **options) for parts in PROMPTS], scheduler=scheduler) == wanted
    assert scheduler.preemptions > 0
    resumed = [sequence_of(runner, parts, **options) for parts in PROMPTS]
    for sequence, tokens in zip(resumed, wanted, strict=True):
        sequence.tokens += tokens[:9]
    assert run_all(runner, resumed) == wanted


def test_one_picture_is_looked_at_a_step_and_nobody_waits_for_more(runner) -> None:
    scheduler = StepScheduler(KvCache(runner.blocks, 16), 512, 32)
    talking = make_sequence([3, 4, 5], max_tokens=12)
    scheduler.waiting.extend(
        [talking, sequence_of(runner, PROMPTS[2], max_tokens=1), sequence_of(runner, PROMPTS[3], max_tokens=1)]
    )
    steps = looks = 0
    while len(scheduler.running) > 1 or scheduler.waiting:
        chunks = scheduler.plan()
        unseen = [p for chunk in chunks for p in chunk.pictures if p.embedding is None]
        assert len(unseen) <= 1
        assert any(chunk.sequence is talking for chunk in chunks)
        drawn = iter(runner.run(chunks))
        for chunk in chunks:
            scheduler.advance(chunk)
            if chunk.samples:
                chunk.sequence.tokens.append(next(drawn).token_id)
                if chunk.sequence is not talking:
                    scheduler.remove(chunk.sequence)
        steps, looks = steps + 1, looks + len(unseen)
    assert looks == 6
    assert steps <= 8


def test_what_was_seen_lately_is_not_looked_at_again(runner, monkeypatch) -> None:
    eyes, looked = runner.eyes, []
    embed = eyes._embed
    monkeypatch.setattr(eyes, "_embed", lambda seen: looked.append(seen.key) or embed(seen))
    data = picture(100, 100, seed=77)
    run_all(runner, [sequence_of(runner, [data, 5, data]), sequence_of(runner, [6, data])])
    run_all(runner, [sequence_of(runner, [9, data, 4])])
    assert len(looked) == 1


def test_an_embedding_is_let_go_once_it_was_read(runner) -> None:
    sequence = sequence_of(runner, PROMPTS[3])
    run_all(runner, [sequence], step_tokens=16)
    assert [seen.embedding for seen in sequence.pictures] == [None] * 3


@pytest.mark.parametrize("pads", [3, 5, 0], ids=["fewer", "more", "none"])
def test_a_prompt_has_the_tokens_of_its_pictures(runner, pads: int) -> None:
    with pytest.raises(InvalidCommand):
        place([make_sequence([1, *[PAD] * pads, 2])], [runner.eyes.read(SQUARE, 0)], PAD)


def test_the_tokens_of_a_picture_stand_together(runner) -> None:
    with pytest.raises(InvalidCommand):
        place([make_sequence([PAD, PAD, 1, PAD, PAD])], [runner.eyes.read(SQUARE, 0)], PAD)
