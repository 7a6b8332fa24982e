"""Saved posteriors changed as an attacker would."""

import json
from pathlib import Path

from safetensors.torch import load_file, save

from laplace_lora.storage.files import CONFIG, TENSORS, checksum


def forge(folder: Path, **changes) -> None:
    """Change the configuration and sign it again, as an attacker would."""
    config = json.loads((folder / CONFIG).read_text())
    config.pop("checksum")
    config.update(changes)
    (folder / CONFIG).write_text(json.dumps({**config, "checksum": checksum(config)}))


def forge_tensors(folder: Path, change) -> None:
    import hashlib

    tensors = load_file(folder / TENSORS)
    change(tensors)
    payload = save({name: t.contiguous() for name, t in tensors.items()})
    (folder / TENSORS).write_bytes(payload)
    forge(folder, tensors=hashlib.sha256(payload).hexdigest())
