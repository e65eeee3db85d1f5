"""Whether answers mean what they say, on worlds whose truth is drawn from their own priors.

Simulation-based calibration (Talts et al., arXiv 1804.06788): the rank of the true parameter among posterior draws is uniform.
Bands are simultaneous (Säilynoja, Bürkner, Vehtari, arXiv 2103.10522), found by simulation. Reliability of probabilities by
isotonic regression and its decomposition of the Brier score (CORP: Dimitriadis, Gneiting, Jordan, arXiv 2008.03033).
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fathom.scientist import noise as noises
from fathom.scientist.evaluation import degrees, spread
from fathom.scientist.expression import evaluate
from fathom.scientist.fitting import Fit, fit
from fathom.scientist.reference import LEVEL, WIGGLE
from fathom.scientist.sampler import LADDER
from fathom.scientist.world import World

Array = np.ndarray
POINTS = 64


def simulate(world: World, index: int, random: np.random.Generator) -> tuple[World, dict[str, float]]:
    """``world`` with outcomes that theory ``index`` draws from its prior at the rows' designs, and the true parameters."""
    theory = world.theories[index]
    scale = theory.scale
    truth: dict[str, float] = {}
    factors = {} if not theory.sizes else dict(zip((WIGGLE, LEVEL), random.choice(theory.sizes), strict=True))
    for name in sorted(theory.params, key=lambda each: each != scale):  # some priors are relative to the noise's scale
        prior = theory.params[name]
        drawn = float(prior.draw(random, 1)[0])
        if prior.relative and scale is not None:
            drawn = prior.args[0] + (drawn - prior.args[0]) * truth[scale]
        truth[name] = drawn * factors.get(name[0], 1.0)
    environment: dict[str, Any] = dict(world.data) | truth
    shape = (len(world.y),)
    mean = np.broadcast_to(np.asarray(evaluate(theory.mean, environment), float), shape)
    size = np.broadcast_to(spread(theory, environment), shape)
    y = noises.draw(theory.noise, random, mean, size, degrees(theory))
    if not theory.noise.discrete and world.extra.any():
        y = y + world.extra * random.standard_normal(shape)
    return replace(world, y=np.asarray(y, float), claims=()), truth


def tried(world: World, index: int) -> Fit:
    """The theory's posterior, tried harder until it passes the gates or the ladder ends."""
    for effort in LADDER:
        found = fit(world, index, effort)
        if found.report.trusted:
            break
    return found


def ranks(world: World, index: int, count: int, random: np.random.Generator) -> tuple[dict[str, Array], int]:
    """Share of the posterior below the truth, for every parameter [runs]; and how many posteriors failed the gates.

    Failures are left out of the ranks: the scientist does not answer there.
    """
    found: dict[str, list[float]] = {name: [] for name in world.theories[index].params}
    failed = 0
    for _ in range(count):
        simulated, truth = simulate(world, index, random)
        posterior = tried(simulated, index)
        if not posterior.report.trusted:
            failed += 1
            continue
        params, weights = posterior.draws
        for name, value in truth.items():
            found[name].append(float(weights[params[name] < value].sum()))
    return {name: np.array(each) for name, each in found.items()}, failed


def band(count: int, level: float = 0.95, simulations: int = 2000) -> float:
    """How far, in standard deviations, the ECDF of ``count`` uniforms may leave the diagonal anywhere, at ``level``."""
    random = np.random.default_rng(0)
    return float(np.quantile([departure(random.random(count)) for _ in range(simulations)], level))


def departure(ranks: Array) -> float:
    """The largest distance of the ECDF from the diagonal over a grid, in its standard deviations there."""
    z = (np.arange(POINTS) + 0.5) / POINTS
    ecdf = np.searchsorted(np.sort(ranks), z, side="right") / len(ranks)
    return float((np.abs(ecdf - z) / np.sqrt(z * (1 - z) / len(ranks))).max())


def isotonic(p: Array, happened: Array) -> Array:
    """The non-decreasing function of ``p`` nearest to what happened, at each p (pool adjacent violators)."""
    order = np.argsort(p, kind="stable")
    values: list[float] = []
    sizes: list[int] = []
    start = 0
    sorted_p, sorted_y = p[order], happened[order].astype(float)
    while start < len(p):  # equal probabilities have one value
        end = int(np.searchsorted(sorted_p, sorted_p[start], side="right"))
        values.append(float(sorted_y[start:end].mean()))
        sizes.append(end - start)
        start = end
        while len(values) > 1 and values[-2] >= values[-1]:
            total = sizes[-2] + sizes[-1]
            values[-2:] = [(values[-2] * sizes[-2] + values[-1] * sizes[-1]) / total]
            sizes[-2:] = [total]
    result = np.empty(len(p))
    result[order] = np.repeat(values, sizes)
    return result


@dataclass(frozen=True)
class Reliability:
    """The Brier score = miscalibration - discrimination + uncertainty, and the miscalibration that chance alone gives."""

    brier: float
    miscalibration: float
    discrimination: float
    uncertainty: float
    by_chance: float
    """The 95 % quantile of the miscalibration if every probability were right."""

    @property
    def reliable(self) -> bool:
        return self.miscalibration <= self.by_chance


def reliability(p: Array, happened: Array, draws: int = 400) -> Reliability:
    """Of probabilities [n] and whether each event happened [n]."""

    def parts(y: Array) -> tuple[float, float]:
        brier = float(((p - y) ** 2).mean())
        return brier, brier - float(((isotonic(p, y) - y) ** 2).mean())

    y = happened.astype(float)
    brier, miscalibration = parts(y)
    uncertainty = float(y.mean() * (1 - y.mean()))
    random = np.random.default_rng(0)
    chance = float(np.quantile([parts((random.random(len(p)) < p).astype(float))[1] for _ in range(draws)], 0.95))
    return Reliability(brier, miscalibration, uncertainty - brier + miscalibration, uncertainty, chance)
