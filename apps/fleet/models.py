"""Which models exist, and which machines may serve them. Private to this app: others use selectors, services, registry."""

from __future__ import annotations

from django.core.validators import MaxValueValidator, MinValueValidator, RegexValidator
from django.db import models
from django.utils import timezone

_FOLDER = RegexValidator(r"^[a-z0-9][a-z0-9._-]*$", "Use small letters, digits, dots and dashes.")
_REVISION = RegexValidator(r"^[A-Za-z0-9][A-Za-z0-9._-]*$", "Use letters, digits, dots, dashes and underscores.")
HOST_ADDRESS = r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,198}[A-Za-z0-9])?|[0-9A-Fa-f:]{2,45}"
SSH_USER = r"[a-z_][a-z0-9_-]{0,31}"
SSH_HOST_KEY = r"ssh-ed25519 [A-Za-z0-9+/]{68}"
_ADDRESS = RegexValidator(r"^[A-Za-z0-9.\-\[\]:]+:\d{1,5}$", "Write it as host:port.")


class Modality(models.TextChoices):
    TEXT = "text"
    VISION = "vision"
    SPEECH = "speech"
    IMAGE = "image"
    VIDEO = "video"
    EMBEDDING = "embedding"
    TRANSCRIPTION = "transcription"


class EngineKind(models.TextChoices):
    CONTINUOUS = "continuous"
    STATIC = "static"


class Model(models.Model):
    """One entry of the catalogue. Facts are the publisher's; sizes are in bytes and tokens."""

    name = models.CharField(max_length=100, unique=True, validators=[_FOLDER], help_text="What requests call it.")
    title = models.CharField(max_length=100)
    modality = models.CharField(max_length=20, choices=Modality.choices)
    publisher = models.CharField(max_length=100)
    licence = models.CharField(max_length=100)
    parameters = models.BigIntegerField()
    weight_bytes = models.BigIntegerField(help_text="At its published precision.")
    kv_bytes_per_token = models.IntegerField(default=0)
    context_length = models.IntegerField(default=0, help_text="Tokens; 0 where the model has no context.")
    thinking = models.BooleanField(default=False)
    is_enabled = models.BooleanField(default=True, help_text="Requests for a disabled model are refused as unknown.")
    engine = models.CharField(
        max_length=10,
        choices=EngineKind.choices,
        default=EngineKind.CONTINUOUS,
        help_text="How its requests are batched: continuously, or one generate() call a batch, to compare. "
        "Workers that hold the model load it again.",
    )
    revision = models.CharField(
        max_length=40,
        blank=True,
        validators=[_REVISION],
        help_text="Workers serve the folder NAME@REVISION, and go over to it one by one; empty: the folder NAME.",
    )
    idle_unload_seconds = models.PositiveIntegerField(
        null=True, blank=True, help_text="Unloaded when unused for so long, unless placed; 0: never; empty: MODEL_IDLE_SECONDS."
    )
    measured_bytes = models.BigIntegerField(
        default=0, editable=False, help_text="The most that a worker measured for weights and activations."
    )
    source = models.CharField(max_length=200, blank=True, help_text="Where `manage.py models pull` finds its weights.")
    published_at = models.DateField()

    class Meta:
        ordering = ("modality", "parameters")

    def __str__(self) -> str:
        return self.name


class Mode(models.TextChoices):
    """What a host's devices do: each for itself, or all together for one model."""

    INDIVIDUAL = "individual"
    TENSOR_PARALLEL = "tensor_parallel"


def _whole(shape: str, message: str) -> RegexValidator:
    return RegexValidator(rf"\A(?:{shape})\Z", message)


class Host(models.Model):
    """A machine with workers. The site starts and stops the daemons of a managed one, over SSH.

    Only workers of its mode, at its epoch, are routed to; `epoch` and `is_cordoned` are the mode switch's.
    """

    name = models.SlugField(max_length=63, unique=True)
    address = models.CharField(
        max_length=200,
        validators=[_whole(HOST_ADDRESS, "Write a name or an IP address.")],
        help_text="Name or IP address by which the site reaches it.",
    )
    added_at = models.DateTimeField(default=timezone.now, editable=False)
    is_managed = models.BooleanField(default=False, help_text="The site starts and stops its daemons, over SSH.")
    ssh_user = models.CharField(max_length=32, default="inference", validators=[_whole(SSH_USER, "Write a user's name.")])
    ssh_port = models.PositiveIntegerField(default=22, validators=[MinValueValidator(1), MaxValueValidator(65535)])
    ssh_host_key = models.CharField(
        max_length=100,
        blank=True,
        validators=[_whole(SSH_HOST_KEY, "Write it as ssh-ed25519 AAAA..., without a comment.")],
        help_text="The public key by which the host is known: /etc/ssh/ssh_host_ed25519_key.pub. No other is believed.",
    )
    may_switch_itself = models.BooleanField(default=False, help_text="Unmet demand may change its mode.")
    mode = models.CharField(max_length=20, choices=Mode.choices, default=Mode.INDIVIDUAL, editable=False)
    epoch = models.PositiveBigIntegerField(default=1, editable=False)
    is_cordoned = models.BooleanField(default=False, editable=False)
    unswept_epoch = models.PositiveBigIntegerField(null=True, editable=False)  # daemons of a switch undone may still be there

    class Meta:
        ordering = ("name",)

    def __str__(self) -> str:
        return self.name


