"""Names a model by what it computes: hashes of its files, dtype and backend.

Two copies of a model in different folders share their scores in the store; one changed weight makes
every score new. Only files that decide the numbers are read: model cards, optimizer states and logs
that lie beside them do not count, nor do paths that Hugging Face writes into its JSON files.

A model that was trained here lists the hashes of its files (`record_files`). There a changed weight
is no other model but a damaged one, and an error. A model from elsewhere has no such list.
"""

import hashlib
import json
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from siftline.rows.published import LISTED
from siftline.rows.shards import write_json
from siftline.rows.verified import confirm, file_hash, read_hashed, with_hash
from siftline.scoring.engines.base import ModelSpec, check_directory

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
RECORDS = ("training.json", "curve.csv", "skipped.csv", "warmup.json")
"""What training writes beside a model and reads back."""
RETRAIN = "remove the folder and run again: it is trained again"


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
    return file_hash(path)


def record_files(folder: Path) -> None:
    """Lists the hashes of a trained model's files; the last step of training.

    Files that a later hand may add or change (a card, a log) are not listed.
    """
    names = (*(name for name in PATTERNS if "/" not in name), *RECORDS)
    listed = {}
    for path in sorted(folder.rglob("*")):
        within = path.relative_to(folder)
        passing = any(part.startswith((".", "checkpoint")) for part in within.parts)
        if path.is_file() and not passing and any(fnmatch(path.name, name) for name in names):
            listed[within.as_posix()] = file_hash(path)
    write_json(folder / LISTED, with_hash({"files": listed}))


def confirm_files(folder: Path) -> None:
    """Compares a model's files with the list of their hashes, where it has one.

    Raises:
        AlteredError: if the list or a file is not what training wrote.
    """
    path = folder / LISTED
    if not path.exists():
        return
    files = read_hashed(path, "a list of a model's files", RETRAIN)["files"]
    for name, sha256 in files.items():
        confirm(folder / name, sha256, RETRAIN)


def _digest_files(folder: Path, files: Sequence[str]) -> str:
    """Hash of the files' names within the folder and contents."""
    running = hashlib.sha256()
    for name in files:
        running.update(f"{name}\x1f{_digest_file(folder / name)}\x1e".encode())
    return running.hexdigest()


def _model_files(folder: Path) -> list[str]:
    """Names of the files in `folder` that decide numbers."""
    found = []
    for path in sorted(folder.glob("*")) + sorted(folder.glob("[0-9]_*/*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and any(fnmatch(name, pattern) for pattern in PATTERNS):
            found.append(name)
    return sorted(found)


def _has_weights(files: Sequence[str]) -> bool:
    return any(name.endswith((".safetensors", ".bin")) for name in files)


def directory_digest(folder: Path) -> str:
    """sha256 of the model files in `folder`, cached until a file changes.

    Raises:
        ValueError: if the folder holds no weights.
        AlteredError: if it was trained here and is not what training wrote.
    """
    confirm_files(folder)
    files = _model_files(folder)
    if not _has_weights(files):
        raise ValueError(f"{str(folder)!r} has no weights: expected a .safetensors file")
    return _digest_files(folder, files)


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
    confirm_files(folder)
    if not spec.revision:
        raise ValueError(
            f"{spec.path!r} has no weights, so nothing tells which model the server runs: set the "
            "model's revision (say, a commit) or give a path with the weights"
        )
    return _digest_files(folder, files)


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
