"""The tiny checkpoints are loaded by what loads the real ones, and do what they are for."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from gpu_daemon.check_folder import check_folder
from gpu_daemon.runners import kokoro_model
from gpu_daemon.runners.tiny.__main__ import make
from tests.services import ROOT

RECIPES = {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "fixtures" / "tiny").glob("*.json"))}
PARAMETERS = {
    "smollm2-360m": 227_808, "smollm2-1.7b": 151_872, "qwen3-14b": 189_904, "qwen2.5-vl-3b": 677_760, "kokoro-82m": 821_056,
    "sd-turbo": 2_140_036 + 367_527 + 36_064, "cogvideox-2b": 38_736 + 77_027 + 33_056,
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders by name, each made once."""
    folders = {}

    def folder(name: str):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("tiny") / name
            folders[name].mkdir()
            assert make(RECIPES[name], folders[name], seed=0) == PARAMETERS[name]
            check_folder(folders[name])
        return folders[name]

    return folder


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe["kind"] == "language"])
def test_a_language_model_is_loaded_with_its_tokenizer(made, name: str) -> None:
    folder = made(name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    model_class = getattr(transformers, config["architectures"][0])
    model, report = model_class.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Grüße ☂"}], add_generation_prompt=True)["input_ids"]
    text = tokenizer.decode(ids)
    assert "Grüße ☂" in text
    assert text.endswith("<|im_start|>assistant\n")
    assert max(ids) < model.config.get_text_config().vocab_size
    answer = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)
    assert answer.shape[1] > len(ids)


def test_the_tokenizers_know_the_ids_that_configs_name(made) -> None:
    folder = made("qwen2.5-vl-3b")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == config["image_token_id"]
    assert tokenizer.convert_tokens_to_ids("<|vision_start|>") == config["vision_start_token_id"]
    thinking = transformers.AutoTokenizer.from_pretrained(made("qwen3-14b"))
    assert thinking.convert_tokens_to_ids(["<think>", "</think>"]) == [280, 281]
    assert thinking.eos_token_id == 258


def test_a_narrow_kokoro_is_loaded_and_speaks(made) -> None:
    folder = made("kokoro-82m")
    model = kokoro_model.load(folder)
    with torch.no_grad():
        audio = model("həlO wɜɹld!", torch.full((1, 256), 0.1))
    assert audio.shape[0] % 600 == 0
    assert audio.isfinite().all()
    assert audio.abs().max() > 0


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' scheduler and numpy 2
def test_the_pipelines_are_loaded_and_render(made) -> None:
    import diffusers

    painter = diffusers.StableDiffusionPipeline.from_pretrained(made("sd-turbo"), local_files_only=True)
    painter.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(1)
    image = painter("a cat", height=64, width=64, num_inference_steps=1, guidance_scale=0.0, generator=seed, output_type="pt")
    assert image.images.shape == (1, 3, 64, 64)
    filmer = diffusers.CogVideoXPipeline.from_pretrained(made("cogvideox-2b"), local_files_only=True)
    filmer.set_progress_bar_config(disable=True)
    video = filmer("a cat", height=64, width=64, num_frames=9, num_inference_steps=1, generator=seed, output_type="pt")
    assert video.frames.shape == (1, 9, 3, 64, 64)
