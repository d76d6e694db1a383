"""Fails unless the committed stubs are what `make protos` makes of the .proto file."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUTPUTS = ("--python_out", "--grpc_python_out", "--mypy_out", "--mypy_grpc_out")


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "grpc_tools.protoc", "-I", ".", *(f"{name}={folder}" for name in OUTPUTS)]
        environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
        subprocess.run([*command, "protos/inference.proto"], cwd=ROOT, env=environment, check=True)
        made = sorted(Path(folder, "protos").iterdir())
        stale = [path.name for path in made if (ROOT / "protos" / path.name).read_bytes() != path.read_bytes()]
    if stale:
        sys.stderr.write(f"out of step with inference.proto: {', '.join(stale)}; run `make protos`\n")
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())