class Gpu(models.Model):
    """A device of a host, as its worker reported it."""

    host = models.ForeignKey(Host, on_delete=models.CASCADE, related_name="gpus")
    device = models.CharField(max_length=20, help_text="cuda:0, or cpu")
    name = models.CharField(max_length=100, blank=True)
    memory_bytes = models.BigIntegerField(default=0)

    class Meta:
        ordering = ("host", "device")
        verbose_name = "GPU"
        constraints = [models.UniqueConstraint(fields=["host", "device"], name="one_row_a_device")]

    def __str__(self) -> str:
        return f"{self.host}/{self.device}"


class Worker(models.Model):
    """A daemon and where it listens. Its live state is in the registry; `status` is the controller's last word."""

    name = models.SlugField(max_length=63, unique=True)
    host = models.ForeignKey(Host, on_delete=models.CASCADE, related_name="workers")
    gpu = models.ForeignKey(Gpu, on_delete=models.SET_NULL, null=True, blank=True, related_name="workers")
    address = models.CharField(max_length=200, unique=True, validators=[_ADDRESS])
    mode = models.CharField(
        max_length=20, choices=Mode.choices, default=Mode.INDIVIDUAL, help_text="In which mode of a managed host it runs."
    )
    is_enabled = models.BooleanField(default=True, help_text="A disabled worker is let go of; what it runs moves elsewhere.")
    is_draining = models.BooleanField(default=False, help_text="It is given nothing more; what it runs ends there in peace.")
    status = models.CharField(max_length=200, default="never seen", editable=False)
    seen_at = models.DateTimeField(null=True, editable=False)

    class Meta:
        ordering = ("name",)

    def __str__(self) -> str:
        return self.name


class Placement(models.Model):
    """The wish that a worker hold a model. The controller makes it so, and says here how far it is."""

    model = models.ForeignKey(Model, on_delete=models.CASCADE, related_name="placements")
    worker = models.ForeignKey(Worker, on_delete=models.CASCADE, related_name="placements")
    is_pinned = models.BooleanField(default=False, help_text="Never evicted to make room.")
    state = models.CharField(max_length=200, default="wanted", editable=False)

    class Meta:
        ordering = ("model", "worker")
        constraints = [models.UniqueConstraint(fields=["model", "worker"], name="one_placement")]

    def __str__(self) -> str:
        return f"{self.model} on {self.worker}"


class UnloadWish(models.Model):
    """The wish that a worker let go of a model, this once; the controller deletes it when that is done. With
    `once_elsewhere` not before another worker serves the model."""

    model = models.ForeignKey(Model, on_delete=models.CASCADE, related_name="unload_wishes")
    worker = models.ForeignKey(Worker, on_delete=models.CASCADE, related_name="unload_wishes")
    once_elsewhere = models.BooleanField(default=False)
    asked_at = models.DateTimeField(default=timezone.now)

    class Meta:
        ordering = ("pk",)
        constraints = [models.UniqueConstraint(fields=["model", "worker"], name="one_unload_wish")]

    def __str__(self) -> str:
        return f"{self.model} off {self.worker}"


class Movement(models.Model):
    """What a worker was had to do, as it ended: unload `evicted`, then load `loaded`; either may be nothing. Folders."""

    worker = models.ForeignKey(Worker, on_delete=models.CASCADE, related_name="movements")
    loaded = models.CharField(max_length=150, blank=True)
    evicted = models.CharField(max_length=500, blank=True, help_text="Separated by blanks.")
    reason = models.CharField(max_length=200)
    from_host_memory = models.BooleanField(default=False)
    started_at = models.DateTimeField()
    ended_at = models.DateTimeField(default=timezone.now)
    error = models.CharField(max_length=200, blank=True)

    class Meta:
        ordering = ("-pk",)
        indexes = [models.Index(fields=["loaded", "worker"])]

    def __str__(self) -> str:
        return f"{self.worker}: {self.loaded or 'nothing'} for {self.evicted or 'nothing'}"


class SwitchState(models.TextChoices):
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    ROLLED_BACK = "rolled_back", "rolled back"
    FAILED = "failed"


class ModeSwitch(models.Model):
    """One change of a host's mode, from the request to its end. `epoch` is the new mode's; the one after it is kept for the
    way back. `runner` is the controller at work on it, which fences the ones before."""

    host = models.ForeignKey(Host, on_delete=models.CASCADE, related_name="switches")
    from_mode = models.CharField(max_length=20, choices=Mode.choices)
    to_mode = models.CharField(max_length=20, choices=Mode.choices)
    from_epoch = models.PositiveBigIntegerField()
    epoch = models.PositiveBigIntegerField()
    state = models.CharField(max_length=12, choices=SwitchState.choices, default=SwitchState.RUNNING)
    reason = models.CharField(max_length=300, blank=True, help_text="Why it was rolled back, or failed.")
    requested_by = models.CharField(max_length=150)
    runner = models.CharField(max_length=100, blank=True)
    created_at = models.DateTimeField(default=timezone.now)
    ended_at = models.DateTimeField(null=True)

    class Meta:
        ordering = ("-created_at",)
        verbose_name_plural = "mode switches"
        constraints = [
            models.UniqueConstraint(fields=["host"], condition=models.Q(ended_at=None), name="one_switch_a_host_at_a_time")
        ]

    def __str__(self) -> str:
        return f"{self.host} to {self.to_mode}"


class ModeSwitchStep(models.Model):
    """One step of a switch, tried once. Neither ended nor judged: it runs, or its controller died under it."""

    switch = models.ForeignKey(ModeSwitch, on_delete=models.CASCADE, related_name="steps")
    step = models.CharField(max_length=20)
    started_at = models.DateTimeField(default=timezone.now)
    ended_at = models.DateTimeField(null=True)
    succeeded = models.BooleanField(null=True)
    detail = models.CharField(max_length=300, blank=True)

    class Meta:
        ordering = ("pk",)

    def __str__(self) -> str:
        return f"{self.switch}: {self.step}"
