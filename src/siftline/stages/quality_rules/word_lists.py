"""Listed words in texts: what a user does not want to see, by a file of the user's own."""

from collections.abc import Sequence

from siftline.kernels.text import words as plain_words


class WordList:
    """Words and phrases to be found in texts, whatever their case and punctuation."""

    def __init__(self, lines: Sequence[str]) -> None:
        """Takes one word or phrase a line; empty lines are none."""
        phrases = {tuple(found.split()) for line in lines if (found := plain_words(line))}
        if not phrases:
            raise ValueError("the word list has no word: give one word or phrase a line")
        self._phrases = phrases
        self._lengths = sorted({len(phrase) for phrase in phrases})

    def count(self, text: str) -> int:
        """How often the text has one of them; a word inside a longer one of the list counts too."""
        words = plain_words(text).split()
        return sum(
            tuple(words[i : i + n]) in self._phrases
            for n in self._lengths
            for i in range(len(words) - n + 1)
        )
