"""A record of what an attractor layer does, token by token.

Recording is a wrapper around the controller and not a setting of it, so a layer that is not recorded does nothing more
than it did. Inside the wrapper a forward of many tokens passes one token at a time, which by the rule is the same (a
prefill of S tokens equals S calls of one token): so every token has its own line, the prompt's too.

Three tables come out. *Tokens*: what was injected, how much memory there was, and which slot the token reinforced or
opened. *Slots*: strength of every live slot after the token, and its cosine to it before. *Lives*: one line per slot
from its birth to its end, with the tokens that reinforced it and its last direction.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dynprobe.controllers._controller import Controller, Memory, Seen
from dynprobe.controllers.attractor._layer import AttractorSite
from dynprobe.controllers.attractor._rule import strengths
from dynprobe.probes import Site, Subject

__all__ = ["Life", "Recorded"]

_KEPT = ("A", "s", "stamp", "n", "hits", "born", "mean")


@dataclass
class Life:
    """One slot from its birth to its end.

    Attributes:
        row: Row of the batch.
        slot: Number of the slot.
        born: Position of the token that opened it.
        ended: Position of the token that took its place; −1 where it lived to the end of the text.
        hits: Positions of the tokens that reinforced it.
        strength: Its last strength.
        direction: Its last direction ``[dim]``, a unit vector.
    """

    row: int
    slot: int
    born: int
    ended: int = -1
    hits: list[int] = field(default_factory=list)
    strength: float = 0.0
    direction: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))


class Recorded(Controller):
    """An attractor site, or a baseline of one, with a record of every token.

    Args:
        inner: What acts.
        slots: Whether to keep the table of slots and their lives as well; without it only the line of each token.

    Example:
        >>> import torch
        >>> from dynprobe.controllers.attractor import AttractorSite, Settings
        >>> from dynprobe.testing import tiny_llama
        >>> rule = Settings(centre="none", burn_in=0, theta=0.5, theta_read=0.0, strength=0.5)
        >>> note = Recorded(AttractorSite(rule, ("attn_out", 1), theta=0.5))
        >>> with note.attach(tiny_llama()):
        ...     _ = tiny_llama().model
        >>> len(note.tokens())
        0
    """

    def __init__(self, inner: AttractorSite, *, slots: bool = True) -> None:
        self.inner, self.id, self.keeps_slots = inner, inner.id, slots
        self._tokens: list[dict[str, np.ndarray]] = []
        self._slots: list[dict[str, np.ndarray]] = []
        self._open: dict[tuple[int, int], Life] = {}
        self._ended: list[Life] = []
        self._last: tuple[np.ndarray, Memory] | None = None

    @property
    def site(self) -> Site:
        """Where it acts."""
        return self.inner.site

    def sites_of(self, subject: Subject, spec: str | None, *, writing: bool) -> list[Site]:
        """Those of what acts."""
        return self.inner.sites_of(subject, spec, writing=writing)

    def start(self, n_rows: int) -> Memory:
        """A new sequence: what was noted of the one before is forgotten."""
        for held in (self._tokens, self._slots, self._open, self._ended):
            held.clear()
        self._last = None
        return self.inner.start(n_rows)

    def act(self, state: Tensor, site: Site, seen: Seen, memory: Memory) -> Tensor:
        """Let the tokens pass one after the other, and note what each did."""
        step, parts, changed = seen.step, [], False
        for column in range(state.shape[1]):
            now = replace(seen, step=replace(
                step, positions=step.positions[:, column : column + 1],
                token_ids=None if step.token_ids is None else step.token_ids[:, column : column + 1],
            ))  # fmt: skip
            part = state[:, column : column + 1]
            held = memory if "A" in memory else self.inner._fresh(part)
            before = {name: held[name].clone() for name in _KEPT}
            after = self.inner.act(part, site, now, memory)
            changed = changed or after is not part
            self._note(before, memory, part, after, now)
            parts.append(after)
        return torch.cat(parts, 1) if changed else state

    def _note(self, before: Memory, memory: Memory, y: Tensor, after: Tensor, seen: Seen) -> None:
        s, pos = self.inner.settings, seen.step.positions[:, 0]
        rows = np.arange(len(pos)) if seen.step.rows is None else seen.step.rows
        moved = (memory["n"] > before["n"]).cpu().numpy()
        ok = (pos >= 0) & moved
        if not ok.any():
            return
        x = y[:, 0].float().nan_to_num(0.0)
        stored = after[:, 0].float().nan_to_num(0.0) if s.observe == "post" else x
        centre = before["mean"] if s.centring == "running" else 0.0 if self.inner.mean is None else self.inner.mean
        unit = torch.nn.functional.normalize(stored - centre, dim=-1)
        cos = (before["A"] @ unit[..., None])[..., 0]
        alive = strengths(before, before["n"], s.half_life) >= s.s_min
        now = strengths(memory, memory["n"], s.half_life)
        live = now >= s.s_min
        if s.commit_every == 1:
            hit = (memory["hits"] > before["hits"]) & (memory["born"] == before["born"])
            born = memory["born"] != before["born"]
        else:  # writes come later, but the rule's choice is known now: slots do not change within a chunk
            best = cos.masked_fill(~alive, -torch.inf)
            hit = torch.zeros_like(alive)
            if s.slots:
                hit.scatter_(1, best.argmax(1, keepdim=True), best.amax(1, keepdim=True) >= self.inner.theta)
            born = memory["born"] != before["born"]
        size = x.norm(dim=-1)
        wrote = torch.where(size > 0, (after[:, 0].float() - y[:, 0].float()).norm(dim=-1) / size, 0.0)
        passed = self.inner.passed
        gain = passed.gain[:, -1] if passed is not None else torch.full_like(size, torch.nan)
        self._tokens.append({
            "row": rows[ok], "pos": pos[ok], "gain": _array(gain)[ok], "written": _array(wrote)[ok],
            "n_live": _array(live.sum(1))[ok], "strength_total": _array((now * live).sum(1))[ok],
            "reinforced": _first(hit)[ok], "opened": _first(born)[ok],
        })  # fmt: skip
        if self.keeps_slots:
            self._note_slots(before, memory, rows, pos, ok, cos.where(alive, torch.nan), now, live, hit, born)

    def _note_slots(
        self, before: Memory, memory: Memory, rows: np.ndarray, pos: np.ndarray, ok: np.ndarray,
        cos: Tensor, now: Tensor, live: Tensor, hit: Tensor, born: Tensor,
    ) -> None:  # fmt: skip
        row, slot = np.nonzero(_array(live) & ok[:, None])
        self._slots.append({
            "row": rows[row], "pos": pos[row], "slot": slot, "strength": _array(now)[row, slot],
            "hits": _array(memory["hits"])[row, slot], "born": _array(memory["born"])[row, slot],
            "cos": _array(cos)[row, slot],
        })  # fmt: skip
        hits, births = _array(hit), _array(born)
        for i, m in zip(*np.nonzero(births & ok[:, None]), strict=True):
            key = (int(rows[i]), int(m))
            old = self._open.pop(key, None)
            if old is not None:
                self._close(old, before, int(i), int(pos[i]))
            self._open[key] = Life(*key, born=int(pos[i]))
        for i, m in zip(*np.nonzero(hits & ok[:, None]), strict=True):
            life = self._open.setdefault((int(rows[i]), int(m)), Life(int(rows[i]), int(m), born=-1))
            life.hits.append(int(pos[i]))
        self._last = (rows, memory)

    def _close(self, life: Life, state: Memory, at: int, ended: int = -1) -> None:
        c = strengths(state, state["n"], self.inner.settings.half_life)
        life.ended, life.strength = ended, float(c[at, life.slot])
        life.direction = state["A"][at, life.slot].detach().cpu().numpy().copy()
        self._ended.append(life)

    def tokens(self) -> pd.DataFrame:
        """Return one line per token: ``row pos gain written n_live strength_total reinforced opened``.

        ``reinforced`` and ``opened`` are slots, −1 where there is none; ``written`` is ‖δ‖/‖y‖.
        """
        names = ("row", "pos", "gain", "written", "n_live", "strength_total", "reinforced", "opened")
        return _table(self._tokens, names)

    def slots(self) -> pd.DataFrame:
        """Return one line per token and live slot: ``row pos slot strength hits born cos``.

        Strength is that after the token; cos that of the token to the slot as it was before, NaN where it was dead.
        """
        return _table(self._slots, ("row", "pos", "slot", "strength", "hits", "born", "cos"))

    def lives(self) -> list[Life]:
        """Return the slots' lives, ended ones first, those at the end of the text after them."""
        if self._last is not None:
            rows, memory = self._last
            place = {int(row): i for i, row in enumerate(rows)}
            for key, life in list(self._open.items()):
                if key[0] in place:
                    self._close(life, memory, place[key[0]])
                    del self._open[key]
        return list(self._ended)


def _array(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()


def _first(mark: Tensor) -> np.ndarray:
    """The first marked slot of each row, −1 where none is."""
    found = _array(mark)
    if not found.shape[1]:
        return np.full(len(found), -1)
    return np.where(found.any(1), found.argmax(1), -1)


def _table(parts: list[dict[str, np.ndarray]], names: tuple[str, ...]) -> pd.DataFrame:
    none: Any = np.zeros(0)
    return pd.DataFrame({name: np.concatenate([p[name] for p in parts]) if parts else none for name in names})
