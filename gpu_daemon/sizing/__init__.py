"""What a model's folder will take of a device, from its config files and safetensors headers alone. No tensors.

Every figure is in bytes. An estimate is for one engine on one kind of device, because they keep weights differently: a GPU
and the reference decoder hold them once, the compiled CPU decoder packs its products, so that a head which is tied to the
embedding is there twice. Activations are those of the largest step that limits allow. On a CPU they are what is held, not what
the C library keeps of what was let go.
"""

from __future__ import annotations

from pathlib import Path

from gpu_daemon.errors import LoadFailed
from gpu_daemon.sizing.decoder import estimate_decoder
from gpu_daemon.sizing.diffusion import estimate_pipeline
from gpu_daemon.sizing.encoder import estimate_encoder
from gpu_daemon.sizing.figures import Conditions, Estimate
from gpu_daemon.sizing.headers import read_json, read_tensors
from gpu_daemon.sizing.sound import estimate_kokoro, estimate_whisper

__all__ = ["Conditions", "Estimate", "estimate"]


def estimate(folder: Path, at: Conditions) -> Estimate:
    """Raises LoadFailed for a folder that is damaged or of no known kind."""
    try:
        return _estimate(folder, at)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:  # files say what they like
        raise LoadFailed(f"{folder.name}: a config file has no sizes to count with ({type(error).__name__}: {error})") from None


def _estimate(folder: Path, at: Conditions) -> Estimate:
    if (folder / "model_index.json").is_file():
        return estimate_pipeline(folder, at)
    config = read_json(folder / "config.json")
    tensors = list(read_tensors(folder))
    architecture = str((config.get("architectures") or [""])[0])
    if "istftnet" in config:
        return estimate_kokoro(tensors, config, at)
    if architecture.startswith("Whisper"):
        return estimate_whisper(tensors, config, at)
    if architecture.endswith(("ForCausalLM", "ForConditionalGeneration")):
        return estimate_decoder(folder, tensors, config, at)
    return estimate_encoder(tensors, config)
