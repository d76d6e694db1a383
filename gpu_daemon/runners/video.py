"""Videos from CogVideoX-2B: a transformer in many DDIM steps with classifier-free guidance, decoded a few frames a step."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from collections.abc import Sequence as Many
from contextlib import closing
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor

from gpu_daemon.engine.task import Progress, VideoWork, Work
from gpu_daemon.errors import InvalidCommand, LoadFailed
from gpu_daemon.limits import VIDEO_FRAMES, VIDEO_TASKS, VIDEO_TOKENS
from gpu_daemon.runners.denoiser import WARM_STEPS, Denoiser, Denoising
from gpu_daemon.runners.media import Mp4, to_pixels

_LATENT = 8  # pixels of a latent's side; a patch has two
_FRAMES = 4  # frames of a latent after the first, which is one
_LEAST_FRAMES = 9
_MOST_STEPS = 50
_MOST_GUIDANCE = 20.0
_MOST_FPS = 60
_LEAST_SIDE, _MOST_SIDE = 64, 720
_TRAINED_WIDTH = 90  # latents: a model of this size was trained at no other


class VideoRunner(Denoiser[VideoWork]):
    """The components of a CogVideoXPipeline. Latents are [latent frames, channels, height / 8, width / 8]."""

    PARTS = {
        "transformer": diffusers.CogVideoXTransformer3DModel,
        "vae": diffusers.AutoencoderKLCogVideoX,
        "text_encoder": transformers.T5EncoderModel,
        "tokenizer": transformers.T5Tokenizer,
        "scheduler": diffusers.CogVideoXDDIMScheduler,
    }

    def __init__(self, parts: Mapping[str, Any], device: str) -> None:
        """Raises LoadFailed for the architecture's other variants."""
        super().__init__(parts, device)
        self._transformer = parts["transformer"]
        config = self._transformer.config
        if config.use_rotary_positional_embeddings or config.use_learned_positional_embeddings or config.patch_size_t:
            raise LoadFailed("of CogVideoX, only models with fixed positions run here, as the 2B has")
        self.text_tokens = int(config.max_text_seq_length)
        self._native = int(config.sample_width) * _LATENT, int(config.sample_height) * _LATENT
        self._blank: Tensor | None = None  # the empty prompt, which guidance leads away from
        self.max_tasks = max(1, min(VIDEO_TASKS, VIDEO_TOKENS // self._tokens(self._sample_work())))

    def check(self, work: Work) -> None:
        if not isinstance(work, VideoWork):
            raise InvalidCommand("this model makes videos")
        self._check_size(work.width, work.height)
        if (work.frames - 1) % _FRAMES or not _LEAST_FRAMES <= work.frames <= VIDEO_FRAMES:
            raise InvalidCommand(f"frames are {_FRAMES} n + 1, from {_LEAST_FRAMES} to {VIDEO_FRAMES}")
        if not 1 <= work.steps <= _MOST_STEPS:
            raise InvalidCommand(f"this model takes 1 to {_MOST_STEPS} steps")
        if not 0 <= work.guidance <= _MOST_GUIDANCE:
            raise InvalidCommand(f"guidance is from 0 to {_MOST_GUIDANCE:g}")
        if not 1 <= work.fps <= _MOST_FPS:
            raise InvalidCommand(f"a second has 1 to {_MOST_FPS} frames")

    def _check_size(self, width: int, height: int) -> None:
        native_width, native_height = self._native
        if native_width >= _TRAINED_WIDTH * _LATENT and (width, height) != self._native:
            raise InvalidCommand(f"this model makes videos of {native_width} x {native_height} only")
        for side in (width, height):
            if side % (2 * _LATENT) or not _LEAST_SIDE <= side <= _MOST_SIDE:
                raise InvalidCommand(f"width and height are multiples of {2 * _LATENT} from {_LEAST_SIDE} to {_MOST_SIDE}")

    def close(self) -> None:
        super().close()
        self._transformer = self._blank = None

    def _shape(self, work: VideoWork) -> tuple[int, ...]:
        frames = (work.frames - 1) // _FRAMES + 1
        return frames, int(self._transformer.config.in_channels), work.height // _LATENT, work.width // _LATENT

    def _key(self, work: VideoWork) -> Hashable:
        return self._shape(work), _guided(work)

    def _together(self, work: VideoWork) -> int:
        return max(1, VIDEO_TOKENS // self._tokens(work))

    def _tokens(self, work: VideoWork) -> int:
        """Of one task in a forward pass with guidance."""
        frames, _, height, width = self._shape(work)
        return 2 * (frames * height * width // 4 + self.text_tokens)

    def _predict(self, noisy: Tensor, times: Tensor, group: Many[Denoising[VideoWork]]) -> Tensor:
        text = torch.stack([state.text for state in group])
        if not _guided(group[0].work):
            return self._forward(noisy, text, times)
        blank = self._blank_text().expand_as(text)
        both = self._forward(torch.cat([noisy, noisy]), torch.cat([blank, text]), torch.cat([times, times])).float()
        free, led = both.chunk(2)
        guidance = torch.tensor([state.work.guidance for state in group], device=self.device).view(-1, 1, 1, 1, 1)
        return free + guidance * (led - free)

    def _forward(self, noisy: Tensor, text: Tensor, times: Tensor) -> Tensor:
        predicted: Tensor = self._transformer(noisy, encoder_hidden_states=text, timestep=times, return_dict=False)[0]
        return predicted

    def _blank_text(self) -> Tensor:
        if self._blank is None:
            self._blank = self._encode([""])[""]
        return self._blank

    def _decode(self, denoised: Many[Denoising[VideoWork]]) -> list[Progress]:
        """The next piece of the first one."""
        state = denoised[0]
        state.pieces = state.pieces or self._pieces(state.work, state.latents)
        media = next(state.pieces)
        return [Progress(state.task, media=media, mime="video/mp4", finished=True)] if media else []

    def _pieces(self, work: VideoWork, latents: Tensor) -> Iterator[bytes]:
        """Decodes and encodes some frames at each `next`; the last gives the file. Frames depend on those before them, of which
        the decoder's cache knows what it must."""
        latents = latents.to(self._vae.dtype).transpose(0, 1)[None] / self._vae.config.scaling_factor
        count = latents.shape[2]
        spare = 0 if count % 2 else _FRAMES - 1  # of an even number, the decoder makes four frames of the first latent too
        cache = None
        with closing(Mp4(work.width, work.height, work.frames, work.fps)) as video:
            for piece in torch.split(latents, [2 + count % 2] + [2] * (count // 2 - 1), 2):
                sample, cache = self._vae.decoder(piece, conv_cache=cache)
                video.add(to_pixels(sample[0].transpose(0, 1)[spare:]))
                spare = 0
                yield b""
            yield video.finish()

    def _sample_work(self) -> VideoWork:
        frames = VIDEO_FRAMES if self.device.type == "cuda" else _LEAST_FRAMES
        return VideoWork("warm", *self._native, frames, WARM_STEPS, seed=0)

    def _largest_work(self) -> VideoWork:
        """Of the model's own size: only those that were trained at no other are large."""
        return VideoWork("stress", *self._native, VIDEO_FRAMES, 1, seed=0)


def _guided(work: VideoWork) -> bool:
    return work.guidance > 1
