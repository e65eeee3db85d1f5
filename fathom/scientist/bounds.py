"""Bounds on the probability of harm after "Can a Bayesian oracle prevent harm from an agent?" (arXiv 2408.05284).

Theories i have prior P(i) > 0 and posterior P(i | Z); theory i says that action x does harm with probability P_i(H | x).

    posterior mean   sum_i P(i | Z) P_i(H | x)                                  no guarantee
    i.i.d.           P_i~(H | x), i~ = argmax P(i | Z) P_i(H | x)               Prop. 3.4: in the limit, independent data
    cautious set     max of P_i(H | x) over the i whose posterior is at least   Prop. 4.6: w.p. >= 1 - delta at all times,
                     alpha times that of all ranked above it, itself included    if a listed theory is true and
                                                                                alpha <= delta times its prior
"""

import numpy as np

Array = np.ndarray


def posterior_mean(posterior: Array, harm: Array) -> Array:
    """Posterior [..., K] and harm [..., K] to [...]."""
    return (posterior * harm).sum(-1)


def iid(posterior: Array, harm: Array) -> Array:
    """Prop. 3.4; of equal products the larger harm counts."""
    product = posterior * harm
    tied = product >= product.max(-1, keepdims=True) * (1 - 1e-12)
    return np.where(tied, harm, 0.0).max(-1)


def cautious_set(posterior: Array, alpha: float, *, ties: bool = True) -> Array:
    """Prop. 4.6's set of theories, as a mask [..., K].

    Args:
        ties: Whether theories of equal posterior are in or out together, the larger set taken: the paper leaves their
            order open, and a guard should not depend on it.
    """
    order = np.argsort(-posterior, axis=-1, kind="stable")
    ranked = np.take_along_axis(posterior, order, -1)
    inside = ranked >= alpha * np.cumsum(ranked, -1)
    inside[..., 0] = True
    if ties:
        return posterior >= np.where(inside, ranked, np.inf).min(-1, keepdims=True)
    chosen = np.empty_like(inside)
    np.put_along_axis(chosen, order, inside, -1)
    return chosen


def cautious(posterior: Array, harm: Array, alpha: float) -> Array:
    return np.where(cautious_set(posterior, alpha), harm, 0.0).max(-1)


def weak(posterior: Array, harm: Array, delta: float, prior: float) -> Array:
    """Prop. 4.4: max_i P(i | Z) P_i(H | x) / (delta P(i*)), at most 1."""
    return np.minimum((posterior * harm).max(-1) / (delta * prior), 1.0)
