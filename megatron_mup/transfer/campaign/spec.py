"""The campaign's YAML, strictly read into a frozen ``Campaign``; docs/campaign.md is its reference.

Reads and checks everything that can be wrong before a stage runs. Must not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_mup.config import RunConfig
from megatron_mup.config_io import config_from_dict, read_sections
from megatron_mup.errors import ConfigError
from megatron_mup.transfer.campaign.likeness import Kind
from megatron_mup.transfer.campaign.target_data import SHARDS
from megatron_mup.transfer.sweep.base import check_base
from megatron_mup.transfer.sweep.cells import Cell, make_cells
from megatron_mup.transfer.sweep.reading import Part, read_yaml
from megatron_mup.transfer.sweep.spec import Sweep, load_sweep, sweep_from_dict

_KEYS = ("name", "sweep", "arm", "coordinate_check", "target", "gate")
_GATE_KEYS = (
    "fewest_sizes",
    "largest_ratio",
    "widest_interval",
    "level",
    "accept_cannot_tell",
    "accept",
)
_CHECK_KEYS = ("widths", "steps", "seeds", "options")
_STAND_IN_LR = 1.0


@dataclass(frozen=True, kw_only=True)
class GateRules:
    """What a prediction must satisfy to be used.

    Attributes:
        fewest_sizes: proxies with an identified optimum.
        largest_ratio: target width over that of the largest proxy.
        widest_interval: of the predicted learning rate, octaves.
        level: probability that the predicted learning rate's interval holds; the verdict has a
            level of its own.
        accept_cannot_tell: go on where the verdict is that nobody can tell.
        accept: extrapolations of the target in more than width that are wanted.
    """

    # A line has two parameters: a third size is the first that can contradict it (ours).
    fewest_sizes: int = 3
    # Assumption, ours: three doublings, over which the verdict's 0.25 octaves each add up to 0.75,
    # less than the widest interval. Farther than proxies usually span, the line is untested.
    largest_ratio: float = 8.0
    # A factor of two from end to end: the flat part of a usual minimum (assumption, ours).
    widest_interval: float = 1.0
    level: float = 0.9
    accept_cannot_tell: bool = False
    accept: tuple[Kind, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """The coordinate check.

    Attributes:
        widths: hidden sizes; None: those of the sweep.
        steps: optimizer steps.
        seeds: of the initial weights.
        options: of the configuration, as ``section.option`` or ``option``.
    """

    widths: tuple[int, ...] | None
    steps: int
    seeds: int
    options: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Campaign:
    """What a campaign's YAML asks for.

    Attributes:
        name: of the campaign.
        sweep: of the proxies, without arms that are not meant for the target.
        arm: that is meant for it.
        check: the coordinate check.
        target_sections: the target's YAML.
        target: the target at a learning rate that stands in for the one to come.
        target_config: where the target's YAML lies.
        launch: launch script of the target; None: none.
        gate: the rules.
    """

    name: str
    sweep: Sweep
    arm: str
    check: CheckOptions
    target_sections: Mapping[str, Mapping[str, Any]]
    target: RunConfig
    target_config: Path
    launch: Path | None
    gate: GateRules

    def proxies(self, data_folder: Path) -> list[Cell]:
        """The runs of the sweep.

        Args:
            data_folder: of the sweep's shards.

        Raises:
            MupError: a configuration of the sweep is refused.
        """
        return make_cells(self.sweep, data_folder)


def load_campaign(path: Path) -> Campaign:
    """Read and check a campaign's YAML; paths in it are relative to its folder.

    Args:
        path: the file.

    Returns:
        The campaign.

    Raises:
        ConfigError: unreadable file, unknown key, wrong value, or a target that cannot be trained.
    """
    if not path.is_file():
        raise ConfigError(f"there is no campaign '{path}'; give its YAML file")
    top = Part(read_yaml(path), str(path), "", _KEYS)
    sweep = _sweep(top, path)
    check_base(sweep)
    arm = _arm(top, sweep)
    target = top.part("target", ("config", "launch"))
    config = path.parent / target.text("config")
    sweep = replace(
        sweep_from_dict(_of_arm(sweep.document, arm), origin=str(path)), base_file=sweep.base_file
    )
    sections = _with_vocabulary(read_sections(config), sweep)
    return Campaign(
        name=top.name("name"),
        sweep=sweep,
        arm=arm,
        check=_check(top),
        target_sections=sections,
        target=config_from_dict(with_lr(sections, _STAND_IN_LR), origin=str(config)),
        target_config=config,
        launch=_launch(target, path),
        gate=_gate(top),
    )


def with_lr(sections: Mapping[str, Mapping[str, Any]], lr: float) -> dict[str, dict[str, Any]]:
    """Sections of a configuration with a peak base learning rate."""
    changed = {section: dict(values) for section, values in sections.items()}
    changed.setdefault("optimizer", {})["lr"] = lr
    return changed


def _with_vocabulary(
    sections: Mapping[str, Mapping[str, Any]], sweep: Sweep
) -> Mapping[str, Mapping[str, Any]]:
    """A target's sections; one that reads the proxies' shards has their vocabulary if none."""
    model, data = sections.get("model", {}), sections.get("data", {})
    if model.get("vocab_size") is not None or any(data.get(name) for name in SHARDS):
        return sections
    proxy = make_cells(sweep, Path())[0].run
    return {**sections, "model": {**model, "vocab_size": proxy.model.vocab_size}}


def _sweep(top: Part, path: Path) -> Sweep:
    given = top.value("sweep")
    if isinstance(given, str):
        sweep = load_sweep(path.parent / given)
    elif isinstance(given, dict):
        sweep = sweep_from_dict(given, origin=f"{path}, sweep", folder=path.parent)
    else:
        raise top.error("sweep", f"is {given!r}; give the sweep's YAML, here or as a path")
    if sweep.axis != "width":
        raise top.error(
            "sweep",
            f"scales the {sweep.axis}; a campaign predicts over widths: set scale.axis width",
        )
    if sweep.axes:
        option = next(iter(sweep.axes))
        raise top.error(
            "sweep", f"has the further axis {option}; set that option in an arm, and remove axes"
        )
    return sweep


def _arm(top: Part, sweep: Sweep) -> str:
    if not top.has("arm") and len(sweep.arms) == 1:
        return next(iter(sweep.arms))
    return top.choice("arm", list(sweep.arms))


def _of_arm(document: Mapping[str, Any], arm: str) -> dict[str, Any]:
    """The sweep's YAML with one arm: the others cost as much and say nothing of the target."""
    rates = dict(document["learning_rate"])
    own = rates.pop("arms", None) or {}
    if arm in own:
        rates["arms"] = {arm: own[arm]}
    arms = document.get("arms")
    kept = {} if arms is None else {"arms": {arm: arms[arm]}}
    return {**document, "learning_rate": rates, **kept}


