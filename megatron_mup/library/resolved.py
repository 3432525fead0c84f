"""One object that gives somebody else's Megatron-Core script its parameterization.

It hands out what the table says and checks that it arrived: attention scale and layer spec before
the model is built, initial weights and hooks after, optimizer groups before training. It reads
upstream's own configuration objects, so that no number is written twice; sizes are global, whatever
the layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from megatron.core.optimizer import OptimizerConfig, ParamKey
from megatron.core.tensor_parallel import set_defaults_if_not_set_tensor_model_parallel_attributes
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.utils import unwrap_model

from megatron_mup.describe import describe_text
from megatron_mup.errors import ParameterizationError
from megatron_mup.library.extras import Extras, members_of, numbers_of, shape_of
from megatron_mup.library.refusals import (
    refuse_config,
    refuse_horizon,
    refuse_optimizer,
    refuse_scale,
    refuse_schedule,
)
from megatron_mup.model.additions import add_embedding_norm, add_unembedding_bias
from megatron_mup.model.conformity import check_model
from megatron_mup.model.gpt import freeze_unused_gains
from megatron_mup.model.hooks import register_multipliers
from megatron_mup.model.initialization import Shard, initialize
from megatron_mup.model.layer_specs import scaled_bias_dropout_add
from megatron_mup.optimizer.groups import GroupNumbers, Override, config_overrides
from megatron_mup.optimizer.upstream import correct_optimizer_factory
from megatron_mup.parameterization.options import OptimizerNumbers, ParameterizationConfig
from megatron_mup.parameterization.roles import ModelShape
from megatron_mup.parameterization.table import ParameterTable
from megatron_mup.parameterization.table import resolve as resolve_table

Model = TypeVar("Model", bound=torch.nn.Module)
Spec = TypeVar("Spec", ModuleSpec, TransformerBlockSubmodules)


def resolve(
    config: TransformerConfig,
    optimizer: OptimizerConfig,
    parameterization: ParameterizationConfig,
    extras: Extras,
) -> Mup:
    """Evaluate the rule table for a model and an optimizer that Megatron-Core will build.

    Args:
        config: the model's; ``softmax_scale`` is left unset, see ``Mup.softmax_scale``.
        optimizer: AdamW; ``lr`` is alpha and ``weight_decay`` lambda.
        parameterization: rule set, base shape and options; choices may be given by their values,
            as in a configuration file.
        extras: what these do not say.

    Returns:
        What the script asks for the rest.

    Raises:
        ParameterizationError: a layer or combination without rules, or a missing base shape.
        ConfigError: an optimizer that the rules are not for.
    """
    refuse_config(config)
    refuse_optimizer(optimizer)
    parameterization = replace(parameterization, **members_of(parameterization))
    extras = replace(extras, **members_of(extras))
    refuse_horizon(parameterization)
    shape, numbers = shape_of(config, extras), numbers_of(optimizer, extras)
    table = resolve_table(shape, parameterization, numbers)
    refuse_scale(config, table.multipliers)
    return Mup(shape=shape, table=table, numbers=numbers, optimizer=optimizer)


@dataclass(frozen=True, kw_only=True)
class Mup:
    """A resolved parameterization; made by ``resolve``.

    Attributes:
        shape: global shape of the model.
        table: one row per logical tensor.
        numbers: the optimizer's scalars that the table was resolved with.
        optimizer: upstream's configuration that they came from.
    """

    shape: ModelShape
    table: ParameterTable
    numbers: OptimizerNumbers
    optimizer: OptimizerConfig

    @property
    def softmax_scale(self) -> float:
        """What ``TransformerConfig.softmax_scale`` must be before the model is built."""
        return self.table.multipliers.attention

    def layer_spec(self, spec: Spec) -> Spec:
        """The same layers, with their branches multiplied before they join the residual stream.

        Needed where ``describe`` prints a residual multiplier other than 1, as under CompleteP.

        Args:
            spec: of one layer, or of a stage's layers.

        Returns:
            A copy; the given spec stays as it is.
        """
        if isinstance(spec, TransformerBlockSubmodules):
            # A stage's layers may share one spec, and with it tables: keep them shared.
            copies = {id(layer): self.layer_spec(layer) for layer in spec.layer_specs}
            return replace(spec, layer_specs=[copies[id(layer)] for layer in spec.layer_specs])
        add = scaled_bias_dropout_add(self.table.multipliers.residual)
        submodules = replace(spec.submodules, self_attn_bda=add, mlp_bda=add)
        return replace(spec, submodules=submodules)

    def apply(self, model: Model, *, seed: int) -> Model:
        """Hook a built model and give it its initial weights; the same for every layout.

        Before DDP, Float16Module and the optimizer, which copy the weights. A checkpoint that is
        loaded later replaces them.

        Args:
            model: upstream's ``GPTModel``, one pipeline stage or virtual chunk.
            seed: of the initial weights, alike on every rank.

        Returns:
            The same model.

        Raises:
            ParameterizationError: what was built is not what the table describes.
        """
        self._refuse_late(model)
        stage: Any = model
        freeze_unused_gains(model, self.shape.norm_gain)
        if self.shape.unembedding_bias:
            add_unembedding_bias(model)
        if self.shape.embedding_norm:
            add_embedding_norm(model, gain=self.shape.norm_gain)
        register_multipliers(model, self.table.multipliers)
        check_model(model, self.table)
        for parameter in model.parameters():
            set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        tp = stage.pg_collection.tp
        initialize(model, self.table, self.shape, seed=seed, shard=Shard(tp.rank(), tp.size()))
        setattr(stage, _APPLIED, True)
        return model

    def _refuse_late(self, model: torch.nn.Module) -> None:
        """Refuse a model that was wrapped, left without memory, or hooked before."""
        if unwrap_model(model) is not model:
            raise ParameterizationError(
                f"apply() got a {type(model).__name__}; call it on the GPTModel before it is "
                "wrapped, because DDP and the optimizer copy the weights"
            )
        if any(parameter.is_meta for parameter in model.parameters()):
            raise ParameterizationError(
                "apply() got a model on the meta device, which holds no values; build it without "
                "init_model_with_meta_device"
            )
        # With multipliers of 1 no hook tells, but a norm or a bias would be added twice as well.
        if getattr(model, _APPLIED, False):
            raise ParameterizationError(
                "apply() was called on this model before; what it adds would act twice"
            )

    def check(self, model: torch.nn.Module) -> None:
        """Check that a model, wrapped or not, is the one that the table describes.

        Every trainable tensor has a row and its global shape, none is missing, and each forward
        multiplier is in force: asked of the modules, not of their configuration.

        Raises:
            ParameterizationError: names what differs, and the cure.
        """
        _require_applied(unwrap_model(model))
        check_model(unwrap_model(model), self.table)

    def config_overrides(self, model_chunks: Sequence[torch.nn.Module]) -> dict[ParamKey, Override]:
        """Overrides for ``get_megatron_optimizer``; they replace upstream's standard ones.

        Args:
            model_chunks: this rank's models, wrapped or not.

        Returns:
            One key per group of equal LR, decay and eps.

        Raises:
            ParameterizationError: a parameter without a row.
        """
        for chunk in model_chunks:
            _require_applied(unwrap_model(chunk))
        correct_optimizer_factory()
        peak, floor = self.numbers.lr, self.optimizer.min_lr or 0.0
        return config_overrides(
            [unwrap_model(chunk) for chunk in model_chunks],
            self.table,
            defaults=GroupNumbers(peak, self.numbers.weight_decay, self.numbers.eps),
            min_lr_ratio=floor / peak if peak else 0.0,
        )

    def check_training(self, optimizer: Any, scheduler: Any = None) -> None:
        """Check that the overrides reached the optimizer and that the schedule keeps their ratios.

        Args:
            optimizer: from ``get_megatron_optimizer``.
            scheduler: upstream's ``OptimizerParamScheduler``; unset if the script has its own,
                which must multiply each group's ``max_lr`` by one factor.

        Raises:
            ParameterizationError: the groups are not the table's.
            ConfigError: the schedule moves them out of ratio.
        """
        expected = {(row.lr, row.weight_decay, row.eps) for row in self.table.rows}
        decay = self.numbers.weight_decay
        found = {
            (group["max_lr"], decay * group["wd_mult"], group["eps"])
            for group in optimizer.param_groups
        }
        # Decay went through a division and comes back through a multiplication.
        if _rounded(found) != _rounded(expected):
            raise ParameterizationError(
                f"the optimizer's groups have (peak LR, decay, eps) {sorted(found)}, the table "
                f"says {sorted(expected)}; pass config_overrides=mup.config_overrides(chunks) to "
                "get_megatron_optimizer"
            )
        if scheduler is not None:
            refuse_schedule(scheduler, self.optimizer)

    def describe(self) -> str:
        """The table for people, with the forward multipliers and every row's source."""
        return describe_text(self.table)


_APPLIED = "_megatron_mup_applied"
"""Attribute of a model that ``apply`` has seen."""


def _require_applied(model: torch.nn.Module) -> None:
    # Without extras and multipliers nothing else tells Megatron's initial weights from ours.
    if not getattr(model, _APPLIED, False):
        raise ParameterizationError(
            "this model never went through apply(), so it has Megatron's initial weights and no "
            "multipliers; call mup.apply(model, seed=...) before it is wrapped"
        )


def _rounded(groups: set[Any]) -> set[tuple[str, ...]]:
    return {tuple(f"{number:.12g}" for number in group) for group in groups}
