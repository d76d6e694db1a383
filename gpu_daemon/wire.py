"""Between the wire's messages and the daemon's nouns. What comes in is checked: every number is one the model can run with."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from collections.abc import Sequence as Many

from gpu_daemon.engine.picture import Picture
from gpu_daemon.engine.sequence import Delta, EngineKind, FinishReason, Logprob, Sampling, Sequence
from gpu_daemon.engine.task import EmbedWork, ImageWork, SpeechWork, Task, TaskRunner, TranscribeWork, VideoWork, Work
from gpu_daemon.errors import InvalidCommand
from gpu_daemon.folders import Folder
from gpu_daemon.models import Models
from gpu_daemon.residents import Resident, TextRunner
from protos import inference_pb2 as pb

MAX_CHOICES = 2048  # embeddings come in such crowds
MAX_LOGIT_BIAS = 1024
MAX_TOP_LOGPROBS = 20
_STATES = {
    "loading": pb.MODEL_STATE_LOADING,
    "ready": pb.MODEL_STATE_READY,
    "unloading": pb.MODEL_STATE_UNLOADING,
    "failed": pb.MODEL_STATE_FAILED,
}
_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    FinishReason.EXPIRED: pb.FINISH_REASON_EXPIRED,
    FinishReason.FAILED: pb.FINISH_REASON_FAILED,
}
KINDS = {
    pb.ENGINE_KIND_UNSPECIFIED: EngineKind.CONTINUOUS,
    pb.ENGINE_KIND_CONTINUOUS: EngineKind.CONTINUOUS,
    pb.ENGINE_KIND_STATIC: EngineKind.STATIC,
}
_KIND_NUMBERS = {kind: number for number, kind in KINDS.items()}


def sequences(caller: int, submit: pb.Submit, runner: TextRunner) -> list[Sequence]:
    """Every choice as a sequence, yet without pictures. Raises InvalidCommand unless each number is one the model can run
    with."""
    deadline = _deadline(submit)
    sampling = _sampling(submit.sampling, runner.vocab_size)
    made = []
    for choice in submit.choices:
        prompt, generated = list(choice.prompt_ids), list(choice.generated_ids)
        if not prompt or max(prompt + generated) >= runner.vocab_size:
            raise InvalidCommand("a prompt is empty or holds an id the model does not have")
        if len(prompt) + sampling.max_tokens > runner.max_model_len or len(generated) >= sampling.max_tokens:
            raise InvalidCommand("a choice is longer than the model's context, or complete already")
        if runner.eyes is not None and not submit.pictures and runner.eyes.pad_id in prompt:
            raise InvalidCommand("a prompt has tokens for a picture, and there is none")
        made.append(
            Sequence(
                caller=caller,
                request_id=submit.request_id,
                attempt=submit.attempt,
                choice=choice.index,
                tokens=prompt + generated,
                prompt_length=len(prompt),
                sampling=sampling,
                salt=submit.cache_salt,
                deadline=deadline,
            )
        )
    return made


def place(sequences: Many[Sequence], pictures: Many[Picture], pad_id: int) -> None:
    """Gives the choices of one prompt their pictures, in the order of the tokens that stand for them. Raises InvalidCommand
    unless those are as many as the pictures have."""
    first = sequences[0]
    prompt = first.tokens[: first.prompt_length]
    pads = [place for place, token in enumerate(prompt) if token == pad_id]
    if len(pads) != sum(picture.tokens for picture in pictures):
        raise InvalidCommand("the prompt has another number of tokens for pictures than the pictures have")
    for picture in pictures:
        own, pads = pads[: picture.tokens], pads[picture.tokens :]
        if own[-1] - own[0] >= picture.tokens:
            raise InvalidCommand("the tokens of a picture do not stand together")
        picture.start = own[0]
    for sequence in sequences:
        if sequence.tokens[: sequence.prompt_length] != prompt:
            raise InvalidCommand("the choices of a prompt with pictures differ in it")
        sequence.pictures = tuple(pictures)


def tasks(caller: int, submit: pb.Submit, runner: TaskRunner) -> list[Task]:
    """Every choice as a task. Raises InvalidCommand for work that the model cannot do."""
    deadline, units = _deadline(submit), submit.sampling.max_tokens
    made = []
    for choice in submit.choices:
        work = _WORK[submit.WhichOneof("work")](submit, choice)
        runner.check(work)
        if not choice.done_units <= units or not units:  # denoised to the end, a picture is yet to be decoded
            raise InvalidCommand("a choice has no units, or more done than it has")
        made.append(Task(caller, submit.request_id, submit.attempt, choice.index, work, units, choice.done_units, deadline))
    return made


def _deadline(submit: pb.Submit) -> float:
    """On the engine's clock. Raises InvalidCommand for a submit of nothing."""
    if not 0 < len(submit.choices) <= MAX_CHOICES or not submit.request_id:
        raise InvalidCommand("a submit has a request id and choices")
    return time.monotonic() + submit.timeout_ms / 1000 if submit.timeout_ms else math.inf


def _speech(submit: pb.Submit, choice: pb.Choice) -> SpeechWork:
    return SpeechWork(submit.speech.text, submit.speech.voice, _finite(submit.speech.speed))


