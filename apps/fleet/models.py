"""Which models exist, and which machines may serve them. Private to this app: others use selectors, services, registry."""

from __future__ import annotations

from django.core.validators import RegexValidator
from django.db import models
from django.utils import timezone

_FOLDER = RegexValidator(r"^[a-z0-9][a-z0-9._-]*$", "Use small letters, digits, dots and dashes.")
_REVISION = RegexValidator(r"^[A-Za-z0-9][A-Za-z0-9._-]*$", "Use letters, digits, dots, dashes and underscores.")
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


class Host(models.Model):
    """A machine with workers."""

    name = models.SlugField(max_length=63, unique=True)
    address = models.CharField(max_length=200, help_text="Name or IP address by which the site reaches it.")
    added_at = models.DateTimeField(default=timezone.now, editable=False)

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
    is_enabled = models.BooleanField(default=True, help_text="A disabled worker is given no requests.")
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
