"""lm-eval's tasks on a folded model: `python -m cachefold.evaluation.lm_eval_adapter run ...`.

lm-eval 0.4.13 looks `--model` up among the models of its own package and those registered before
it runs, so this module is also the command that starts it:

    python -m cachefold.evaluation.lm_eval_adapter run --model cachefold \
        --model_args pretrained=artefacts/smollm2-135m-dial-wide,cr=4 --tasks piqa --limit 100

Later releases have plugins and find it by the entry point that this package declares.
`--model_args`: see `CachefoldLM`. The ratio reached is logged, and kept in the results.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from cachefold.core.names import closest
from cachefold.evaluation.subject import Subject
from cachefold.models.fold import fold
from cachefold.models.hub import CONFIG, load_folded, read_config
from cachefold.policies import get_policy
from cachefold.zoo import load_base

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError(
        f"lm-eval is missing or incomplete ({error}); run `pip install 'cachefold[eval]'`"
    ) from error

logger = logging.getLogger(__name__)

_DTYPES = ("bfloat16", "float16", "float32")
_DIAL = ("cr", "preset")
"""What can be asked of an artefact, if it has a dial."""


@register_model("cachefold")
class CachefoldLM(TemplateLM):
    """A model under test for lm-eval; scores and writes through its cache.

    Args:
        pretrained: zoo name, folder or hub id of a dense model, or the folder of an artefact.
        policy: folds a dense model; None = it stays dense.
        codec: how closed entries are stored; None = in the model's dtype.
        dtype: of the weights.
        batch_size: texts at once, or `auto`.
        max_length: most tokens of a text; None = what the model's config says.
        device: None = a GPU; a CPU where no GPU is.
        max_batch_size: lm-eval's own; not needed, `auto` finds what fits.
        subject: a model that is loaded already, in place of all of the above.
        options: of the policy, such as `cr=2` or `budget=512`; of an artefact with a dial, `cr`
            and `preset`.

    Raises:
        ValueError: nothing to load, a policy for an artefact, an unknown policy or option, or a
            ratio or preset that the artefact doesn't serve.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        policy: str | None = None,
        codec: str | None = None,
        dtype: str = "bfloat16",
        batch_size: int | str = "auto",
        max_length: int | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
        subject: Subject | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if (pretrained is None) == (subject is None):
            raise ValueError("give --model_args pretrained=MODEL, or a subject in Python")
        if subject is None:
            model, tokenizer = _load(str(pretrained), policy, dtype, options)
            size: Any = batch_size if batch_size == "auto" else int(batch_size)
            subject = Subject(
                model.to(_device(device)),
                tokenizer,
                batch_size=size,
                max_length=max_length,
                codec=codec,
            )
        self.subject = subject
        self.tokenizer = subject.tokenizer

    @property
    def eot_token_id(self) -> int:
        """Id that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Id that stands for an empty context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids of a text."""
        if add_special_tokens is None:
            return self.subject.encode(string)
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the tokenizer's template writes it."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )  # fmt: skip

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        scored = self.subject.score([(context, target) for _, context, target in requests])
        answers = [(one.logprob, one.greedy) for one in scored]
        for (key, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", key, answer)
        self._tell()
        return answers

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, in windows as long as the model can read."""
        windows: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id,
                max_seq_len=self.subject.max_length, context_len=1,
            ):  # fmt: skip
                windows.append(make_disjoint_window(window))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, scored in zip(owners, self.subject.score(windows), strict=True):
            totals[owner] += scored.logprob
        self._tell()
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues prompts greedily.

        Raises:
            ValueError: a task asks for sampling.
        """
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            options: Any = normalize_gen_kwargs(request.args[1], default_max_gen_toks=256)
            if options["do_sample"]:
                raise ValueError(
                    f"the task asks for sampling ({request.args[1]}), and model cachefold decodes "
                    "greedily; add --gen_kwargs do_sample=False,temperature=0"
                )
            groups[options["max_gen_toks"], tuple(options["until"])].append(index)
        texts = [""] * len(requests)
        for (most, until), indices in groups.items():
            prompts = [requests[index].args[0] for index in indices]
            written = self.subject.generate(prompts, max_new_tokens=most, stop=until)
            for index, text in zip(indices, written, strict=True):
                texts[index] = text
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
        self._tell()
        return texts

    def get_model_info(self) -> dict[str, Any]:
        """Lands in the results of lm-eval, beside its own settings."""
        found = self.subject.footprint
        reached = {"cr": found.cr, "bytes_ratio": found.bytes_ratio, "tokens": found.tokens}
        return {"cachefold": self.subject.settings() | reached}

    def _tell(self) -> None:
        logger.warning("cachefold: %s", self.subject.footprint)


def _device(asked: str | None) -> Any:
    """What is asked for, or a CPU where no GPU is: lm-eval's command asks for one by itself."""
    if asked is None or asked.startswith("cuda"):
        return (asked or "cuda") if torch.cuda.is_available() else "cpu"
    return asked


def _load(
    name: str, policy: str | None, dtype: str, options: dict[str, Any]
) -> tuple[PreTrainedModel, Any]:
    """The model, dense or folded, and its tokenizer."""
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}; got {dtype!r}")
    if not (Path(name) / CONFIG).is_file():
        if policy is None and options:
            raise ValueError(
                f"{', '.join(options)}: options of a policy, and none is given; add policy=NAME "
                "(`cachefold ls policies`), or name the folder of an artefact as pretrained"
            )
        model, tokenizer = load_base(name, getattr(torch, dtype))
        return (model if policy is None else fold(model, get_policy(policy, **options))), tokenizer
    return _load_artefact(Path(name), policy, dtype, options)


def _load_artefact(
    folder: Path, policy: str | None, dtype: str, options: dict[str, Any]
) -> tuple[PreTrainedModel, Any]:
    """An artefact on its base, its dial set if it is asked for a ratio or preset."""
    others = [option for option in options if option not in _DIAL]
    if policy is not None or others:
        given = ", ".join(others if policy is None else ["policy", *others])
        raise ValueError(
            f"{folder} is an artefact, which has its policy, and takes no {given}."
            f"{closest(others[0], _DIAL) if others else ''} Where it has a dial, "
            f"{' and '.join(_DIAL)} set it"
        )
    base = str(read_config(folder)["base"]["id"])
    model, tokenizer = load_base(base, getattr(torch, dtype))
    return load_folded(folder, model, **options), tokenizer


def main() -> None:
    """lm-eval's own command line, with the model `cachefold`."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
