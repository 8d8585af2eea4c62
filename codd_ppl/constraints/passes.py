"""Messages over pairs (state of the law, state of the automaton) along the sites, and what is read off them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from codd_ppl.constraints.backbone import Backbone
from codd_ppl.constraints.layers import Layer
from codd_ppl.constraints.products import CHUNK, MaxProduct, SumProduct, Table, over_edges
from codd_ppl.typing import Float, Int

__all__ = ["Passes"]

Algebra = SumProduct | MaxProduct

KEPT = 1 << 26
"""Entries of intermediate results that are kept for all sites; with more they are computed again when needed."""


class Passes:
    """The backwards pass, made at once; the forwards one where marginals are asked for.

    With E_c[z] = sum_{x in c} w_i(x) psi(z, x) and a -c-> a' the automaton's edges,

        back_i[a, z] = own_i[z] sum_c E_c[z] ahead_i[a', z],     ahead_i[a', z] = sum_z' move[z, z'] back_{i+1}[a', z']

    Args:
        backbone: the law's numbers.
        layers: the automaton, on the same device.
        algebra: sums, or maxima.

    Attributes:
        total: (batch,) log of the sum (or maximum) over everything.
    """

    def __init__(self, backbone: Backbone, layers: Sequence[Layer], algebra: Algebra) -> None:
        self.backbone, self.layers, self.algebra = backbone, layers, algebra
        count, batch = len(layers), backbone.batch
        self._tables: dict[tuple[int, int], list[Table]] = {}
        sizes = [batch * len(s.groups.sizes) * backbone.states(i) for i, s in enumerate(layers)]
        self._grouped: dict[int, Tensor] = {}
        if sum(sizes) <= KEPT:
            for sites in self._bundles():
                grouped = self._sums(sites)
                self._grouped.update(zip(sites, grouped.unbind(1), strict=True))
        self.back: list[Tensor] = [torch.empty(0)] * count
        self._ahead: dict[int, Tensor] = {}
        keep = batch * sum(s.states * backbone.states(i) for i, s in enumerate(layers)) <= KEPT
        for i in range(count - 1, -1, -1):
            layer, grouped, ahead = layers[i], self.grouped(i), self.ahead(i)
            if keep:
                self._ahead[i] = ahead
            before, through, after = layer.edges
            values = lambda part, g=grouped, a=ahead, c=through, t=after: g[:, c[part]] + a[:, t[part]]  # noqa: E731
            found = over_edges(algebra, len(before), batch * backbone.states(i), values, before, layer.states)
            own = backbone.own(i)
            self.back[i] = found if own is None else found + own[:, None]
        first = self.back[0][:, 0]
        self.total = algebra.product(first[:, None], Table(torch.zeros_like(first[:1, :, None])))[:, 0, 0]

    def ahead(self, i: int) -> Float[Tensor, "batch after states"]:
        """Of each state of automaton and law behind site i, what the rest of the sites weighs."""
        if i in self._ahead:
            return self._ahead[i]
        if i + 1 == len(self.layers):
            shape = (self.backbone.batch, 1, self.backbone.states(i))
            return torch.zeros(shape, dtype=torch.float64, device=self.backbone.device)
        if self.backbone.same(i + 1):
            return self.back[i + 1]
        return self.algebra.product(self.back[i + 1], self.backbone.move(i + 1, back=True))

    # -- between tokens and classes --------------------------------------------------------------------

    def _key(self, i: int) -> tuple[int, int]:
        """Sites of one key have the same classes and emissions."""
        return id(self.layers[i].groups), self.backbone.emission_key(i)

    def _bundles(self) -> Iterator[list[int]]:
        """Sites whose classes and emissions are the same, as many as fit in the cache: they are one product."""
        found: dict[tuple[int, int], list[int]] = {}
        for i in range(len(self.layers)):
            found.setdefault(self._key(i), []).append(i)
        for sites in found.values():
            size = self.backbone.batch * len(self.layers[sites[0]].groups.tokens)
            each = max(1, CHUNK // max(1, size))
            yield from (sites[k : k + each] for k in range(0, len(sites), each))

    def weights(self, sites: Sequence[int]) -> Float[Tensor, "batch some possible"]:
        """log w of the tokens that the automaton allows, at sites with the same classes."""
        tokens = self.layers[sites[0]].groups.tokens
        weights = self.backbone.weights.expand(self.backbone.batch, -1, -1)
        if len(sites) == 1:
            return weights[:, sites[0], tokens][:, None]
        return weights[:, list(sites)][..., tokens]

    def tables(self, i: int) -> list[Table]:
        """For each class of site i its tokens' emissions, (batch or 1, tokens, states)."""
        key = self._key(i)
        if key not in self._tables:
            groups = self.layers[i].groups
            emission = self.backbone.emission(i, groups.tokens).mT
            self._tables[key] = [Table(part) for part in emission.split(groups.sizes, dim=-2)]
        return self._tables[key]

    def _sums(self, sites: Sequence[int]) -> Float[Tensor, "batch some classes states"]:
        """E_c[z] at sites of one bundle."""
        groups = self.layers[sites[0]].groups
        parts = zip(self.weights(sites).split(groups.sizes, dim=-1), self.tables(sites[0]), strict=True)
        return torch.stack([self.algebra.product(w, table) for w, table in parts], 2).double()

    def grouped(self, i: int) -> Float[Tensor, "batch classes states"]:
        """E_c[z] of a site."""
        return self._grouped[i] if i in self._grouped else self._sums([i])[:, 0]

    # -- marginals ---------------------------------------------------------------------------------------

    def marginals(self) -> Float[Tensor, "batch sites vocab"]:
        """Single-site probabilities: forwards messages meet those from behind in the sum over states."""
        outside = list(self._outside())
        result = torch.zeros_like(self.backbone.weights.expand(self.backbone.batch, -1, -1))
        result = result.contiguous()
        for sites in self._bundles():
            around = torch.stack([outside[i] for i in sites], 1)  # (batch, sites, classes, states)
            logs = [
                self.algebra.product(around[:, :, c], table.transposed)
                for c, table in enumerate(self.tables(sites[0]))
            ]
            log = torch.cat(logs, -1) + self.weights(sites)
            tokens = self.layers[sites[0]].groups.tokens
            place = torch.tensor(sites, device=tokens.device)
            result[:, place[:, None], tokens] = log.softmax(-1).to(result.dtype)
        return result

    def _outside(self) -> Iterator[Float[Tensor, "batch classes states"]]:
        """Of every site, what all others say of a class and a state."""
        backbone, count = self.backbone, len(self.layers)
        own = backbone.own(0)
        front = self.back[0].new_zeros(backbone.batch, 1, backbone.states(0))
        front = front if own is None else front + own[:, None]
        for i, layer in enumerate(self.layers):
            before, through, after = layer.edges
            size, ahead, start = backbone.batch * backbone.states(i), self.ahead(i), front
            around = lambda part, f=start, a=ahead, s=before, t=after: f[:, s[part]] + a[:, t[part]]  # noqa: E731
            yield over_edges(self.algebra, len(before), size, around, through, len(layer.groups.sizes))
            if i + 1 == count:
                return
            grouped = self.grouped(i)
            onwards = lambda part, f=start, g=grouped, s=before, c=through: f[:, s[part]] + g[:, c[part]]  # noqa: E731
            front = over_edges(self.algebra, len(before), size, onwards, after, self.layers[i + 1].states)
            if not backbone.same(i + 1):
                front = self.algebra.product(front, backbone.move(i + 1, back=False))
            own = backbone.own(i + 1)
            front = front if own is None else front + own[:, None]

    # -- draws -------------------------------------------------------------------------------------------

    def decode(self, draws: int, chooser: Algebra) -> Int[Tensor, "draws batch sites"]:
        """States and tokens from the first site on, each given what was chosen before.

        z_i ~ move[z_{i-1}, z_i] back_i[a_i, z_i],    x_i ~ w_i(x) psi(z_i, x) ahead_i[a'(x), z_i]
        """
        backbone, batch = self.backbone, self.backbone.batch
        rows = torch.arange(batch, device=backbone.device).repeat(draws)
        state, automaton, written = torch.zeros_like(rows), torch.zeros_like(rows), []
        for i, layer in enumerate(self.layers):
            if i == 0 or not backbone.same(i):
                log = self.back[i][rows, automaton]
                if i:
                    table = backbone.move(i, back=False).log
                    log = log + table[rows if len(table) > 1 else torch.zeros_like(rows), state]
                state = chooser.choose(log)
            ahead, values = self.ahead(i), []
            each = max(1, CHUNK // max(1, len(layer.groups.tokens)))
            for start in range(0, len(rows), each):
                part = slice(start, start + each)
                values.append(self._token(i, rows[part], state[part], automaton[part], ahead, chooser))
            value, automaton = (torch.cat(t) for t in zip(*values, strict=True))
            written.append(value)
        return torch.stack(written, -1).reshape(draws, batch, -1)

    def _token(
        self, i: int, rows: Tensor, state: Tensor, automaton: Tensor, ahead: Tensor, chooser: Algebra
    ) -> tuple[Tensor, Tensor]:
        """A token for each row, and the automaton's state behind it."""
        groups = self.layers[i].groups
        following = self.layers[i].following[:, automaton].T  # (rows, classes)
        behind = ahead[rows[:, None], following.clamp_min(0), state[:, None]]
        behind = torch.where(following >= 0, behind, -torch.inf)
        log = self.weights([i])[rows, 0] + self.backbone.rows(i, rows, state, groups.tokens)
        place = chooser.choose(log + behind[:, groups.class_of])
        return groups.tokens[place], following.gather(1, groups.class_of[place][:, None])[:, 0]
