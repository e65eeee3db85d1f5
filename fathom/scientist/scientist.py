"""The scientist: questions about one frozen world, and nothing else.

It holds a world and, once a question needs it, the posterior of that world, which is a function of the world alone. No verb
adds evidence, acts, calls back or remembers: asking changes no later answer, so the order of questions does not matter.
"""

import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fathom.errors import UserError
from fathom.scientist import queries
from fathom.scientist.adequacy import surprise
from fathom.scientist.answer import EXACT, Abstain, Answer, plain
from fathom.scientist.bounds import cautious, cautious_set, iid, posterior_mean
from fathom.scientist.build import read
from fathom.scientist.expression import is_event, parse
from fathom.scientist.influence import leave_one_out
from fathom.scientist.information import entropy
from fathom.scientist.posterior import Budget, Posterior, infer
from fathom.scientist.predictive import moments, outcome_quantiles, quantiles, score_rows
from fathom.scientist.recommend import experiments, rank
from fathom.scientist.world import World

Values = dict[str, Any]
REACH, ADEQUATE, SURPRISE = 0.5, 0.5, 20.0
"""How far outside the data is answered (decades, or spans of the data), the flexible theory's largest probability, and the
largest pay-off of the bet that the rows scatter as no named theory says (adequacy.py)."""


