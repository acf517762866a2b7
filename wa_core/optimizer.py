"""WeightAverage: an optimizer wrapper that keeps the average of the weights it trains.

It knows torch optimizers and two averaging rules; it knows nothing of models, files or runs. The invariant: groups
and state *are* the inner optimizer's, never copies, so schedulers, scalers and hooks may work on either; only the
averages belong to the wrapper. What leaves the process is addressed by the parameter's index.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from wa_core.averaging.kernels import accumulator_dtype, blend, new_accumulator
from wa_core.averaging.optimizer_arguments import check_mode, settle_schedule
from wa_core.averaging.rules import EmaRule, SwaRule
from wa_core.batchnorm import recalibrate
from wa_core.errors import InvalidInputError

if TYPE_CHECKING:
    from collections import defaultdict
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from wa_core.batchnorm import BatchNormReport

Group = dict[str, Any]
STATE_KEY = "weight_average"
_FORMAT = 1


class WeightAverage(torch.optim.Optimizer):
    """Trains with `optimizer` and averages the weights on the way.

    *Automatic mode* (`wa_start` and `wa_freq` given): after each inner step every group's ``step_counter`` goes up
    by one, and the group is averaged when ``step_counter > wa_start and step_counter % wa_freq == 0``. Before a
    step, a group's learning rate is set to `wa_lr` once ``step_counter >= wa_start``. *Manual mode* (neither
    given): call `update_swa` when the weights shall count; steps are counted all the same.

    Averages of bfloat16 and float16 parameters are kept in float32, all others in the parameter's own dtype. Each
    group carries ``n_avg`` and ``step_counter``. Weights are not checked for NaN; `GradScaler` skips such steps.

    Args:
        optimizer: any torch optimizer; its groups and state stay shared with it.
        wa_start: steps before averaging starts, >= 0.
        wa_freq: steps from one average to the next, >= 1.
        wa_lr: the learning rate from `wa_start` on, >= 0; None leaves it alone.
        mode: ``"swa"`` for the running mean, or the decay of an exponential average per update, in [0, 1), which
            is unbiased: after n updates the weights ``decay**(n-1), …, decay, 1`` are divided by their sum.

    Raises:
        InvalidInputError: a `ValueError`: a value outside these ranges.

    Source: Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization", Algorithm 1;
    Kingma & Ba 2015, "Adam", section 3, for the correction of the bias.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        wa_start: int | None = None,
        wa_freq: int | None = None,
        wa_lr: float | None = None,
        mode: Literal["swa"] | float = "swa",
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer) or isinstance(optimizer, WeightAverage):
            raise InvalidInputError(
                f"optimizer is a {type(optimizer).__name__}; pass a torch.optim.Optimizer that is not wrapped yet"
            )
        self.mode = check_mode(mode)
        self.wa_start, self.wa_freq, self.wa_lr = settle_schedule(wa_start, wa_freq, wa_lr, stacklevel=3)
        self.optimizer = optimizer
        self._averages: dict[Tensor, Tensor] = {}
        # The weights of parameters with less precision than their averages, while the averages are in their place.
        self._weights: dict[Tensor, Tensor] = {}
        self._is_swapped = False
        # What the base class needs besides parameters and state, which are the inner optimizer's: its hooks.
        super().__setstate__({})
        for group in self.param_groups:
            group["n_avg"] = group["step_counter"] = 0

    @property
    def param_groups(self) -> list[Group]:
        """The inner optimizer's groups themselves."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[Group]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The inner optimizer's state itself; the averages are not in it."""
        return self.optimizer.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The inner optimizer's defaults themselves."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    @property
    def is_automatic(self) -> bool:
        """Whether `step` also averages."""
        return self.wa_start is not None and self.wa_freq is not None

    @property
    def is_swapped(self) -> bool:
        """Whether the parameters hold the averages now, after an odd number of calls of `swap_swa_sgd`."""
        return self._is_swapped

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of the inner optimizer; in automatic mode also the learning rate and the average.

        Args:
            closure: reevaluates the model and returns the loss, as for the inner optimizer.

        Returns:
            What the inner optimizer's step returned.

        Raises:
            InvalidInputError: this step would average, but weights and averages are swapped; nothing has changed.
        """
        if self._is_swapped and any(self._is_due(group, steps=1) for group in self.param_groups):
            self._refuse_swapped()
        self._set_learning_rates()
        # Some optimizers take no closure at all.
        loss: float | None = self.optimizer.step() if closure is None else self.optimizer.step(closure)
        for group in self.param_groups:
            group["step_counter"] = group.get("step_counter", 0) + 1
            if self._is_due(group):
                self.update_swa_group(group)
        return loss

    def update_swa(self) -> None:
        """Take the parameters of all groups as they are now into their averages.

        Raises:
            InvalidInputError: weights and averages are swapped.
        """
        for group in self.param_groups:
            self.update_swa_group(group)

    @torch.no_grad()
    def update_swa_group(self, group: Group) -> None:
        """Take the parameters of one of `param_groups` as they are now into their averages.

        Raises:
            InvalidInputError: weights and averages are swapped, or `group` is not one of `param_groups`.
        """
        if self._is_swapped:
            self._refuse_swapped()
        if not any(group is own for own in self.param_groups):
            raise InvalidInputError(
                "this is none of the optimizer's param_groups (load_state_dict makes new ones); pass one of them"
            )
        weight = self._weight(group.get("n_avg", 0))
        known: list[Tensor] = []
        for param in dict.fromkeys(group["params"]):
            if param in self._averages and weight < 1:
                known.append(param)
            else:
                # The first average is a copy; so is that of a parameter that joined its group late.
                self._averages[param] = new_accumulator(param)
        blend([self._average_of(param) for param in known], [param.detach() for param in known], weight=weight)
        group["n_avg"] = group.get("n_avg", 0) + 1

    @torch.no_grad()
    def swap_swa_sgd(self) -> None:
        """Exchange weights and averages in place; a second call restores both, bit for bit.

        Call it at the end of training, or around an evaluation (`averaged` does that, and survives exceptions).
        While they are swapped nothing can be averaged. A parameter without an average stays, with a `UserWarning`.
        """
        if missing := [index for param, index in self._indices().items() if param not in self._averages]:
            # Before anything is exchanged: where warnings are errors, this one must not leave things half done.
            warnings.warn(
                f"{len(missing)} of {len(self._indices())} parameters have no average yet and stay as they are "
                f"(indices {', '.join(map(str, missing[:10]))}{', …' if missing[10:] else ''}); call update_swa()",
                UserWarning,
                stacklevel=3,
            )
        self._exchange()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """``with optimizer.averaged(): evaluate(model)``: the averages in place, and the weights again afterwards.

        The weights come back whatever happens inside. Parameters without an average warn, as in `swap_swa_sgd`.

        Raises:
            InvalidInputError: the averages are in place already.
        """
        if self._is_swapped:
            raise InvalidInputError(
                "the averages are in place already; call swap_swa_sgd() to get the weights back"
            )
        self.swap_swa_sgd()
        try:
            yield
        finally:
            if self._is_swapped:
                self._exchange()

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: FBT001, FBT002 - torch's signature
        """As the inner optimizer does it."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group; it starts from its own zero: it is averaged `wa_start` steps from now."""
        self.optimizer.add_param_group(param_group)
        self.param_groups[-1]["n_avg"] = self.param_groups[-1]["step_counter"] = 0

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state dict, and under ``weight_average`` the averages by parameter index.

        It holds only tensors, numbers and texts, so `torch.load(…, weights_only=True)` reads it. As with any
        optimizer its tensors are the live ones: write or copy them before the next step.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state: dict[str, Any] = dict(self.optimizer.state_dict())
        indices = self._indices()
        state[STATE_KEY] = {
            "format": _FORMAT,
            "mode": self.mode,
            "is_swapped": self._is_swapped,
            "averages": {index: self._averages[p] for p, index in indices.items() if p in self._averages},
            "weights": {index: self._weights[p] for p, index in indices.items() if p in self._weights},
        }
        for after in self._optimizer_state_dict_post_hooks.values():
            state = after(self, state) or state
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from `state_dict`, bit for bit; the averages are copied.

        The state dict of a plain optimizer is taken, too: nothing is averaged yet then.

        Raises:
            ValueError: the groups differ (the inner optimizer's error).
            InvalidInputError: it was made in another mode, its averages are missing, or do not fit the parameters.
                The averages, and unless it raises itself the inner optimizer, are as they were.
        """
        state = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state = before(self, state) or state
        kept = self._check_kept(state.pop(STATE_KEY, None), state)
        averages, weights = (self._by_parameter(kept[name]) for name in ("averages", "weights"))
        self.optimizer.load_state_dict(state)
        self._averages = {param: new_accumulator(param, average) for param, average in averages.items()}
        self._weights = {param: weight.to(param, copy=True) for param, weight in weights.items()}
        self._is_swapped = bool(kept["is_swapped"])
        for group in self.param_groups:
            group.setdefault("n_avg", 0)
            group.setdefault("step_counter", 0)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    @staticmethod
    def bn_update(
        loader: Iterable[Any], model: torch.nn.Module, device: torch.device | str | None = None
    ) -> BatchNormReport:
        """Recompute BatchNorm statistics for the weights in `model`, as `torch.optim.swa_utils.update_bn` does.

        For statistics of the whole data, whatever the batches' sizes, see `wa_core.batchnorm.recalibrate`, whose
        errors these are, too.

        Args:
            loader: batches; tuples and lists count by their first element.
            model: only its BatchNorm buffers change; a model without BatchNorm is left alone, and no data is read.
            device: where to move each batch first.
        """
        return recalibrate(model, loader, device=device, method="update_bn")

    def __getstate__(self) -> dict[str, Any]:
        # For pickle and deepcopy: without hooks and a scheduler's wrapper of `step`, as for every torch optimizer.
        names = ("optimizer", "mode", "wa_start", "wa_freq", "wa_lr", "_averages", "_weights", "_is_swapped")
        return {name: self.__dict__[name] for name in names}

    def _is_due(self, group: Group, *, steps: int = 0) -> bool:
        if self.wa_start is None or self.wa_freq is None:
            return False
        counter = group.get("step_counter", 0) + steps
        return bool(counter > self.wa_start and counter % self.wa_freq == 0)

    def _set_learning_rates(self) -> None:
        if self.wa_lr is None or self.wa_start is None:
            return
        for group in self.param_groups:
            if group.get("step_counter", 0) < self.wa_start:
                continue
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(self.wa_lr)
            else:
                group["lr"] = self.wa_lr

    def _weight(self, n_averaged: int) -> float:
        rule = SwaRule() if self.mode == "swa" else EmaRule(decay=float(self.mode))
        return rule.weight(
            n_averaged=n_averaged, step=n_averaged, prev_step=n_averaged - 1 if n_averaged else None
        )

    def _refuse_swapped(self) -> None:
        raise InvalidInputError(
            "weights and averages are swapped, so averaging now would mix them up; call swap_swa_sgd() once more "
            "before training goes on"
        )

    def _indices(self) -> dict[Tensor, int]:
        # The inner optimizer's own numbering: in order, a repeated parameter by its first place.
        found: dict[Tensor, int] = {}
        for index, param in enumerate(param for group in self.param_groups for param in group["params"]):
            found.setdefault(param, index)
        return found

    def _average_of(self, param: Tensor) -> Tensor:
        # The model may have moved, or got another dtype, since the average began.
        average = self._averages[param]
        dtype = torch.promote_types(average.dtype, accumulator_dtype(param.dtype))
        if average.device != param.device or average.dtype != dtype:
            average = self._averages[param] = average.to(device=param.device, dtype=dtype)
        return average

    @torch.no_grad()
    def _exchange(self) -> None:
        places = set()
        for param in self._indices():
            # Parameters over the same memory would be exchanged twice, which is not at all.
            place = (param.device, param.data_ptr(), param.shape, param.stride())
            if param not in self._averages or (place in places and param.numel()):
                continue
            places.add(place)
            average = self._average_of(param)
            if average.dtype == param.dtype:
                weights = param.clone()
                param.copy_(average)
                average.copy_(weights)
            elif not self._is_swapped:
                self._weights[param] = param.detach().clone()
                param.copy_(average)
            else:
                # The average keeps the digits that the parameter cannot hold, unless that was changed meanwhile.
                average.copy_(torch.where(average.to(param.dtype) == param, average, param.to(average.dtype)))
                param.copy_(self._weights.pop(param))
        self._is_swapped = bool(places) and not self._is_swapped

    def _check_kept(self, kept: Any, state: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ANN401 - comes from a file
        if kept is None:
            if any(group.get("n_avg") for group in state["param_groups"]):
                raise InvalidInputError(
                    "this state dict counts averages but holds none: it is the inner optimizer's; save and load "
                    "that of WeightAverage"
                )
            return {"averages": {}, "weights": {}, "is_swapped": False}
        if not isinstance(kept, dict) or kept.get("format") != _FORMAT:
            raise InvalidInputError(f"the entry {STATE_KEY!r} of this state dict is of an unknown format")
        if kept["mode"] != self.mode:
            raise InvalidInputError(
                f"this state dict was made with mode={kept['mode']!r}, not {self.mode!r}; use the same to go on"
            )
        return kept

    def _by_parameter(self, tensors: Mapping[int, Tensor]) -> dict[Tensor, Tensor]:
        params = {index: param for param, index in self._indices().items()}
        for index, tensor in tensors.items():
            if index not in params or params[index].shape != tensor.shape:
                place = f"{tuple(params[index].shape)}" if index in params else "no such parameter"
                raise InvalidInputError(
                    f"the average of parameter {index} has shape {tuple(tensor.shape)}, not {place}; "
                    f"load it into an optimizer of the same model"
                )
        return {params[index]: tensor for index, tensor in tensors.items()}
