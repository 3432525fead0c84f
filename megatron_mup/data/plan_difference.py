"""How two jobs of preprocessing differ, in the words of the command line.

A plan is what ``preprocess`` stores in a work folder: all that decides the output, as JSON values.
"""

from __future__ import annotations

from typing import Any

_SHOWN = 4
_DIGITS = 12


def plan_difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Say in which options and inputs two plans differ.

    Args:
        old: The plan of the unfinished work.
        new: The plan of this command.

    Returns:
        The differences, joined by semicolons; the first few of many.
    """
    found = _option_differences(_part(old, "options"), _part(new, "options"))
    found += _tokenizer_differences(old, new)
    inputs = _input_differences(old.get("inputs", []), new.get("inputs", []))
    found += inputs
    # The size of the units follows from the inputs' sizes.
    named = {"options", "inputs", "tokenizer_sha256", "eod", *(["unit_bytes"] if inputs else [])}
    found += [
        f"{name} was {old.get(name)}, now {new.get(name)} (the version of the program differs)"
        for name in sorted((old.keys() | new.keys()) - named)
        if old.get(name) != new.get(name)
    ]
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(found[:_SHOWN]) + more


def _part(plan: dict[str, Any], name: str) -> dict[str, Any]:
    part = plan.get(name)
    return part if isinstance(part, dict) else {}


def _option_differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [
        f"{_spelled(name, old.get(name))} then, {_spelled(name, new.get(name))} now"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def _spelled(name: str, value: Any) -> str:
    """An option and its value as they stand on a command line."""
    option = name.replace("_", "-")
    if value is True:
        return f"--{option}"
    if value is False:
        return "--no-append-eod" if name == "append_eod" else f"no --{option}"
    return f"no --{option}" if value is None else f"--{option} {value}"


def _tokenizer_differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    models = [str(plan.get("tokenizer_sha256"))[:_DIGITS] for plan in (old, new)]
    if models[0] != models[1]:
        return [
            f"--tokenizer-model was a file of other contents (SHA-256 {models[0]}... then, "
            f"{models[1]}... now)"
        ]
    ends = old.get("eod"), new.get("eod")
    if ends[0] != ends[1]:
        return [f"--eod-token meant id {ends[0]} then, id {ends[1]} now"]
    return []


def _input_differences(old: list[Any], new: list[Any]) -> list[str]:
    before = {entry["name"]: entry for entry in old}
    after = {entry["name"]: entry for entry in new}
    found = [f"--input {name} was not there then" for name in after if name not in before]
    found += [f"--input {name} is not there now" for name in before if name not in after]
    for name in before:
        if name in after and before[name] != after[name]:
            sizes = before[name].get("bytes"), after[name].get("bytes")
            how = f"{sizes[0]} bytes then, {sizes[1]} now"
            if sizes[0] == sizes[1]:
                how = f"{sizes[0]} bytes as before, but other ones"
            found.append(f"the input {name} has changed ({how})")
    if not found and old != new:
        found.append("the same inputs were named in another order, or another number of times")
    return found
