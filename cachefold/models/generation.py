"""generate() and save_pretrained() of a folded model, and the caches they use.

`_prepare_cache_for_generation` is a private method of transformers: tests/test_contracts.py
watches its signature.
"""

from __future__ import annotations

import functools
import inspect
import logging
from typing import Any, NoReturn

import torch
from transformers import PreTrainedModel

from cachefold.attention.dispatch import check_name, tell
from cachefold.cache import FoldedCache
from cachefold.models.attention import folded_layers
from cachefold.models.caches import check_cache, check_fits, check_goes_on, fold_options
from cachefold.models.dial import check_dial, with_position
from cachefold.models.lora import check_unmerged
from cachefold.models.run import FoldRun, check_evicting_run, check_options
from cachefold.policies.base import Policy
from cachefold.policies.budget import BudgetPolicy


class FoldedCausalLM:
    """Mixin put before a model's class while it is folded."""

    def generate(
        self, *args: Any, cr: float | None = None, preset: str | None = None, **kwargs: Any
    ) -> Any:
        """As the model's own, with the ratio of a dial.

        Args:
            args: as the model's own takes them.
            cr: tokens seen / entries kept that the cache is to reach; None = the policy's.
            preset: kind of text the dial was calibrated for; None = the default one.
            kwargs: as the model's own takes them.

        Raises:
            ValueError: a ratio or preset that this model does not serve, one beside a cache, or
                one without a cache to keep it.
        """
        if cr is not None or preset is not None:
            if kwargs.get("past_key_values") is not None:
                raise ValueError(
                    "cr and preset are those of a new cache, and past_key_values is given: leave "
                    "it out, or make it with cachefold.models.fold.new_cache(model, cr=...)"
                )
            kwargs["past_key_values"] = new_cache(self, cr=cr, preset=preset)  # type: ignore[arg-type]
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Puts a FoldedCache where transformers would put a cache of its own."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} asks for another "
                "cache, and a folded model needs a FoldedCache: leave the option out, or set "
                "model.generation_config.cache_implementation = None if it comes from there"
            )
        cache = model_kwargs.get("past_key_values")
        check_cache(cache)
        _check_cache_in_use(cache, generation_config.use_cache)
        if cache is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = new_cache(self)  # type: ignore[arg-type]
            return None
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, *args, **kwargs
        )

    def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: what transformers writes would load as a broken dense model.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "save_pretrained would write a model that loads as a dense one; use "
            "cachefold.save_folded(model, folder, base=...), or unfold(model) first"
        )


def new_cache(
    model: PreTrainedModel,
    page_size: int = 16,
    max_bytes: int | None = None,
    backend: str = "auto",
    codec: str | None = None,
    cr: float | None = None,
    preset: str | None = None,
) -> FoldedCache:
    """An empty cache for a folded model.

    Args:
        model: folded.
        page_size: entries per page, 16 or 32.
        max_bytes: most bytes that the cache may hold; None = no limit. See `FoldedCache`.
        backend: of attention over this cache: `auto`, or a name of `cachefold ls backends`.
        codec: how entries are packed, a name of `cachefold ls codecs`; None = what `fold` was
            told. See `FoldedCache`.
        cr: ratio of a dial, tokens seen / entries kept; None = that of the policy.
        preset: kind of text the dial was calibrated for; None = the default one.

    Raises:
        ValueError: the model is not folded, or an option out of range.
    """
    check_name(backend)
    layers = folded_layers(model)
    if not layers:
        raise ValueError("the model is not folded; call fold(model, policy) first")
    state: Any = model
    policy: Policy = state._cachefold_policy
    codec = codec or state._cachefold_codec
    check_dial(policy, state._cachefold_dial, cr, preset)
    if isinstance(policy, BudgetPolicy):
        _check_evicting(policy.name, page_size, backend)
        return FoldedCache(
            model.config, folded_layers=layers, max_bytes=max_bytes, evictor=policy, codec=codec
        )
    return FoldedCache(
        model.config, folded_layers=layers, page_size=page_size, max_bytes=max_bytes,
        backend=backend, codec=codec, cr=cr, preset=preset, **fold_options(policy),
    )  # fmt: skip


