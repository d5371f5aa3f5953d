"""The model under test: it scores and writes through its cache, so that compression is seen."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from cachefold.evaluation.batches import Batcher
from cachefold.evaluation.footprint import Footprint
from cachefold.evaluation.greedy import decode_greedily, end_tokens
from cachefold.evaluation.reading import Reading
from cachefold.evaluation.scoring import Losses, Text, read_losses
from cachefold.models.dial import dial_position, has_dial
from cachefold.models.fold import is_folded, new_cache

logger = logging.getLogger(__name__)

CHUNK = 1024
CODEC_CHUNK = 32  # pages of 32 entries are packed together, at the end of a forward call


@dataclass(frozen=True, slots=True)
class Scored:
    """How likely a continuation is."""

    logprob: float
    """Nats, summed over its tokens."""
    greedy: bool
    """Whether greedy decoding would write it."""
    tokens: int
    """Its tokens."""


class Subject:
    """A model under test: scores and generates always through its cache, so compression is seen.

    Args:
        model: dense or folded, in eval mode.
        tokenizer: of the model.
        batch_size: texts at once, or `auto`: as many as fit, found by trying.
        max_length: most tokens of a text; None = what the model's config says.
        codec: how entries of the cache are packed; None = what `fold` was told. A policy that folds
            packs pages of 32 entries: texts then go through in pieces of 32 tokens, and only texts
            of one length together. A policy that evicts packs entries one by one.

    Raises:
        ValueError: a codec for a dense model, or an option out of range.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(
    ...     hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    ...     vocab_size=10)).eval()
    >>> subject = Subject(model, tokenizer=None)
    >>> [scored] = subject.score([([1, 2], [3])])
    >>> scored.tokens, scored.logprob < 0, subject.footprint.cr
    (1, True, 1.0)
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        batch_size: int | Literal["auto"] = "auto",
        max_length: int | None = None,
        codec: str | None = None,
    ) -> None:
        if codec is not None and not is_folded(model):
            raise ValueError(
                f"codec={codec!r} stores the entries of a folded cache, and the model is dense; "
                'fold it with the policy "full", which keeps every entry'
            )
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length must be >= 2 tokens, got {max_length}")
        config = model.config.get_text_config(decoder=True)
        self.model = model
        self.tokenizer = tokenizer
        cache = new_cache(model, codec=codec) if is_folded(model) else None
        self.codec: str | None = None if cache is None else cache.codec
        self.packs_pages = cache is not None and cache.codec is not None and cache.evictor is None
        """Whether entries are packed 32 together; until then they are exact."""
        self.max_length = max_length or int(getattr(config, "max_position_embeddings", 2048))
        self._batcher = Batcher(batch_size, model.device)
        self._footprint = Footprint()
        self._told: set[str] = set()

    @property
    def footprint(self) -> Footprint:
        """Of all texts that ran so far, each at its end; for a dense model cr is 1."""
        return self._footprint

    def settings(self) -> dict[str, Any]:
        """What its results depend on, for JSON: model, weights, policy, codec and lengths."""
        model: Any = self.model
        config, folds = model.config, is_folded(model)
        turned = folds and has_dial(model._cachefold_policy)
        return {
            "model": type(self.model).__name__.removeprefix("Folded"),
            "weights": _digest(self.model),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "policy": getattr(config, "cachefold", None) if folds else None,
            "position": dial_position(self.model) if turned else None,
            "codec": self.codec,
            "max_length": self.max_length,
        }

    def encode(self, text: str) -> list[int]:
        """Token ids of a text on its own, with what the tokenizer puts before a text."""
        begins = getattr(self.tokenizer, "bos_token", None)
        # A chat template writes the first token itself.
        options = {"add_special_tokens": False} if begins and text.startswith(begins) else {}
        return list(self.tokenizer(text, verbose=False, **options)["input_ids"])

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of a context and of what follows it, as one text is tokenised.

        Spaces at the end of the context count to the continuation, as in lm-eval.

        Raises:
            ValueError: either is empty.
        """
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        if not stripped or not continuation:
            raise ValueError(
                f"nothing to score: context {context!r}, continuation {continuation!r}"
            )
        start = self.encode(stripped)
        return start, self.encode(stripped + continuation)[len(start) :]

    def score(self, requests: Sequence[tuple[list[int], list[int]]]) -> list[Scored]:
        """Scores continuations.

        Args:
            requests: (context ids, continuation ids), neither of them empty. Of a text over
                `max_length` the beginning is left out, and that is logged.

        Returns:
            One result for each, in order.

        Raises:
            ValueError: something is empty, or a continuation alone is over `max_length`.
        """
        alternatives: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
        keys = []
        for context, continuation in requests:
            fed, target = self._fit(context, continuation)
            # Continuations of one token share a context: one text answers all of them.
            alternatives.setdefault(fed, {})[target] = None
            keys.append((fed, target))
        texts = [Text(fed, tuple(targets)) for fed, targets in alternatives.items()]
        found: dict[Any, Scored] = {}
        for text, results in zip(texts, self._read(texts), strict=True):
            for target, (nats, greedy) in zip(text.targets, results, strict=True):
                logprob = -nats.double().sum().item()
                found[text.fed, target] = Scored(logprob, bool(greedy.all()), len(target))
        return [found[key] for key in keys]

    def losses(self, ids: Sequence[Tensor]) -> list[Tensor]:
        """Loss of every token but the first.

        Args:
            ids: texts, (T,) int64 each, T >= 2.

        Returns:
            (T - 1,) float32 nats for each text, on the CPU.

        Raises:
            ValueError: a text of another shape or over `max_length`.
        """
        texts = []
        for text in ids:
            if text.dim() != 1 or len(text) < 2 or len(text) > self.max_length:
                raise ValueError(
                    f"a text to take the loss of has the shape {tuple(text.shape)}, and must have "
                    f"one dimension with 2 to {self.max_length} tokens (max_length)"
                )
            tokens = tuple(text.tolist())
            texts.append(Text(tokens[:-1], (tokens[1:],)))
        return [nats for [(nats, _)] in self._read(texts)]

    def generate(
        self, prompts: Sequence[str], *, max_new_tokens: int, stop: Sequence[str] = ()
    ) -> list[str]:
        """Continues prompts greedily.

        Args:
            prompts: texts; of one that leaves no room for `max_new_tokens` below `max_length` the
                beginning is left out, and that is logged.
            max_new_tokens: most tokens to write.
            stop: strings that end a text; they are not part of it.

        Returns:
            What was written, without end token, in order.

        Raises:
            ValueError: an empty prompt, or no room for a prompt at all.
        """
        room = self.max_length - max_new_tokens
        if max_new_tokens < 1 or room < 1:
            raise ValueError(
                f"max_new_tokens must be 1 to {self.max_length - 1} (max_length - 1), got "
                f"{max_new_tokens}"
            )
        ids = [self.encode(prompt) for prompt in prompts]
        if not all(ids):
            raise ValueError("a prompt is empty; there is nothing to continue")
        ids = [self._cut(text, room) for text in ids]
        ends = end_tokens(self.model, self.tokenizer)

        def work(rows: list[int]) -> list[str]:
            texts, footprint = decode_greedily(
                self._reading(), [ids[row] for row in rows], self._chunk, max_new_tokens,
                lambda new: self.tokenizer.decode(new, skip_special_tokens=True), stop, ends,
            )  # fmt: skip
            self._footprint += footprint
            return texts

        lengths = [len(text) + max_new_tokens for text in ids]
        return self._batcher.run(lengths, self._spread, work)

    @property
    def _chunk(self) -> int:
        return CODEC_CHUNK if self.packs_pages else CHUNK

    @property
    def _spread(self) -> int:
        """Texts of a batch differ in length by less.

        No first piece is then all padding, and no page of a codec is packed later than alone.
        """
        return 1 if self.packs_pages else CHUNK

    def _reading(self) -> Reading:
        return Reading(self.model, self._new_cache())

    def _new_cache(self) -> Any:
        if not is_folded(self.model):
            return DynamicCache(config=self.model.config)
        return new_cache(self.model, codec=self.codec)

    def _fit(
        self, context: Sequence[int], continuation: Sequence[int]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What is fed, and the tokens to score."""
        if not len(context) or not len(continuation):
            raise ValueError("a request has an empty context or continuation; nothing to score")
        if len(continuation) > self.max_length:
            raise ValueError(
                f"a continuation has {len(continuation)} tokens, over max_length {self.max_length}"
            )
        # The last token is scored but never fed.
        whole = self._cut([*context, *continuation], self.max_length + 1)
        return tuple(whole[:-1]), tuple(continuation)

    def _cut(self, ids: list[int], room: int) -> list[int]:
        """The end of a text that is too long; tells once."""
        if len(ids) > room and "cut" not in self._told:
            self._told.add("cut")
            logger.warning(
                "a text of %d tokens is cut to its last %d (max_length %d); so are others",
                len(ids), room, self.max_length,
            )  # fmt: skip
        return ids[-room:]

    def _read(self, texts: Sequence[Text]) -> list[list[Losses]]:
        """Losses of every target of every text."""

        def work(rows: list[int]) -> list[list[Losses]]:
            reading = self._reading()
            losses = read_losses(reading, [texts[row] for row in rows], self._chunk)
            self._footprint += reading.footprint()
            return losses

        return self._batcher.run([len(text.fed) for text in texts], self._spread, work)


def _digest(model: PreTrainedModel) -> str:
    """Short digest of the first numbers of every parameter: other weights, other digest."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        numbers = parameter.detach().flatten()[:64].double().cpu()
        digest.update(name.encode() + numbers.numpy().tobytes())
    return digest.hexdigest()[:16]