class Scientist:
    """Questions about ``world``: each gives an ``Answer``, an abstention included; a wrong question is a ``UserError``."""

    def __init__(self, world: World, budget: Budget | None = None) -> None:
        self.world, self.budget = world, budget or Budget()

    @classmethod
    def open(cls, path: str | Path, budget: Budget | None = None) -> "Scientist":
        """The scientist of a world file, a snapshot or a ready-made world."""
        return cls(read(path), budget)

    @cached_property
    def posterior(self) -> Posterior:
        return infer(self.world, self.budget)

    def prob(self, event: str, given: str | None = None, threshold: float | None = None) -> Answer:
        """P(event | given, world), with Monte-Carlo error and what each theory says.

        Args:
            event: An expression that is true or false, such as ``multiplier(C=5.6) > 1.1``.
            given: A premise, taken as true.
            threshold: Abstain if the probability cannot be told from this.
        """
        tree = queries.event(event)
        premise = None if given is None else queries.event(given)
        if threshold is not None:
            _fraction(threshold, "threshold")

        def ask() -> Values:
            result = queries.probability(self.posterior, tree, premise)
            self._check_reach(result, *queries.designs_in(tree, self.world))
            if threshold is not None:
                low, high = result["lower"] - 2 * result["mc_se"], result["upper"] + 2 * result["mc_se"]
                if low <= threshold <= high:
                    detail = f"P lies between {max(low, 0):.3g} and {min(high, 1):.3g}; the threshold is {threshold:g}"
                    raise Abstain("straddles_the_threshold", detail, result)
            return result

        return self._answer("prob", {"event": event, "given": given, "threshold": threshold}, ask)

    def interval(self, expression: str, level: float = 0.9) -> Answer:
        """The median and central interval of a quantity over all theories that say what it is, and of each."""
        tree = parse(expression)
        if is_event(tree):
            raise UserError(f"{expression!r} is true or false: ask prob")
        _fraction(level, "level")

        def ask() -> Values:
            result = queries.interval(self.posterior, tree, level)
            self._check_reach(result, *queries.designs_in(tree, self.world))
            return result

        return self._answer("interval", {"expression": expression, "level": level}, ask)

    def theories(self) -> Answer:
        """Every theory's prior, description length, evidence and probability, and whether the named ones are adequate."""

        def ask() -> Values:
            posterior = self.posterior
            rows = [
                {"id": fit.theory.id, "role": fit.theory.role, "bits": fit.theory.bits, "prior": fit.theory.prior,
                 "log_evidence": fit.log_evidence, "p": p}
                for fit, p in zip(posterior.fits, posterior.probabilities, strict=True)
            ]  # fmt: skip
            return {
                "theories": rows,
                "entropy": entropy(posterior.probabilities),
                "surprise": self._surprise,
                "adequate": not self._inadequate,
            }

        return self._answer("theories", {}, ask, adequate=False)

    def predict(self, design: Values, level: float = 0.9) -> Answer:
        """The outcome of one more run at ``design``: median, interval, and how far theories differ."""
        _fraction(level, "level")
        at = self.world.design(design)

        def ask() -> Values:
            posterior, p = self.posterior, self.posterior.probabilities
            mixture = [(w, m[0], s[0]) for w, m, s in (fit.components([at], 1000) for fit in posterior.fits)]
            low, middle, high = outcome_quantiles(posterior, mixture, [(1 - level) / 2, 0.5, (1 + level) / 2])
            means, variances = [], []
            for fit, (weights, m, s) in zip(posterior.fits, mixture, strict=True):
                centers, noise = moments(fit, m, s)
                means.append(float(weights @ centers))
                variances.append(float(weights @ (noise + (centers - means[-1]) ** 2)))
            mean = float(p @ means)
            between = float(p @ (np.array(means) - mean) ** 2)
            by_theory = {f.theory.id: {"p": q, "mean": m} for f, q, m in zip(posterior.fits, p, means, strict=True)}
            result = {
                "median": middle, "lower": low, "upper": high, "level": level, "mean": mean,
                "sd": math.sqrt(float(p @ variances) + between), "outside_the_data": self.world.outside(at),
                "epistemic": {"by_theory": by_theory, "between_theories": math.sqrt(between)},
            }  # fmt: skip
            self._check_reach(result, at, outcome=True)
            return result

        return self._answer("predict", {"design": at, "level": level}, ask)

    def recommend(
        self,
        candidates: list[Values],
        about: str = "theories",
        cost: str | None = None,
        together: str | None = None,
        batch: int = 1,
    ) -> Answer:
        """The caller's candidates, ranked by expected information per unit of cost.

        Args:
            candidates: Designs; each may also give its cost and its experiment in further columns.
            about: theories, parameters, an event or a quantity of this world.
            cost: The name of the cost's column, which may be a design; each costs 1 if not given.
            together: The name of a column: rows with the same value there are one experiment, and cost their sum.
            batch: How many experiments to choose one after another, each given those before it.
        """
        if not 1 <= len(candidates) <= 100_000:
            raise UserError("give 1 to 100,000 candidates")
        if isinstance(batch, bool) or not isinstance(batch, int) or not 1 <= batch <= 16:
            raise UserError("a batch has 1 to 16 experiments")
        extra = {cost, together} - {None} - self.world.designs.keys()
        designs = [self.world.design({k: v for k, v in each.items() if k not in extra}) for each in candidates]
        costs = [1.0 if cost is None else _positive(each.get(cost), cost) for each in candidates]
        labels = [None if together is None else _label(each.get(together), together) for each in candidates]
        query = {"candidates": designs, "costs": costs, "about": about, "together": labels, "batch": batch}
        made = experiments(list(zip(designs, costs, labels, strict=True)))
        if len(made) > 2_000 and (together or batch > 1):
            raise UserError("experiments of several runs, and batches, are chosen from 2,000 candidates at most")
        return self._answer("recommend", query, lambda: rank(self.posterior, made, about, batch))

    def guard(self, design: Values, harm: str, threshold: float, delta: float) -> Answer:
        """Whether to admit a run at ``design``: three bounds on P(harm), and a decision by the cautious one.

        An abstention is not an admission: whoever asks must take it as a refusal until a person decides.

        Args:
            harm: An event over the outcome's name and the world's quantities.
            threshold: The largest probability of harm that is admitted.
            delta: How often the cautious bound may ever be too low, if a listed theory is true.
        """
        tree = queries.event(harm)
        at = self.world.design(design)
        _fraction(threshold, "threshold")
        _fraction(delta, "delta")

        def ask() -> Values:
            posterior, p = self.posterior, self.posterior.probabilities
            found = [queries.harm(fit, index, tree, at) for index, fit in enumerate(posterior.fits)]
            upper = np.array([min(each + 2 * error, 1.0) for each, error in found])
            least = min(fit.theory.prior for fit in posterior.fits)
            alpha = delta * least
            inside = cautious_set(p, alpha)
            bound = float(cautious(p, upper, alpha))
            result = {
                "decision": "refuse" if bound > threshold else "admit", "posterior_mean": float(posterior_mean(p, upper)),
                "iid": float(iid(p, upper)), "cautious": bound, "alpha": alpha,
                "cautious_set": [f.theory.id for f, each in zip(posterior.fits, inside, strict=True) if each],
                "by_theory": {f.theory.id: {"p": q, "harm": each, "upper": high}
                              for f, q, (each, _), high in zip(posterior.fits, p, found, upper, strict=True)},
                "valid_if": f"one of the {len(p)} theories is true and had a prior of at least {least:.3g}: then the "
                            f"cautious bound holds at all times with probability {1 - delta:g}",
            }  # fmt: skip
            self._check_reach(result, at, outcome=True)
            return result

        return self._answer("guard", {"design": at, "harm": harm, "threshold": threshold, "delta": delta}, ask)

    def why(self, of: str) -> Answer:
        """What moved an answer: how far leaving out each row moves an event's probability or a quantity's median."""
        tree = parse(of)

        def number(posterior: Posterior) -> float:
            values, weights = queries.pooled(queries.pieces_of(posterior, tree)[0])
            if is_event(tree):
                return float((weights * (values != 0)).sum() / weights.sum())
            return quantiles(values, weights, [0.5])[0]

        return self._answer("why", {"of": of}, lambda: leave_one_out(self.posterior, number, is_event(tree)))

    def score(self, rows: list[Values]) -> Answer:
        """How well outcomes that the world has not seen were predicted: log score, CRPS, coverage."""
        name = self.world.outcome
        if not 1 <= len(rows) <= 10_000:
            raise UserError("give 1 to 10,000 rows")
        designs = [self.world.design({k: v for k, v in row.items() if k != name}) for row in rows]
        outcomes = [_number(row.get(name), name) for row in rows]
        query = {"rows": [{**design, name: y} for design, y in zip(designs, outcomes, strict=True)]}
        return self._answer("score", query, lambda: score_rows(self.posterior, designs, np.array(outcomes)))

    @cached_property
    def _surprise(self) -> float:
        return surprise(self.posterior)

    @property
    def _inadequate(self) -> str:
        """Why none of the named theories is adequate; empty if one may be."""
        other, prior = float(self.posterior.probabilities[-1]), self.world.theories[-1].prior
        if other > ADEQUATE:
            return f"T_other has probability {other:.3g}, from {prior:.3g} before"
        if self._surprise > SURPRISE:
            return f"the rows scatter as no named theory says: a bet against them all pays {self._surprise:.3g} for 1"
        return ""

    def _answer(self, verb: str, query: Values, ask: Callable[[], Values], *, adequate: bool = True) -> Answer:
        posterior, world = self.posterior, self.world
        result, abstain = None, None
        try:
            if posterior.untrusted:
                detail = (
                    f"{', '.join(posterior.untrusted)} did not pass the gates within {self.budget.evals:,} evaluations"
                )
                raise Abstain("computational", detail)
            if adequate and (why := self._inadequate):
                raise Abstain("no_adequate_theory", why)
            result = plain(ask())
        except Abstain as reason:
            abstain = plain({"reason": reason.reason, "detail": reason.detail, "in_model": reason.in_model})
        inference = {
            fit.theory.id: {"method": fit.report.method, "k_hat": fit.report.k_hat, "ess": fit.report.ess,
                            "replicate_gap": fit.report.replicate_gap, "evals": fit.report.evals}
            for fit in posterior.fits
        }  # fmt: skip
        return Answer(verb, world.hash, plain(query, EXACT), result, abstain, plain(inference), self._assumptions())

    def _assumptions(self) -> list[str]:
        world, rows = self.world, len(self.world.y)
        lines = [
            f"probabilities are relative to the {len(world.theories)} theories, priors and evidence of this world",
            f"{rows} rows are independent given a theory" if rows else "there are no rows: these are priors",
            "this output has no influence on what it speaks of",
        ]
        if world.extra.any():
            lines.append(f"{int((world.extra > 0).sum())} rows are reported: the reporter's error is added")
        if world.claims:
            lines.append(
                f"{len(world.claims)} claims count as things said, true only as far as their speakers are reliable"
            )
        return lines

    def _check_reach(self, result: Values, *designs: Values, outcome: bool = False) -> None:
        """Abstain far outside the data, unless a theory that matters says how laws drift there.

        Args:
            outcome: Whether the question is of an outcome: `beyond` widens those, and no expression over parameters.
        """
        posterior = self.posterior
        drifts = any(
            (f.theory.drifts or (outcome and f.theory.edge is not None)) and p > 0.01
            for f, p in zip(posterior.fits, posterior.probabilities, strict=True)
        )
        for design in designs:
            far = self.world.outside(design)
            if far > REACH and not drifts:
                how = "at a level never seen" if math.isinf(far) else f"{far:.2g} decades or spans outside the data"
                raise Abstain("extrapolation", f"the design is {how}, and no theory says how laws drift there", result)


def _fraction(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise UserError(f"{name} lies between 0 and 1, both excluded: {value!r} does not")


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{name} is a number: {value!r} is not")
    return float(value)


def _positive(value: Any, name: str) -> float:
    number = _number(value, name)
    if number <= 0:
        raise UserError(f"{name} must be positive: {number:g} is not")
    return number


def _label(value: Any, name: str) -> str:
    if not isinstance(value, str | int | float) or isinstance(value, bool) or value == "":
        raise UserError(f"{name} names each row's experiment: {value!r} does not")
    return str(value)