def _check_evicting(name: str, page_size: int, backend: str) -> None:
    if (page_size, backend) != (16, "auto"):
        raise ValueError(
            f"page_size={page_size} and backend={backend!r} say how a folding cache is kept and "
            f"read; {name} evicts and has neither pages nor backends: leave both out"
        )


def _check_cache_in_use(cache: FoldedCache | None, use_cache: bool | None) -> None:
    """Refuses a cache beside use_cache=False: transformers would feed it all the text each step."""
    if cache is not None and use_cache is False:
        raise ValueError(
            "use_cache=False goes with no FoldedCache, be it past_key_values or the one that cr "
            "and preset of generate() make: every step would add the whole text to it once more. "
            "Leave use_cache=False out (model.generation_config.use_cache = True if it comes from "
            "there), or leave past_key_values, cr and preset out"
        )


def _uses_cache(model: Any, run: FoldRun, cache: FoldedCache | None, asked: bool | None) -> bool:
    """Whether a call fills a cache; `asked` is its use_cache."""
    _check_cache_in_use(cache, asked)
    training = model.training and torch.is_grad_enabled()
    if asked is None:
        # Only hard decisions can be carried out in a cache, and it would cut gradients off.
        alone = run.mode == "hard" and not training and model.config.use_cache
        asked = cache is not None or alone
    if asked and run.mode != "hard":
        raise ValueError(
            f"fold_run mode {run.mode!r} has no cache to carry its decisions out in; leave "
            "use_cache out or set it to False"
        )
    # What evicts reads its entries from a cache only in the next call.
    cut = cache is not None or not isinstance(model._cachefold_policy, BudgetPolicy)
    if asked and training and cut:
        tell(
            logging.WARNING,
            "training with a folded cache: its entries carry no gradient, so that tokens get less "
            "than all of theirs; leave past_key_values and use_cache=True out for whole gradients",
        )
    return asked


def supply_cache(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook: a call without a cache gets a folded one; other caches are refused."""
    args, kwargs = _named(type(model), args, kwargs)
    run = kwargs.get("fold_run") or FoldRun()
    cache = kwargs.get("past_key_values")
    policy = model._cachefold_policy
    if isinstance(policy, BudgetPolicy):
        check_evicting_run(policy.name, run)
    check_goes_on(run.mode, cache)
    if run.mode == "dense":
        check_unmerged(model, 'run in mode "dense"')
        return args, kwargs
    check_options({"output_attentions": model.config.output_attentions, **kwargs})
    check_cache(cache)
    if cache is not None:
        check_fits(cache, policy, model._cachefold_layers)
        check_dial(policy, model._cachefold_dial, cache.cr, cache.preset)
    kwargs["use_cache"] = _uses_cache(model, run, cache, kwargs.get("use_cache"))
    if kwargs["use_cache"] and cache is None:
        cache = kwargs["past_key_values"] = new_cache(model)
    if not isinstance(policy, BudgetPolicy) and policy.max_cr and run.position is None:
        kwargs["fold_run"] = with_position(model, run, cache)
    return args, kwargs


def _named(
    kind: type, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with names for what comes after the first, such as a cache."""
    if len(args) < 2:
        return args, kwargs
    named = dict(zip(_parameters(kind)[1 : len(args)], args[1:], strict=False))
    if len(named) < len(args) - 1 or named.keys() & kwargs.keys():
        return args, kwargs  # the model itself says what is wrong with them
    return args[:1], named | kwargs


@functools.cache
def _parameters(kind: type) -> list[str]:
    """Names of the positional arguments of the forward of a model, in order."""
    forward: Any = kind
    parameters = list(inspect.signature(forward.forward).parameters.values())[1:]
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
