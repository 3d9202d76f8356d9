"""Names a model by what it computes: hashes of its files, dtype and backend.

Two copies of a model in different folders share their scores in the store; one changed weight makes
every score new. Only files that decide the numbers are read: model cards, optimizer states and logs
that lie beside them do not count, nor do paths that Hugging Face writes into its JSON files.
"""

import hashlib
import json
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any

from siftline.scoring.engines import ModelSpec, check_directory

PATTERNS = (
    "config.json",
    "generation_config.json",  # end-of-sequence ids
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "adapter_config.json",
    "adapter_model.bin",
    "tokenizer*",
    "*.tiktoken",
    "*.model",  # SentencePiece
    "vocab.*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "*.py",  # remote code
    "modules.json",  # sentence-transformers, and its numbered module folders
    "*sentence*_config.json",
    "config_sentence_transformers.json",
    "[0-9]_*/*",
)
FREE_KEYS = (
    "_name_or_path",
    "name_or_path",
    "base_model_name_or_path",
    "transformers_version",
)
CHUNK = 1 << 22


def _digest_json(path: Path) -> str | None:
    """Hash of a JSON object without its paths and versions; None if the file holds no object."""
    content: Any = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        return None
    kept = {key: value for key, value in content.items() if key not in FREE_KEYS}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _digest_file(path: Path) -> str:
    if path.name.endswith("config.json"):
        digest = _digest_json(path)
        if digest is not None:
            return digest
    running = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            running.update(chunk)
    return running.hexdigest()


@lru_cache(maxsize=64)
def _digest_files(folder: str, files: tuple[tuple[str, int, int], ...]) -> str:
    """Hash of the files' names within the folder and contents; times and sizes key the cache."""
    running = hashlib.sha256()
    for name, _, _ in files:
        running.update(f"{name}\x1f{_digest_file(Path(folder) / name)}\x1e".encode())
    return running.hexdigest()


def _model_files(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, time and size of the files in `folder` that decide numbers."""
    found = []
    for path in sorted(folder.glob("*")) + sorted(folder.glob("[0-9]_*/*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and any(fnmatch(name, pattern) for pattern in PATTERNS):
            status = path.stat()
            found.append((name, status.st_mtime_ns, status.st_size))
    return tuple(sorted(found))


def _has_weights(files: tuple[tuple[str, int, int], ...]) -> bool:
    return any(name.endswith((".safetensors", ".bin")) for name, _, _ in files)


def directory_digest(folder: Path) -> str:
    """sha256 of the model files in `folder`, read in chunks, cached until a file changes.

    Raises:
        ValueError: if the folder holds no weights.
    """
    files = _model_files(folder)
    if not _has_weights(files):
        raise ValueError(f"{str(folder)!r} has no weights: expected a .safetensors file")
    return _digest_files(str(folder.resolve()), files)


def model_digest(spec: ModelSpec) -> str:
    """`directory_digest` of the model of `spec`; the weights may be at its server alone.

    Then the digest is that of the tokenizer and configuration, and `spec.revision`, which
    `model_fingerprint` adds, stands for the weights.

    Raises:
        ValueError: if the directory is missing, or holds no weights and they are not at a server
            or have no revision.
    """
    folder = check_directory(spec)
    files = _model_files(folder)
    if spec.engine != "server" or _has_weights(files):
        return directory_digest(folder)
    if not spec.revision:
        raise ValueError(
            f"{spec.path!r} has no weights, so nothing tells which model the server runs: set the "
            "model's revision (say, a commit) or give a path with the weights"
        )
    return _digest_files(str(folder.resolve()), files)


def model_fingerprint(spec: ModelSpec, backend: str, version: str) -> str:
    """Hash of everything that decides the numbers of `spec` run by one backend.

    Args:
        spec: The model; its path, server, device and batch size do not count.
        backend: Engine name, say "transformers".
        version: What the backend's numerics depend on, say "torch 2.13, engine 1".

    Returns:
        64 hex digits.

    Raises:
        ValueError: if a directory is missing, or holds no weights (see `model_digest`).
    """
    parts = {
        "model": model_digest(spec),
        "adapter": directory_digest(Path(spec.adapter).expanduser()) if spec.adapter else None,
        "dtype": spec.dtype,
        "template": spec.template,
        "backend": backend,
        "version": version,
    }
    if spec.revision is not None:  # absent, it leaves the fingerprints of earlier versions alone
        parts["revision"] = spec.revision
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
