"""lm-evaluation-harness's own Hugging Face model, with instruments on.

The harness batches, sorts and pads requests as it likes and hands bare tokens to the model: no mask, no names. Noise
must depend on none of that. So the subclass below names every row of every call before the harness makes it:

* **A row is called after its document**, ``task:doc_id`` (windows of a long document: ``task:doc_id#1``, …). All
  choices of one question therefore share their noise on the shared context, position by position, and differ by their
  own tokens only. The default of hashing a row's first tokens would be wrong here: few-shot prompts all begin with the
  same examples, and one noise for all documents would make every interval over documents too narrow.
* **Positions count the row's own tokens.** Loglikelihood rows are padded on the right without a mask; the instrument
  gets one, so nothing is written at padding, and ``positions=last`` means the last token of the context whatever the
  batch. The prompt is the context, so ``phase=decode`` means the continuation that is scored.

How the rows are known: the harness's own :class:`Collator` is run beforehand on the same requests, which gives the
batches it is going to make, and every call is compared with its plan token for token. A harness that orders its
requests in another way is refused, never guessed at.

The harness lets requests of equal tokens share one forward, whatever document they come from. Where two documents meet
in such a forward they would have to share one name, so these requests are scored without sharing, unless nothing is
written (α = 0), where a name cannot matter and the harness's batches stay as they are.

**Controllers** act after what they have seen, so a forward over the whole row would leave them nothing to act on. With
them each loglikelihood row runs alone: its context in one forward, then one token of the continuation after the other,
as it would be generated. Those whose acts follow from the tokens alone, however they are fed (``by_tokens``), such as
an attractor layer, need none of that: their rows run whole, in the harness's own batches.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lm_eval import utils as harness_utils
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator, handle_stop_sequences
from torch import Tensor

from dynprobe.errors import ModelError
from dynprobe.probes import Instrument, Subject, Writer
from dynprobe.protocols._harness_books import Books

__all__ = ["ProbedLM"]


@dataclass(frozen=True)
class _Row:
    """One row of a call that the harness is going to make.

    Attributes:
        name: What its noise is drawn under.
        tokens: Token ids that are fed, without padding.
        n_prompt: How many of them are context.
    """

    name: str
    tokens: tuple[int, ...]
    n_prompt: int


#: A loglikelihood request as the harness encodes it: texts, context tokens, continuation tokens.
_Request = tuple[Any, list[int], list[int]]


class ProbedLM(HFLM):
    """The harness's model around a subject.

    Args:
        subject: A loaded subject with a tokenizer.
        tokenizer: Its tokenizer, or a copy: the harness gives it a padding token where it has none.
        batch_size: Rows per forward.
        writers: What writes, in order; none leaves the harness's model as it is.
        harmless: Whether names cannot matter: the writers change nothing (α = 0), or what follows from tokens alone.
        stepwise: Score continuations token by token, as controllers need it.
        heard: Called with the requests that are done after every call.
    """

    def __init__(
        self,
        subject: Subject,
        tokenizer: Any,
        *,
        batch_size: int = 1,
        writers: Sequence[Writer] = (),
        harmless: bool = False,
        stepwise: bool = False,
        heard: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__(pretrained=subject.model, backend="causal", tokenizer=tokenizer, batch_size=batch_size)
        self.subject, self.writers, self.books = subject, tuple(writers), Books()
        self.logits_cache: bool = bool(self.logits_cache)
        self._harmless, self._heard = harmless, heard
        self._stepwise = stepwise
        self._names: list[str] = []
        self._plan: deque[list[_Row]] = deque()
        self._texts: deque[list[tuple[str, str]]] = deque()
        self._now: list[str] = []
        self.split_shared = 0

    # loglikelihoods

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Score continuations; see the harness."""
        self._names = [_name(request) for request in requests]
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Score whole texts window by window; see the harness."""
        self._names = []
        for request in requests:
            windows = harness_utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1,
            )  # fmt: skip
            name = _name(request)
            self._names += [f"{name}#{number}" if number else name for number, _ in enumerate(windows)]
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[_Request], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        requests, names = list(requests), self._names[: len(requests)]
        if len(names) < len(requests):
            raise self._unknown_order()
        self._names = self._names[len(requests) :]
        rows = [self._row(name, request) for name, request in zip(names, requests, strict=True)]
        apart = [] if self._harmless or not (self.writers or self._stepwise) else _meeting(requests, rows)
        if not apart:
            return self._score(requests, rows, override_bs)
        self.split_shared += len(apart)
        found: list[Any] = [None] * len(requests)
        for chosen, sharing in ((sorted(set(range(len(requests))) - set(apart)), self.logits_cache), (apart, False)):
            kept, self.logits_cache = self.logits_cache, sharing
            try:
                scores = self._score([requests[i] for i in chosen], [rows[i] for i in chosen], override_bs)
            finally:
                self.logits_cache = kept
            for i, score in zip(chosen, scores, strict=True):
                found[i] = score
        return found

    def _score(self, requests: list[_Request], rows: list[_Row], override_bs: int | None) -> list[tuple[float, bool]]:
        if not requests:
            return []
        order = Collator(
            [(i, context, continuation) for i, (_, context, continuation) in enumerate(requests)],
            sort_fn=lambda item: (-len(item[1] + item[2]), tuple(item[1] + item[2])),
            group_by="contexts" if self.logits_cache else None,
            group_fn=lambda item: item[-2] + item[-1][:-1],
        )
        self._plan = deque([rows[item[0]] for item in batch] for batch in order.get_batched(n=self.batch_size))
        scores = super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
        if self._plan:
            raise self._unknown_order()
        return scores

    def _row(self, name: str, request: _Request) -> _Row:
        _, context, continuation = request
        tokens = tuple((context + continuation)[-(self.max_length + 1) :][:-1])
        return _Row(name, tokens, max(len(tokens) - len(continuation) + 1, 0))

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        rows = self._expected(inps)
        if self._stepwise:
            logits = self._one_by_one(rows, inps.shape[1])
        elif not self.writers:
            logits = super()._model_call(inps)
        else:
            length = torch.tensor([len(row.tokens) for row in rows])
            with Instrument(
                self.subject, (), self.writers, row_keys=[row.name for row in rows],
                n_prompt=[row.n_prompt for row in rows], mask=torch.arange(inps.shape[1]) < length[:, None],
            ) as instrument:  # fmt: skip
                logits = super()._model_call(inps)
            instrument.check_fired()
            self.books.enter([row.name for row in rows], instrument, length.numpy())
        self._say(len(rows))
        return logits

    def _expected(self, inps: Tensor) -> list[_Row]:
        """The rows that this call must be, by the plan."""
        rows = self._plan.popleft() if self._plan else []
        found = inps.tolist()
        agree = len(rows) == len(found) and all(
            tuple(row[: len(plan.tokens)]) == plan.tokens for row, plan in zip(found, rows, strict=True)
        )
        if not agree or max(len(row.tokens) for row in rows) != inps.shape[1]:
            raise self._unknown_order()
        return rows

    def _one_by_one(self, rows: Sequence[_Row], width: int) -> Tensor:
        """Each row alone, its context at once and its continuation token by token, as it would be generated."""
        out: Tensor | None = None
        for number, row in enumerate(rows):
            ids = torch.tensor([row.tokens], device=self.device)
            first = max(row.n_prompt, 1)
            pieces, cache = [], None
            with torch.no_grad(), Instrument(
                self.subject, (), self.writers, row_keys=[row.name], n_prompt=[first]
            ) as instrument:  # fmt: skip
                for start, stop in [(0, first), *((i, i + 1) for i in range(first, ids.shape[1]))]:
                    made = self.model(ids[:, start:stop], past_key_values=cache, use_cache=True)
                    pieces.append(made.logits)
                    cache = getattr(made, "past_key_values", None)
                    if cache is None and stop < ids.shape[1]:
                        raise ModelError(
                            f"{self.subject.name} returns no cache, so its text cannot be scored token by token as a "
                            "controller needs it; evaluate it without controllers"
                        )
            instrument.check_fired()
            self.books.enter([row.name], instrument, np.array([ids.shape[1]]))
            logits = torch.cat(pieces, 1)
            if out is None:
                out = logits.new_zeros((len(rows), width, logits.shape[-1]))
            out[number, : logits.shape[1]] = logits[0]
        assert out is not None
        return out

    # generation

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Write until a stop sequence; see the harness."""
        order = Collator(
            [(*request.args, _name(request)) for request in requests],
            sort_fn=lambda item: (-len(self.tok_encode(item[0])), item[0]),
            group_by="gen_kwargs",
            group_fn=lambda item: item[1],
        )
        self._texts = deque([(item[0], item[2]) for item in batch] for batch in order.get_batched(n=self.batch_size))
        return super().generate_until(requests, disable_tqdm=True)

    def tok_batch_encode(self, strings: Sequence[str], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Encode the contexts of one batch, and note whose they are."""
        batch = self._texts.popleft() if self._texts else []
        if [text for text, _ in batch] != list(strings):
            raise self._unknown_order()
        self._now = [name for _, name in batch]
        return super().tok_batch_encode(list(strings), *args, **kwargs)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        names, real = self._now, generation_kwargs["attention_mask"].sum(1).cpu().numpy()
        if not self.writers:
            made = super()._model_generate(context, max_length, stop, **generation_kwargs)
        else:
            with Instrument(self.subject, (), self.writers, row_keys=names) as instrument:
                made = super()._model_generate(context, max_length, stop, **generation_kwargs)
            instrument.check_fired()
        if len(made) == len(names):
            new = np.array([self._written(row, stop) for row in made[:, context.shape[1] :].tolist()])
            if self.writers:
                self.books.enter(names, instrument, real + np.maximum(new - 1, 0))  # the last token is not fed back
            self.books.note_new(names, new)
        self._say(len(names))
        return made

    def _written(self, tokens: list[int], stop: Sequence[str]) -> int:
        """How many tokens of a row are its own: those up to its stop sequence; others of its batch may write on."""
        words = handle_stop_sequences(list(stop), eos=self.tok_decode([self.eot_token_id], skip_special_tokens=False))
        words = [word for word in words if word]

        def ended(n: int) -> bool:
            text = self.tok_decode(tokens[:n], skip_special_tokens=False)
            return any(word in text for word in words)

        return min(bisect_left(range(len(tokens) + 1), True, key=ended), len(tokens))

    def _say(self, rows: int) -> None:
        if self._heard is not None:
            self._heard(rows)

    def _unknown_order(self) -> ModelError:
        from lm_eval import __version__

        return ModelError(
            f"lm-eval {__version__} does not call the model in the order that was expected, so the rows of a batch "
            "cannot be named and their noise not be drawn; install the version dynprobe was tested with: "
            "pip install lm-eval==0.4.13"
        )

    def get_model_info(self) -> dict[str, Any]:
        """Nothing: the run's manifest knows the model, and the harness would ask the hub."""
        return {}


def _name(request: Any) -> str:
    """What the noise of a request's document is drawn under."""
    return f"{request.task_name}:{request.doc_id}"


def _meeting(requests: Sequence[_Request], rows: Sequence[_Row]) -> list[int]:
    """Requests whose forward the harness would let another document, or another context, share."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, (_, context, continuation) in enumerate(requests):
        groups.setdefault(tuple(context + continuation[:-1]), []).append(i)
    return sorted(i for group in groups.values() if len({rows[j] for j in group}) > 1 for i in group)
