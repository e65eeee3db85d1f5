"""Priors of parameters: densities, draws, and the change of variable to the whole real line where samplers move.

normal(m, s)  student_t(nu, m, s)                             real
lognormal(m, s)  halfnormal(s)  gamma(a, rate)                positive
root_inverse_gamma(a, b): an s whose square is inverse-gamma  positive (the conjugate prior of a noise scale)
uniform(low, high)  beta(a, b)                                between their bounds
choice(v1, v2, ...): equal weights                            finite, enumerated
"""

import math
from dataclasses import dataclass

import numpy as np

from fathom.errors import UserError

Array = np.ndarray
_ARGUMENTS = {
    "normal": 2, "student_t": 3, "lognormal": 2, "halfnormal": 1, "gamma": 2, "root_inverse_gamma": 2, "uniform": 2, "beta": 2,
}  # fmt: skip
_POSITIVE = {"normal": (1,), "student_t": (0, 2), "lognormal": (1,), "halfnormal": (0,), "gamma": (0, 1),
             "root_inverse_gamma": (0, 1), "uniform": (), "beta": (0, 1)}  # fmt: skip
_LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class Prior:
    family: str
    args: tuple[float, ...]
    relative: bool = False
    """Of a normal: whether its standard deviation is ``args[1]`` times the theory's noise scale."""

    def __post_init__(self) -> None:
        if self.family == "choice":
            if not 1 <= len(set(self.args)) == len(self.args) <= 4096:
                raise UserError("choice(...) takes 1 to 4096 different values")
            return
        if self.family not in _ARGUMENTS:
            raise UserError(f"{self.family} is not a prior; there are {', '.join(_ARGUMENTS)}, choice")
        if len(self.args) != _ARGUMENTS[self.family]:
            raise UserError(f"{self.family} takes {_ARGUMENTS[self.family]} numbers: {len(self.args)} are given")
        if not all(map(math.isfinite, self.args)) or any(self.args[i] <= 0 for i in _POSITIVE[self.family]):
            raise UserError(f"{self}: scales and shapes must be positive, and all numbers finite")
        if self.family == "uniform" and self.args[0] >= self.args[1]:
            raise UserError(f"{self}: the lower bound must be below the upper one")

    def __str__(self) -> str:
        return (
            f"{self.family}({', '.join(f'{value:g}' for value in self.args)}{' of the noise' if self.relative else ''})"
        )

    @property
    def support(self) -> str:
        if self.family in ("normal", "student_t"):
            return "real"
        return {"uniform": "bounded", "beta": "bounded", "choice": "finite"}.get(self.family, "positive")

    def _bounds(self) -> tuple[float, float]:
        return self.args if self.family == "uniform" else (0.0, 1.0)  # type: ignore[return-value]

    def constrain(self, u: Array) -> Array:
        """The parameter of a real number ``u``."""
        if self.support == "positive":
            return np.exp(np.clip(u, -300, 300))
        if self.support == "bounded":
            low, high = self._bounds()
            return low + (high - low) * 0.5 * (1 + np.tanh(0.5 * u))
        return u

    def unconstrain(self, x: Array) -> Array:
        if self.support == "positive":
            return np.log(x)
        if self.support == "bounded":
            low, high = self._bounds()
            ratio = np.clip((x - low) / (high - low), 1e-15, 1 - 1e-15)
            return np.log(ratio) - np.log1p(-ratio)
        return x

    def log_density(self, u: Array) -> Array:
        """Log density over the real line at ``u``, the Jacobian included."""
        x, a = self.constrain(u), self.args
        match self.family:
            case "normal":
                return -0.5 * ((u - a[0]) / a[1]) ** 2 - math.log(a[1]) - 0.5 * _LOG_2PI
            case "student_t":
                return student_t_log_density((u - a[1]) / a[2], a[0]) - math.log(a[2])
            case "lognormal":
                return -0.5 * ((u - a[0]) / a[1]) ** 2 - math.log(a[1]) - 0.5 * _LOG_2PI
            case "halfnormal":
                return -0.5 * (x / a[0]) ** 2 - math.log(a[0]) + 0.5 * math.log(2 / math.pi) + u
            case "gamma":
                return a[0] * math.log(a[1]) - math.lgamma(a[0]) + a[0] * u - a[1] * x
            case "root_inverse_gamma":
                with np.errstate(over="ignore"):
                    decay = a[1] * np.exp(-2 * u)
                return math.log(2) + a[0] * math.log(a[1]) - math.lgamma(a[0]) - 2 * a[0] * u - decay
            case "uniform":
                return -np.logaddexp(0, u) - np.logaddexp(0, -u)
            case "beta":
                log_beta = math.lgamma(a[0]) + math.lgamma(a[1]) - math.lgamma(a[0] + a[1])
                return -a[0] * np.logaddexp(0, -u) - a[1] * np.logaddexp(0, u) - log_beta
        raise TypeError(self)

    def draw(self, random: np.random.Generator, count: int) -> Array:
        """``count`` draws of the parameter itself."""
        a = self.args
        match self.family:
            case "normal":
                return random.normal(a[0], a[1], count)
            case "student_t":
                return a[1] + a[2] * random.standard_t(a[0], count)
            case "lognormal":
                return np.exp(random.normal(a[0], a[1], count))
            case "halfnormal":
                return np.maximum(np.abs(random.normal(0, a[0], count)), 1e-300)
            case "gamma":
                return np.maximum(random.gamma(a[0], 1 / a[1], count), 1e-300)
            case "root_inverse_gamma":
                return np.sqrt(a[1] / np.maximum(random.gamma(a[0], 1.0, count), 1e-300))
            case "uniform":
                return random.uniform(a[0], a[1], count)
            case "beta":
                return random.beta(a[0], a[1], count)
            case "choice":
                return random.choice(np.array(a), count)
        raise TypeError(self)


def student_t_log_density(z: Array, nu: float) -> Array:
    constant = math.lgamma((nu + 1) / 2) - math.lgamma(nu / 2) - 0.5 * math.log(nu * math.pi)
    return constant - (nu + 1) / 2 * np.log1p(z * z / nu)


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(40)


def student_t_cdf(z: Array, nu: float) -> Array:
    """By quadrature over the angle atan(z / sqrt nu), where the integrand is a power of a cosine."""
    angle = np.arctan(np.asarray(z, float) / math.sqrt(nu))[..., None]
    constant = math.exp(math.lgamma((nu + 1) / 2) - math.lgamma(nu / 2)) / math.sqrt(math.pi)
    return 0.5 + constant * ((angle / 2) * np.cos(angle / 2 * (1 + _NODES)) ** (nu - 1) * _WEIGHTS).sum(-1)


_erfc = np.frompyfunc(math.erfc, 1, 1)


def normal_cdf(z: Array) -> Array:
    return 0.5 * np.asarray(_erfc(-np.asarray(z, float) / math.sqrt(2)), dtype=float)
