"""Images from SD Turbo: a UNet in one to four Euler steps, no guidance."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from collections.abc import Sequence as Many
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor

from gpu_daemon.engine.task import ImageWork, Progress, Work
from gpu_daemon.errors import InvalidCommand
from gpu_daemon.limits import DECODED_PIXELS, DENOISED_PIXELS, IMAGE_SIDE
from gpu_daemon.runners.denoiser import WARM_STEPS, Denoiser, Denoising
from gpu_daemon.runners.media import jpeg, png, to_pixels

_LATENT = 8  # pixels of a latent's side
_LEAST_SIDE = 64
_MOST_STEPS = 4  # the model is distilled to that few
_SKETCH_LATENTS = 16  # a side of a preview at the most: 128 pixels
_WARM_SIDE = 512


class ImageRunner(Denoiser[ImageWork]):
    """The components of a StableDiffusionPipeline. Latents are [channels, height / 8, width / 8]."""

    PARTS = {
        "unet": diffusers.UNet2DConditionModel,
        "vae": diffusers.AutoencoderKL,
        "text_encoder": transformers.CLIPTextModel,
        "tokenizer": transformers.CLIPTokenizer,
        "scheduler": diffusers.EulerDiscreteScheduler,
    }
    UPCAST = frozenset({"vae"})  # it overflows float16
    max_tasks = 8

    def __init__(self, parts: Mapping[str, Any], device: str) -> None:
        super().__init__(parts, device)
        self._unet = parts["unet"]
        self.text_tokens = int(self._text_encoder.config.max_position_embeddings)

    def check(self, work: Work) -> None:
        if not isinstance(work, ImageWork):
            raise InvalidCommand("this model makes images")
        for side in (work.width, work.height):
            if side % _LATENT or not _LEAST_SIDE <= side <= IMAGE_SIDE:
                raise InvalidCommand(f"width and height are multiples of {_LATENT} from {_LEAST_SIDE} to {IMAGE_SIDE}")
        if not 1 <= work.steps <= _MOST_STEPS:
            raise InvalidCommand(f"this model takes 1 to {_MOST_STEPS} steps")
        if work.guidance:
            raise InvalidCommand("this model is trained without guidance: it must be 0")

    def close(self) -> None:
        super().close()
        self._unet = None

    def _shape(self, work: ImageWork) -> tuple[int, ...]:
        return int(self._unet.config.in_channels), work.height // _LATENT, work.width // _LATENT

    def _key(self, work: ImageWork) -> Hashable:
        return work.width, work.height

    def _together(self, work: ImageWork) -> int:
        return max(1, DENOISED_PIXELS[self.device.type] // (work.width * work.height))

    def _predict(self, noisy: Tensor, times: Tensor, group: Many[Denoising[ImageWork]]) -> Tensor:
        text = torch.stack([state.text for state in group])
        predicted: Tensor = self._unet(noisy, times, encoder_hidden_states=text, return_dict=False)[0]
        return predicted

    def _sketch(self, state: Denoising[ImageWork], guess: Tensor) -> bytes:
        """Decoded from a shrunken guess, which costs a fraction of the image."""
        if not state.work.previews:
            return b""
        height, width = guess.shape[-2:]
        shrink = min(1.0, _SKETCH_LATENTS / max(height, width))
        size = (max(1, round(height * shrink)), max(1, round(width * shrink)))
        return jpeg(self._pixels(torch.nn.functional.interpolate(guess[None], size, mode="area"))[0])

    def _decode(self, denoised: Many[Denoising[ImageWork]]) -> list[Progress]:
        """Those of the first one's size, as many as one step may decode."""
        first = denoised[0].work
        most = max(1, DECODED_PIXELS[self.device.type] // (first.width * first.height))
        batch = [state for state in denoised if self._key(state.work) == self._key(first)][:most]
        images = self._pixels(torch.stack([state.latents for state in batch]))
        return [
            Progress(state.task, media=png(image), mime="image/png", finished=True)
            for state, image in zip(batch, images, strict=True)
        ]

    def _pixels(self, latents: Tensor) -> Any:
        """[images, height, width, 3], of bytes."""
        scaled = latents.to(self._vae.dtype) / self._vae.config.scaling_factor
        return to_pixels(self._vae.decode(scaled, return_dict=False)[0])

    def _sample_work(self) -> ImageWork:
        side = min(_WARM_SIDE, int(self._unet.config.sample_size) * _LATENT)
        return ImageWork("warm", side, side, WARM_STEPS, seed=0)

    def _largest_work(self) -> ImageWork:
        return ImageWork("stress", IMAGE_SIDE, IMAGE_SIDE, 1, seed=0)