def _launch(target: Part, path: Path) -> Path | None:
    if not target.has("launch"):
        return None
    script = path.parent / target.text("launch")
    if not script.is_file():
        raise target.error(
            "launch", f"names the script {script}, which is not there; give its path from this file"
        )
    return script


def _check(top: Part) -> CheckOptions:
    check = top.part("coordinate_check", _CHECK_KEYS, empty=True)
    widths = None
    if check.has("widths"):
        numbers = check.numbers("widths", whole=True, increasing=True)
        widths = tuple(int(number) for number in numbers)
    return CheckOptions(
        widths=widths,
        steps=check.count("steps") or 4,
        seeds=check.count("seeds") or 3,
        options=check.options("options"),
    )


def _gate(top: Part) -> GateRules:
    gate, rules = top.part("gate", _GATE_KEYS, empty=True), GateRules()
    level = gate.number("level", above=0.0, most=0.999)
    return GateRules(
        fewest_sizes=gate.count("fewest_sizes") or rules.fewest_sizes,
        largest_ratio=gate.number("largest_ratio", least=1.0) or rules.largest_ratio,
        widest_interval=gate.number("widest_interval", above=0.0) or rules.widest_interval,
        level=level or rules.level,
        accept_cannot_tell=gate.flag("accept_cannot_tell"),
        accept=_accepted(gate),
    )


def _accepted(gate: Part) -> tuple[Kind, ...]:
    names = gate.value("accept") if gate.has("accept") else []
    known = [kind.value for kind in Kind]
    if not isinstance(names, list) or any(name not in known for name in names):
        raise gate.error("accept", f"is {names!r}; give a list of {', '.join(known)}")
    return tuple(kind for kind in Kind if kind.value in names)
