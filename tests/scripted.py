"""A language model made of functions on text, and a world in which right and wrong are known.

The engine has a real tokenizer and goes through the real recorder and store; only what it says is
scripted. Questions are sums, one in five responses belongs to another question.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from siftline.kernels.draws import uniforms
from siftline.rows.schema import digest
from siftline.scoring.engines.base import Generation

_SUM = re.compile(r"What is (\d+) \+ (\d+)\?")


def truth(text: str) -> int:
    """The sum that the last question of a text asks for."""
    a, b = _SUM.findall(text)[-1]
    return int(a) + int(b)


def said(text: str) -> int | None:
    """The marked answer in a text."""
    found = re.findall(r"#### (-?\d+)", text)
    return int(found[-1]) if found else None


def made(text: str | None) -> Generation:
    """A whole draw, or one that was cut where there is no text."""
    return Generation("It" if text is None else text, 9, "length" if text is None else "stop")


class Scripted:
    """An engine that says what functions say.

    Args:
        name: Part of its fingerprint.
        tokenizer: A real one.
        says: (prompt, seed) -> text, or None for a draw cut at its length.
        votes: (prompt, options) -> log-probabilities.
    """

    def __init__(
        self,
        name: str,
        tokenizer: Any,
        says: Callable[[str, int], str | None] | None = None,
        votes: Callable[[str, list[str]], Any] | None = None,
    ) -> None:
        self.name, self.tokenizer, self.says, self.votes = name, tokenizer, says, votes
        self.max_length = 2048
        self.asked: list[str] = []

    def fingerprint(self) -> str:
        return digest("scripted", self.name)

    def generate(self, prompts, seeds, sampling):
        out = []
        for prompt, own in zip(prompts, seeds, strict=True):
            text = self.tokenizer.decode(prompt)
            self.asked.append(text)
            drawn = [self.says(text, seed) for seed in own]
            out.append([made(text) for text in drawn])
        return out

    def choices(self, prompts, options):
        texts = [self.tokenizer.decode(option).strip() for option in options]
        lines = []
        for prompt in prompts:
            text = self.tokenizer.decode(prompt)
            self.asked.append(text)
            lines.append(self.votes(text, texts))
        return np.array(lines, np.float32)

    def embed(self, tokens):
        """Counts of letters, unit length: texts that share letters are alike."""
        vectors = []
        for row in tokens:
            text = self.tokenizer.decode(row)
            self.asked.append(text)
            vectors.append(np.bincount([ord(c) % 64 for c in text], minlength=64) - 0.2)
        return np.array([v / np.linalg.norm(v) for v in vectors], np.float32)

    def close(self) -> None: ...


class ScriptedNli:
    """A cross-encoder to which texts with different marked answers contradict each other.

    More so where the first of the two is the longer one, so that the order shows.
    """

    labels, multi_label, max_length = ("entailment", "neutral", "Contradiction"), False, 2048

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = self._pair
        self._inner = tokenizer
        self.asked: list[tuple[str, str]] = []

    def _pair(self, first: str, second: str, verbose: bool = False) -> dict[str, list[int]]:
        return {"input_ids": self._inner(f"{first}\x1f{second}")["input_ids"]}

    def fingerprint(self) -> str:
        return digest("scripted nli")

    def classify(self, tokens):
        lines = []
        for row in tokens:
            first, second = self._inner.decode(row).split("\x1f")
            self.asked.append((first, second))
            share = self.against(first, second)
            lines.append(logs((1 - share) / 2, (1 - share) / 2, share))
        return np.array(lines, np.float32)

    @staticmethod
    def against(first: str, second: str) -> float:
        """Probability of a contradiction."""
        return 0.1 if said(first) == said(second) else 0.8 if len(first) > len(second) else 0.6

    def close(self) -> None: ...


def logs(*shares: float) -> list[float]:
    """Log-probabilities of shares."""
    return [float(np.log(share)) for share in shares]


@dataclass(frozen=True)
class World:
    """Rows in a file, and which of them are swapped, by question."""

    rows: list[dict[str, Any]]
    swapped: set[str]

    def write(self, folder: Path) -> Path:
        path = folder / "pool.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        return path


def make_world(count: int = 60, referenced: float = 0.4) -> World:
    """Sums of which exactly a fifth have the response of their neighbour.

    Args:
        count: Rows, a multiple of 10.
        referenced: Share of rows with an independent answer.
    """
    sums = [(3 + 7 * i, 5 + 11 * i) for i in range(count)]
    questions = [f"What is {a} + {b}?" for a, b in sums]
    u = uniforms(5, "referenced", questions)
    rows, swapped = [], set()
    for i, question in enumerate(questions):
        wrong = i % 5 == 0
        a, b = sums[i + 1] if wrong else sums[i]
        row = {
            "question": question,
            "response": f"It makes {a + b}.\n#### {a + b}",
            "answer": str(truth(question)) if u[i] < referenced else None,
            "source": "odd" if i % 2 else "even",
        }
        rows.append(row)
        if wrong:
            swapped.add(question)
    return World(rows, swapped)


def noisy_sampler(right: float) -> Callable[[str, int], str]:
    """A model that gets each sum right with a probability."""

    def says(prompt: str, seed: int) -> str:
        u, v = uniforms(seed, "scripted draw", [prompt, prompt + "!"])
        value = truth(prompt) + (0 if u < right else 1 + int(v * 50))
        return f"I get {value}.\n#### {value}"

    return says


def noisy_judge(prompt: str, options: list[str]) -> list[float]:
    """Believes right answers more than wrong ones, on the whole; of two it picks the right one."""
    if "Which answer is better?" in prompt:
        return perfect_pairs(prompt)
    proposed = prompt.split("Proposed answer:")[1]
    right = said(proposed.split("Is the proposed")[0]) == truth(prompt)
    noise = float(uniforms(0, "scripted judge", [prompt])[0]) - 0.5
    share = min(max((0.65 if right else 0.35) + 0.9 * noise, 0.02), 0.98)
    rest = (1.0 - share) / (len(options) - 1)
    return logs(share, *[rest] * (len(options) - 1))


def perfect_pairs(prompt: str) -> list[float]:
    """A for the answer that is right."""
    first, second = re.split(r"Answer B:", prompt.split("Answer A:")[1])
    rights = [said(text) == truth(prompt) for text in (first, second)]
    return (
        logs(0.95, 0.05)
        if rights[0] and not rights[1]
        else (logs(0.05, 0.95) if rights[1] and not rights[0] else logs(0.5, 0.5))
    )
