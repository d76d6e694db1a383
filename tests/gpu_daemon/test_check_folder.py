"""Model folders that want to harm: each is refused as bytes, before any library of models is even imported."""

from __future__ import annotations

import json
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from gpu_daemon.check_folder import UnsafeFolder, check_folder
from tests.services import ROOT


def safetensors(header: object, content: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + content


def tensor(start: int = 0, stop: int = 8, dtype: str = "F32", shape: object = (2,)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


SOUND = safetensors({"__metadata__": {"format": "pt"}, "a": tensor(), "b": tensor(8, 12, "BF16", [2, 1])}, bytes(12))


@pytest.fixture
def folder(tmp_path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (model / "model.safetensors").write_bytes(SOUND)
    return model


def test_a_sound_folder_passes(folder) -> None:
    (folder / "README.md").write_text("words")
    (folder / "link.json").symlink_to(folder / "config.json")
    check_folder(folder)


@pytest.mark.parametrize(
    "data",
    {
        "nothing": b"",
        "a pickle by another name": pickle.dumps({"weights": 1}),
        "a header longer than the file": safetensors({}, length=1 << 40),
        "no JSON": safetensors(b"{" * 50),
        "a list": safetensors([]),
        "a tensor without offsets": safetensors({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
        "a tensor beyond the end": safetensors({"a": tensor(0, 16, shape=[4])}, bytes(8)),
        "content that is not described": safetensors({"a": tensor()}, bytes(4096)),
        "tensors that overlap": safetensors({"a": tensor(), "b": tensor(4, 12)}, bytes(12)),
        "a hole": safetensors({"a": tensor(), "b": tensor(12, 20)}, bytes(20)),
        "a shape that disagrees": safetensors({"a": tensor(shape=[3])}, bytes(8)),
        "a negative shape": safetensors({"a": tensor(shape=[-1, -2])}, bytes(8)),
        "a shape of words": safetensors({"a": tensor(shape="22")}, bytes(8)),
        "a nested shape": safetensors({"a": tensor(shape=[[2]])}, bytes(8)),
        "backward offsets": safetensors({"a": tensor(8, 0)}, bytes(8)),
        "an unknown type": safetensors({"a": tensor(dtype="OBJECT")}, bytes(8)),
        "JSON as deep as the stack": safetensors(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_safetensors_file_must_be_what_its_header_says(folder, data) -> None:
    (folder / "model.safetensors").write_bytes(data[1])
    with pytest.raises(UnsafeFolder, match=r"model/model\.safetensors "):
        check_folder(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "sub/weights.PKL", "modeling_x.py", "x.ckpt", "lib.so"])
def test_what_could_run_code_is_refused(folder, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"")
    with pytest.raises(UnsafeFolder, match="could run code"):
        check_folder(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("config.json", {"auto_map": {"AutoModel": "modeling.Evil"}}),
        ("config.json", {"text_config": {"auto_map": {}}}),
        ("tokenizer_config.json", {"parts": [{"auto_map": ["x", None]}]}),
        ("vae/config.json", {"auto_map": {}}),
        ("model_index.json", {"_class_name": ["pipeline", "Evil"]}),
        ("model_index.json", {"_class_name": "X", "unet": ["my_code", "Evil"]}),
        ("model_index.json", {"_class_name": "X", "unet": ["diffusers"]}),
        ("model_index.json", ["X"]),
        ("config.json", "[" * 100_000),
        ("config.json", "no JSON"),
        ("model.safetensors.index.json", {"weight_map": {"a": "../other/model.safetensors"}}),
        ("model.safetensors.index.json", {"weight_map": {"a": "model.bin"}}),
        ("model.safetensors.index.json", {"weight_map": {"a": 1}}),
        ("model.safetensors.index.json", []),
    ],
)
def test_a_config_that_names_code_or_other_files_is_refused(folder, name: str, value: object) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
    with pytest.raises(UnsafeFolder, match=name.replace(".", r"\.")):
        check_folder(folder)


def test_a_link_that_leads_away_is_refused(folder, tmp_path) -> None:
    (tmp_path / "secret.json").write_text("{}")
    (folder / "words.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(UnsafeFolder, match="leads out of the folder"):
        check_folder(folder)
    (folder / "words.json").unlink()
    (folder / "sub").symlink_to(tmp_path)
    with pytest.raises(UnsafeFolder, match="leads out of the folder"):
        check_folder(folder)
    (folder / "sub").unlink()
    (folder / "gone.json").symlink_to(folder / "nothing")
    with pytest.raises(UnsafeFolder, match="not a file"):
        check_folder(folder)


class Canary:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self):
        return Path.write_text, (self._path, "sang")


def test_refusal_comes_before_any_import_and_nothing_runs(folder, tmp_path) -> None:
    canary = tmp_path / "canary"
    (folder / "model.safetensors").write_bytes(pickle.dumps(Canary(canary)))
    (folder / "sitecustomize.txt").write_text("")
    program = (
        "import sys; from pathlib import Path; from gpu_daemon.check_folder import UnsafeFolder, check_folder\n"
        "try: check_folder(Path(sys.argv[1]))\n"
        "except UnsafeFolder: print(sorted(set(sys.modules) & {'torch', 'transformers', 'safetensors', 'numpy', 'pickle'}))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(folder)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n"
    assert not canary.exists()
