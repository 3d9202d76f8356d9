"""Which of several copies stays: the policy as a number for every row, smaller is kept first."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

Policy = Literal["first", "longest", "score", "source", "none"]
FORMS = "first, longest, none, score:COLUMN or source:COLUMN=A,B,..."


@dataclass(frozen=True)
class Keep:
    """A policy; ties always go to the earlier row.

    Attributes:
        policy: first in row order; longest text in characters; highest score; the source that is
            named first; none of them.
        column: Where the score or the source stands.
        sources: Sources in order; others come after all of them.
    """

    policy: Policy = "first"
    column: str | None = None
    sources: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Keep":
        """Reads a policy as the command line takes it.

        Raises:
            ValueError: if it is none of FORMS.
        """
        if text in ("first", "longest", "none"):
            return cls(text)  # type: ignore[arg-type]
        policy, _, rest = text.partition(":")
        if policy == "score" and rest:
            return cls("score", rest)
        column, mark, names = rest.partition("=")
        if policy == "source" and column and mark and names:
            return cls("source", column, tuple(names.split(",")))
        raise ValueError(f"keep={text!r}: give {FORMS}")

    def __str__(self) -> str:
        if self.policy == "source":
            return f"source:{self.column}={','.join(self.sources)}"
        return f"score:{self.column}" if self.policy == "score" else self.policy

    @property
    def ordered(self) -> bool:
        """Whether anything but the row's place decides."""
        return self.policy not in ("first", "none")

    def priority(self, text: pa.Array, column: pa.Array | None) -> np.ndarray:
        """One number a row, float64, smaller is kept first; what is missing comes last.

        Args:
            text: The texts of n rows.
            column: Their scores or sources, where the policy has a column.

        Raises:
            ValueError: if scores are not numbers.
        """
        if not self.ordered:
            return np.zeros(len(text), np.float64)
        import pyarrow.compute as pc  # 0.03 s, and most policies need none of it

        if self.policy == "longest":
            found = pc.negate(pc.cast(pc.utf8_length(text.cast(pa.large_string())), pa.float64()))
        elif self.policy == "score":
            assert column is not None
            kind = column.type
            if pa.types.is_null(kind):
                return np.full(len(text), np.inf)
            numeric = pa.types.is_integer(kind) or pa.types.is_floating(kind)
            if not (numeric or pa.types.is_decimal(kind) or pa.types.is_boolean(kind)):
                raise ValueError(f"column {self.column!r} holds {kind}: a score must be a number")
            if pa.types.is_boolean(kind):
                column = column.cast(pa.int8())
            found = pc.negate(column.cast(pa.float64(), safe=False))
        else:
            assert column is not None
            names = pa.array(self.sources, pa.string())
            place = pc.index_in(column.cast(pa.string()), names)
            found = pc.cast(pc.fill_null(place, len(self.sources)), pa.float64())
        values = found.to_numpy(zero_copy_only=False).astype(np.float64)
        return np.where(np.isnan(values), np.inf, values)


def as_integers(values: np.ndarray) -> np.ndarray:
    """int64 numbers in the order of some floats, 0.0 and -0.0 equal; none may be NaN."""
    # Bits of floats order as integers do, once those of negative ones are turned over.
    bits = (values + 0.0).view(np.int64)
    return np.where(bits < 0, bits ^ np.int64(2**63 - 1), bits)
