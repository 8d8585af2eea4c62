"""Messages over pairs (state of the law, state of the automaton) along the sites, and what is read off them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from codd_ppl.constraints.backbone import Backbone
from codd_ppl.constraints.layers import Layer
from codd_ppl.constraints.products import CHUNK, MaxProduct, SumProduct, Table, over_edges
from codd_ppl.typing import Float, Int

__all__ = ["Passes"]

Algebra = SumProduct | MaxProduct


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
        self._emissions: dict[tuple[int, int], list[Table]] = {}
        count = len(layers)
        self.back: list[Tensor] = [torch.empty(0)] * count
        for i in range(count - 1, -1, -1):
            layer, grouped, ahead = layers[i], self.grouped(i), self.ahead(i)
            before, through, after = layer.edges
            values = lambda part, g=grouped, a=ahead, c=through, t=after: g[:, c[part]] + a[:, t[part]]  # noqa: E731
            size = backbone.batch * backbone.states(i)
            found = over_edges(algebra, len(before), size, values, before, layer.states)
            self.back[i] = found + backbone.own(i)[:, None]
        first = self.back[0][:, 0]
        self.total = algebra.product(first[:, None], Table(torch.zeros_like(first[:1, :, None])))[:, 0, 0]

    def ahead(self, i: int) -> Float[Tensor, "batch after states"]:
        """Of each state of automaton and law behind site i, what the rest of the sites weighs."""
        if i + 1 == len(self.layers):
            return self.back_end(i)
        if self.backbone.same(i + 1):
            return self.back[i + 1]
        return self.algebra.product(self.back[i + 1], self.backbone.move(i + 1, back=True))

    def back_end(self, i: int) -> Tensor:
        """Behind the last site: one state, weight 1."""
        shape = (self.backbone.batch, 1, self.backbone.states(i))
        return torch.zeros(shape, dtype=torch.float64, device=self.backbone.device)

    def weights(self, i: int) -> Float[Tensor, "batch possible"]:
        """log w of the tokens that the automaton allows at a site."""
        weights = self.backbone.weights[:, i]
        tokens = self.layers[i].groups.tokens
        chosen = weights if len(tokens) == weights.shape[-1] and self._in_order(i) else weights[:, tokens]
        return chosen.expand(self.backbone.batch, -1)

    def _in_order(self, i: int) -> bool:
        return len(self.layers[i].groups.sizes) == 1

    def tables(self, i: int) -> list[Table]:
        """For each class of site i its tokens' emissions, (batch or 1, tokens, states); kept for sites that share them."""
        groups, place = self.layers[i].groups, self.backbone.path[i]
        tie = place.emission and self.backbone.tables.factor(place.emission)
        own = self.backbone.is_state(i)
        key = (id(groups), id(tie) if isinstance(tie, Tensor) else -1 - int(own))
        if key not in self._emissions:
            table = self.backbone.emission(i, groups.tokens).mT
            self._emissions[key] = [Table(part) for part in table.split(groups.sizes, dim=-2)]
        return self._emissions[key]

    def grouped(self, i: int) -> Float[Tensor, "batch classes states"]:
        """E_c[z] of a site."""
        sizes = self.layers[i].groups.sizes
        parts = zip(self.weights(i).split(sizes, dim=-1), self.tables(i), strict=True)
        return torch.cat([self.algebra.product(w[:, None], table) for w, table in parts], 1).double()

    def marginals(self) -> Float[Tensor, "batch sites vocab"]:
        """Single-site probabilities: forwards messages meet those from behind in the sum over states."""
        backbone, count = self.backbone, len(self.layers)
        result = []
        front = backbone.own(0)[:, None].expand(backbone.batch, -1, -1)
        for i, layer in enumerate(self.layers):
            before, through, after = layer.edges
            size, ahead = backbone.batch * backbone.states(i), self.ahead(i)
            start = front

            def around(part: slice, b: Tensor = before, a: Tensor = after) -> Tensor:
                return start[:, b[part]] + ahead[:, a[part]]  # noqa: B023

            outside = over_edges(self.algebra, len(before), size, around, through, len(layer.groups.sizes))
            logs = [
                self.algebra.product(outside[:, c, None], Table(table.log.mT.double()))[:, 0]
                for c, table in enumerate(self.tables(i))
            ]
            log = torch.cat(logs, -1) + self.weights(i)
            spread = log.new_zeros(backbone.batch, backbone.weights.shape[-1])
            result.append(spread.index_copy(1, layer.groups.tokens, log.softmax(-1)))
            if i + 1 == count:
                break
            grouped = self.grouped(i)

            def onwards(part: slice, b: Tensor = before, c: Tensor = through) -> Tensor:
                return start[:, b[part]] + grouped[:, c[part]]  # noqa: B023

            behind = over_edges(self.algebra, len(before), size, onwards, after, self.layers[i + 1].states)
            if not backbone.same(i + 1):
                behind = self.algebra.product(behind, backbone.move(i + 1, back=False))
            front = behind + backbone.own(i + 1)[:, None]
        return torch.stack(result, 1)

    def decode(self, draws: int, chooser: Algebra) -> Int[Tensor, "draws batch sites"]:
        """States and tokens from the first site on, each given what was chosen before.

        z_i ~ move[z_{i-1}, z_i] back_i[a_i, z_i],    x_i ~ w_i(x) psi(z_i, x) ahead_i[a'(x), z_i]
        """
        backbone, batch = self.backbone, self.backbone.batch
        rows = torch.arange(batch, device=backbone.device).repeat(draws)
        state, automaton, written = torch.zeros_like(rows), torch.zeros_like(rows), []
        for i, layer in enumerate(self.layers):
            log = self.back[i][rows, automaton]
            if i and backbone.same(i):
                chosen = state
            else:
                if i:
                    table = backbone.move(i, back=False).log
                    log = log + table[rows if len(table) > 1 else torch.zeros_like(rows), state]
                chosen = chooser.choose(log)
            state, ahead = chosen, self.ahead(i)
            tokens = []
            each = max(1, CHUNK // max(1, len(layer.groups.tokens)))
            for part in torch.arange(len(rows), device=rows.device).split(each):
                tokens.append(self._token(i, rows[part], state[part], automaton[part], ahead, chooser))
            value, automaton = (torch.cat(t) for t in zip(*tokens, strict=True))
            written.append(value)
        return torch.stack(written, -1).reshape(draws, batch, -1)

    def _token(
        self, i: int, rows: Tensor, state: Tensor, automaton: Tensor, ahead: Tensor, chooser: Algebra
    ) -> tuple[Tensor, Tensor]:
        """A token for each row, and the automaton's state behind it."""
        layer, groups = self.layers[i], self.layers[i].groups
        following = layer.following[:, automaton].T  # (rows, classes)
        behind = ahead[rows[:, None], following.clamp_min(0), state[:, None]]
        behind = torch.where(following >= 0, behind, -torch.inf)
        emission = self.backbone.emission(i, groups.tokens)
        table = emission[rows if len(emission) > 1 else torch.zeros_like(rows), state]
        log = self.weights(i)[rows] + table + behind[:, groups.class_of]
        place = chooser.choose(log)
        return groups.tokens[place], following.gather(1, groups.class_of[place][:, None])[:, 0]
