"""An e-value against the calibration of predictions: a bet that outcomes do not fall where they were said to.

Under calibrated predictions the PIT values u = F(y) are uniform. The mixture of four beta densities, each one way of being
wrong, has expectation at most 1 then, whenever one stops (Ville): a value of 100 or more is as rare as 1 in 100, ever.
"""

import numpy as np

from fathom.scientist.priors import Prior

_BETS = {"too narrow": (0.5, 0.5), "too wide": (2.0, 2.0), "too high": (1.0, 2.0), "too low": (2.0, 1.0)}
"""Of the predictions: what each bet wins on."""


def e_value(pit: list[float]) -> float:
    if not pit:
        return 1.0
    u = np.clip(np.array(pit), 1e-6, 1 - 1e-6)
    logit = np.log(u) - np.log1p(-u)
    jacobian = np.log(u) + np.log1p(-u)
    logs = [float((Prior("beta", shape).log_density(logit) - jacobian).sum()) for shape in _BETS.values()]
    return float(np.exp(min(np.logaddexp.reduce(logs) - np.log(len(logs)), 700.0)))
