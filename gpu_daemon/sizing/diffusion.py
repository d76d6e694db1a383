"""Pipelines of images and videos: a GPU has them in float16, but for an image's decoder; a CPU in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpu_daemon import limits
from gpu_daemon.errors import LoadFailed
from gpu_daemon.sizing.figures import Conditions, Estimate
from gpu_daemon.sizing.headers import floats, read_json, read_tensors

_NETWORKS = ("unet", "transformer", "vae", "text_encoder")
_LATENT = 8  # pixels of a latent's side
_FIRST, _NEXT = 9, 8  # frames that are decoded of the first latents, and of those after


def estimate_pipeline(folder: Path, at: Conditions) -> Estimate:
    """Its networks' weights, and the largest of: the denoiser's step, the decoding of its result."""
    index = read_json(folder / "model_index.json")
    parts = [name for name in _NETWORKS if name in index and (folder / name).is_dir()]
    counts = {name: floats(read_tensors(folder / name, required=False)) for name in parts}
    if not any(counts.values()):
        raise LoadFailed(f"{folder.name}: no component has weights")
    half = 2 if at.cuda else 4
    vae = read_json(folder / "vae" / "config.json")
    if "transformer" in parts:
        activations = half * _video(read_json(folder / "transformer" / "config.json"), vae)
        return Estimate(sum(counts.values()) * half, activations)
    unet = read_json(folder / "unet" / "config.json")
    weights = sum(count * (4 if name == "vae" else half) for name, count in counts.items())
    return Estimate(weights, max(half * _unet(unet, at), 4 * _decoded_image(vae, at)))


def _unet(unet: dict[str, Any], at: Conditions) -> int:
    """Numbers in the network's first width, all in the up half: a gated inner product (8 for both of its halves, 4 for one
    after its activation, 4 for what comes of them), what the level below gave, what waits for the way up, and a few between."""
    first, second = unet["block_out_channels"][:2]
    latents = limits.DENOISED_PIXELS[at.kind] // _LATENT**2
    return int(latents * (first * (22 + unet.get("layers_per_block", 2)) + second))


def _decoded_image(vae: dict[str, Any], at: Conditions) -> int:
    """Numbers in the last block: its input normalised and activated, in the width of the block before. A CPU's convolutions
    copy what goes in."""
    first, second = vae["block_out_channels"][:2]
    return int(limits.IMAGE_SIDE**2 * max(3 * second + (0 if at.cuda else first), 5 * first))


def _video(transformer: dict[str, Any], vae: dict[str, Any]) -> int:
    """Numbers of as many videos as are denoised together, with guidance, or of one that is decoded."""
    frames = (limits.VIDEO_FRAMES - 1) // transformer["temporal_compression_ratio"] + 1
    height, across = transformer["sample_height"], transformer["sample_width"]
    tokens = 2 * (frames * height * across // transformer["patch_size"] ** 2 + transformer["max_text_seq_length"])
    tokens *= max(1, min(limits.VIDEO_TASKS, limits.VIDEO_TOKENS // tokens))
    width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    return max(int(tokens * width * 12), _decoded_frames(vae, height * across * _LATENT**2))


def _decoded_frames(vae: dict[str, Any], pixels: int) -> int:
    """Numbers of the second piece of a video, which has what the first one left beside its own: in the last block, seven
    tensors and the block's input."""
    first, second = vae["block_out_channels"][:2]
    return int(pixels * _NEXT * (7 * first + second) + _left(vae, pixels, _FIRST) + _left(vae, pixels, _NEXT))


def _left(vae: dict[str, Any], pixels: int, frames: int) -> int:
    """Numbers that a piece leaves to the next: each convolution its last two frames, each norm all of the latents that it
    took, at its own resolution, twice."""
    layers, channels = vae.get("layers_per_block", 3) + 1, vae.get("latent_channels", 16)
    left: int = pixels * 2 * (vae["block_out_channels"][1] + frames * channels)  # the last block's first and last
    for width in vae["block_out_channels"]:
        left += pixels * (2 * 2 * layers * width + frames * 4 * layers * channels)
        pixels //= 4
    return left
