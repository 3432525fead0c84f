"""What a verification found: differences per token and position, limits, and the verdict.

Plain data, its JSON form and its text form. Measures tensors that it is given; runs no model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Positions:
    """Differences of the tokens at positions ``first`` to ``last``, both included.

    The token at position 0 of a sequence is predicted by nothing, so positions start at 1.
    """

    first: int
    last: int
    mean: float
    maximum: float


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Absolute differences of two sets of log-probabilities, in nats.

    Attributes:
        mean: over all tokens.
        maximum: over all tokens.
        worst_sequence: where the maximum is.
        worst_position: position of that token in its sequence.
        worst_mean_position: position whose mean over the sequences is largest.
        positions: ranges that double in length; an error of RoPE grows along them.
    """

    mean: float
    maximum: float
    worst_sequence: int
    worst_position: int
    worst_mean_position: int
    positions: tuple[Positions, ...]

    @classmethod
    def between(cls, one_BP: Tensor, other_BP: Tensor) -> Difference:
        """Measure two tensors [sequences, positions]; NaN anywhere makes mean and maximum NaN."""
        gap_BP = (one_BP - other_BP).abs()
        sequence, index = divmod(int(gap_BP.argmax()), gap_BP.shape[1])
        return cls(
            mean=gap_BP.mean().item(),
            maximum=gap_BP.max().item(),
            worst_sequence=sequence,
            worst_position=index + 1,
            worst_mean_position=int(gap_BP.mean(0).argmax()) + 1,
            positions=tuple(_positions(gap_BP)),
        )


def _positions(gap_BP: Tensor) -> Iterator[Positions]:
    first, count = 1, gap_BP.shape[1]
    while first <= count:
        last = min(2 * first - 1, count)
        part = gap_BP[:, first - 1 : last]
        yield Positions(first=first, last=last, mean=part.mean().item(), maximum=part.max().item())
        first = last + 1


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison with its limits.

    Attributes:
        name: the dtype of the computation.
        compared: which two models.
        difference: what was found.
        mean_limit: largest mean that passes.
        maximum_limit: largest maximum that passes.
        because: where the limits come from, with the numbers.
        yardstick: the difference that the limits are multiples of.
        source_nats: mean negative log-probability per token of the source in this dtype.
        other_nats: the same of what it was compared with.
        direct: the two models in this dtype against each other, if ``difference`` is against
            another dtype; has no limit.
    """

    name: str
    compared: str
    difference: Difference
    mean_limit: float
    maximum_limit: float
    because: str
    yardstick: Difference
    source_nats: float
    other_nats: float
    direct: Difference | None = None

    @property
    def passed(self) -> bool:
        """Whether both numbers are within their limits; a NaN is not."""
        found = self.difference
        return found.mean <= self.mean_limit and found.maximum <= self.maximum_limit


@dataclass(frozen=True, kw_only=True)
class VerificationReport:
    """The end of a conversion.

    Attributes:
        source: where Megatron's weights came from.
        other: what was compared with them: a Hugging Face folder or other weights.
        other_forward: whose code ran it, and how.
        text: origin of the tokens.
        sequences: sequences of ``sequence_length`` tokens.
        sequence_length: tokens, of which the first is predicted by nothing.
        checks: comparisons of log-probabilities.
        compared_tensors: tensors of the output that were compared bit for bit with what should
            stand there; 0 if it was not known.
        wrong_tensors: a line for each that is missing, surplus or different, and for wrong
            multipliers of config.json.
        uniform: the source predicts every id with 1/V, as a zero readout does: then the checks
            would pass whatever stands behind the readout.
    """

    source: str
    other: str
    other_forward: str
    text: str
    sequences: int
    sequence_length: int
    checks: tuple[Check, ...]
    compared_tensors: int
    wrong_tensors: tuple[str, ...]
    uniform: bool = False

    @property
    def passed(self) -> bool:
        """Whether both compute one function, and the output holds what it should.

        Not where nothing could have failed.
        """
        shown = self.compared_tensors > 0 or not self.uniform
        return shown and not self.wrong_tensors and all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Plain data; numbers that JSON cannot hold become None."""
        data = dataclasses.asdict(self) | {"passed": self.passed}
        for check, entry in zip(self.checks, data["checks"], strict=True):
            entry["passed"] = check.passed
        plain: dict[str, Any] = _finite(data)
        return plain

    def render(self) -> str:
        """The report as lines of text."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        verdict = "passed" if self.passed else "FAILED"
        yield f"Verification {verdict}: {self.other} against {self.source}"
        yield f"  run by {self.other_forward}; {self.source} by Megatron"
        yield f"  text: {self.text}; {self.sequences} sequence(s) of {self.sequence_length} tokens"
        if self.compared_tensors:
            yield f"  tensors: {self.compared_tensors} compared bit for bit"
        for line in self.wrong_tensors[:_LISTED]:
            yield f"  wrong: {line}"
        if len(self.wrong_tensors) > _LISTED:
            yield f"  and {len(self.wrong_tensors) - _LISTED} more"
        if self.uniform:
            yield "  the forward passes prove nothing here: every log p is -log V (a zero readout);"
            yield (
                "    the tensors are what was checked"
                if self.compared_tensors
                else "    and no tensors were compared; train the model before it is converted"
            )
        for check in self.checks:
            yield from self._check_lines(check)

    def _check_lines(self, check: Check) -> Iterator[str]:
        found = check.difference
        yield f"  {check.name}: {'passed' if check.passed else 'FAILED'}: {check.compared}"
        yield (
            f"    |difference| of log p per token: mean {found.mean:.3e} (limit "
            f"{check.mean_limit:.3e}), max {found.maximum:.3e} (limit {check.maximum_limit:.3e}) "
            f"in sequence {found.worst_sequence} at position {found.worst_position}; worst mean "
            f"at position {found.worst_mean_position}"
        )
        yield f"    limits: {check.because}"
        yield (
            f"    mean -log p in {check.name}: {check.source_nats:.6f} nats of {self.source}, "
            f"{check.other_nats:.6f} of {self.other}"
        )
        if check.direct is not None:
            yield (
                f"    both in {check.name}: mean {check.direct.mean:.3e}, "
                f"max {check.direct.maximum:.3e}"
            )
        yield f"    {'position':>13} {'mean':>10} {'max':>10}"
        for part in found.positions:
            places = f"{part.first}-{part.last}" if part.last > part.first else f"{part.first}"
            yield f"    {places:>13} {part.mean:>10.3e} {part.maximum:>10.3e}"


_LISTED = 12
"""Wrong tensors that the text names; the JSON has all."""


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