def _embed(submit: pb.Submit, choice: pb.Choice) -> EmbedWork:
    return EmbedWork(tuple(choice.prompt_ids), submit.embed.dimensions)


def _transcribe(submit: pb.Submit, choice: pb.Choice) -> TranscribeWork:
    w = submit.transcribe
    return TranscribeWork(
        w.audio, w.language, tuple(w.prompt_ids), _finite(submit.sampling.temperature), w.timestamps, submit.sampling.seed
    )


def _image(submit: pb.Submit, choice: pb.Choice) -> ImageWork:
    w = submit.image
    return ImageWork(w.prompt, w.width, w.height, w.steps, submit.sampling.seed, _finite(w.guidance), w.previews)


def _video(submit: pb.Submit, choice: pb.Choice) -> VideoWork:
    w = submit.video
    return VideoWork(w.prompt, w.width, w.height, w.frames, w.steps, submit.sampling.seed, _finite(w.guidance), w.fps)


_WORK: dict[str | None, Callable[[pb.Submit, pb.Choice], Work]] = {
    "speech": _speech,
    "embed": _embed,
    "transcribe": _transcribe,
    "image": _image,
    "video": _video,
}


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise InvalidCommand("numbers are finite")
    return value


def _sampling(message: pb.SamplingParams, vocab_size: int) -> Sampling:
    numbers = [message.temperature, message.top_p, message.min_p, message.presence_penalty, message.frequency_penalty]
    numbers += [entry.bias for entry in message.logit_bias]
    if not all(map(math.isfinite, numbers)) or message.max_tokens < 1:
        raise InvalidCommand("sampling parameters are finite, and max_tokens is 1 at least")
    if message.top_logprobs > MAX_TOP_LOGPROBS or len(message.logit_bias) > MAX_LOGIT_BIAS:
        raise InvalidCommand("too many logprobs or biases")
    if any(entry.token_id >= vocab_size for entry in message.logit_bias):
        raise InvalidCommand("a bias is for an id the model does not have")
    return Sampling(
        max_tokens=message.max_tokens,
        seed=message.seed,
        temperature=max(0.0, message.temperature),
        top_p=message.top_p,
        top_k=message.top_k,
        min_p=message.min_p,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=tuple((entry.token_id, entry.bias) for entry in message.logit_bias),
        top_logprobs=None if message.top_logprobs < 0 else message.top_logprobs,
        ignore_eos=message.ignore_eos,
    )


def delta_message(delta: Delta) -> pb.SequenceDelta:
    return pb.SequenceDelta(
        request_id=delta.request_id,
        attempt=delta.attempt,
        choice=delta.choice,
        first_index=delta.first_index,
        token_ids=delta.token_ids,
        logprobs=[_logprob_message(entry) for entry in delta.logprobs],
        finish_reason=_REASONS[delta.finish_reason] if delta.finish_reason else pb.FINISH_REASON_UNSPECIFIED,
        cached_tokens=delta.cached_tokens,
        error=delta.error,
        units=delta.units,
        media=delta.media,
        mime=delta.mime,
        preview=delta.preview,
    )


def _logprob_message(entry: Logprob) -> pb.TokenLogprob:
    top = [pb.TokenAlternative(token_id=token_id, logprob=logprob) for token_id, logprob in entry.top]
    return pb.TokenLogprob(token_id=entry.token_id, logprob=entry.logprob, top=top)


def folder_message(folder: Folder, models: Models) -> pb.ModelFolder:
    message = pb.ModelFolder(model=folder.name, error=folder.error, in_host_memory=folder.name in models.asleep)
    message.measured_bytes = measured = models.measured.get(folder.name, 0)
    if (size := folder.estimate) is not None:
        message.weight_bytes, message.activation_bytes = size.weights, size.activations
        message.kv_bytes_per_token, message.need_bytes = size.kv_token, max(size.need, measured)
    return message


def model_status(resident: Resident, held: int) -> pb.ModelStatus:
    status = pb.ModelStatus(
        model=resident.name,
        state=_STATES[resident.state],
        progress=resident.progress,
        error=resident.error,
        engine=_KIND_NUMBERS[resident.kind],
        stage=resident.stage,
        resident_bytes=held,
        kv_bytes=resident.kv_bytes,
        measured_bytes=resident.measured_bytes,
        idle_ms=int(resident.idle_seconds * 1000),
    )
    if resident.engine is not None and resident.runner is not None:
        load, runner = resident.engine.load, resident.runner
        status.max_running, status.running, status.waiting = resident.engine.max_sequences, load.running, load.waiting
        status.weight_bytes = runner.weight_bytes
        if isinstance(runner, TextRunner):
            status.max_model_len, status.forward_share = runner.max_model_len, load.forward_share
            status.kv_blocks_total, status.kv_blocks_free = load.tokens_total, max(0, load.tokens_free)
            status.prefill_ms_per_token = load.prefill_ms_per_token or runner.prefill_ms_per_token
            status.decode_ms_per_token = load.decode_ms_per_token or runner.decode_ms_per_token
        else:
            status.prefill_ms_per_token = runner.input_ms_per_unit
            status.decode_ms_per_token = load.decode_ms_per_token or runner.output_ms_per_unit
            status.voices.extend(runner.voices)
    return status
