"""Pictures beside a prompt's words: what a few examples tell of classes that are new.

The row of a class that nothing was trained on is a guess: a mixture of its neighbours' rows, put
right by the denoiser as well as it can. How far mixtures are off is known from the trained classes,
each left out in turn: what they miss gives the covariance of a Gaussian prior around the guess, the
wider the less familiar the class. The examples' cross-entropy is the likelihood, and the row
becomes the mode of the posterior. Only the head moves, so that this is convex and takes
milliseconds. A class without examples is no answer in it: nothing shows what it is not, and the
others' rows would learn to say yes to all that is its.

Axes: K classes of the task, N examples, F features before the head, R = F + 1 values of a head row,
V trained classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax
from threadpoolctl import ThreadpoolController
from torch import Tensor

from tina.errors import NonFiniteError
from tina.families import Family
from tina.generator import Generator

Array = NDArray[np.float64]

EVEN = 0.1
"""Of the covariance is spread over all directions: V classes do not tell R squared values. It was
chosen on `select` images (docs/log.md), as is `prompt.prior`."""
KNOWN = 1e-4  # a class that is less new than this is a trained one, but for rounding
NEEDLESS = "examples change nothing: the generator was trained on every class that has some"
"""What to tell a user where `teach` says no."""
CLOSE = {"ftol": 1e-13, "gtol": 1e-7}
"""To the mode, or the rounding of a generated body would show a hundredfold in the rows."""


def teach(familiarity: Sequence[float], shown: Sequence[bool]) -> bool:
    """Whether examples can change anything: whether a class that has some is new.

    Args:
        familiarity: Per class, 0..1.
        shown: Per class, whether it has examples.
    """
    return any(1 - x > KNOWN for x, has in zip(familiarity, shown, strict=True) if has)


def covariance_factor(generator: Generator) -> Tensor:
    """Factor L (R, R) of the prior's covariance L L^T, for a class that resembles nothing."""
    covariance = generator.missing
    even = covariance.diagonal().mean() * torch.eye(len(covariance))
    return torch.linalg.cholesky(covariance.lerp(even, EVEN))


def features(family: Family, body: Tensor, inputs: Tensor) -> Tensor:
    """What a head row is multiplied by (N, R): the features of a body (n_body,), and a one.

    Args:
        inputs: (N, ...), as `Family.embed` returned them.
    """
    count = family.layout(1).row_size - 1
    each = torch.eye(count, count + 1)  # a head whose logits are the features
    theta = family.layout(count).join(body, each)
    return F.pad(family.logits(theta, inputs, num_classes=count), (0, 1), value=1.0)


def posterior_mode(
    seen: Tensor, labels: Tensor, rows: Tensor, newness: Tensor, factor: Tensor, *, prior: float
) -> Tensor:
    """Head rows (K, R) at the mode of the posterior, in double precision but for what comes out.

    Args:
        seen: Of the examples, (N, R); see `features`.
        labels: Which class each shows, int64 (N,).
        rows: (K, R) before the examples.
        newness: Per class, 0 for a row that must stay (K,): the prior's variance is so many times
            `factor`'s.
        factor: See `covariance_factor`.
        prior: Weight of the prior's logarithm. It also stands for what the denoiser, favour and
            doubt do to a mixture, which the covariance knows not.
    """
    scale = newness.where(newness > KNOWN, 0).sqrt().unsqueeze(1).double().numpy()
    x, before, root = (values.double().numpy() for values in (seen, rows, factor))
    truth = np.eye(len(before))[labels.numpy()]

    def moved(z: Array) -> Array:
        return before + scale * (z.reshape(before.shape) @ root.T)

    def loss(z: Array) -> tuple[float, Array]:
        """Minus the posterior's logarithm, of rows moved by standard normal z, and its gradient."""
        log_p = log_softmax(x @ moved(z).T, axis=1)
        slope = (np.exp(log_p) - truth).T @ x  # of the first part, by the rows
        value = prior / 2 * (z @ z) - (log_p * truth).sum()
        return float(value), ((scale * slope) @ root).ravel() + prior * z

    start = np.zeros(before.size)
    with _blas().limit(limits=1, user_api="blas"):
        found = minimize(loss, start, jac=True, method="L-BFGS-B", options=CLOSE)
    return torch.from_numpy(moved(found.x)).to(rows.dtype)


@cache
def _blas() -> ThreadpoolController:
    """What sets the threads of numpy's products; for small ones they wait on each other."""
    return ThreadpoolController()


@torch.no_grad()
def learn_from(
    generator: Generator, theta: Tensor, familiarity: Tensor, examples: Sequence[Tensor | None]
) -> Tensor:
    """A generated theta (n,) after examples of some classes.

    The rows of trained names stay as they are; examples of these tell what the new classes are not.
    So do those of classes that have none. Where no class that has some is new, nothing changes.

    Args:
        familiarity: (K,), 0..1, of the prompt by which it was generated.
        examples: Per class inputs (N_k, ...), as `Family.embed` returned them, or none; see
            `tina.prompts.check_examples`.

    Raises:
        NonFiniteError: A row has become NaN or infinite.
    """
    family, layout = generator.family, generator.family.layout(len(familiarity))
    shown = {i: inputs for i, inputs in enumerate(examples) if inputs is not None}
    if not teach(familiarity.tolist(), [inputs is not None for inputs in examples]):
        return theta
    body, rows = layout.split(theta)
    counts = torch.tensor([len(inputs) for inputs in shown.values()])
    labels = torch.arange(len(shown)).repeat_interleave(counts)
    seen = features(family, body, torch.cat(list(shown.values())))
    rows = rows.clone()
    newness = 1 - familiarity[list(shown)]
    factor, prior = covariance_factor(generator), generator.config.prompt.prior
    rows[list(shown)] = posterior_mode(
        seen, labels, rows[list(shown)], newness, factor, prior=prior
    )
    if not bool(torch.isfinite(rows).all()):
        raise NonFiniteError("examples led to NaN or infinite weights; nothing is returned")
    return layout.join(body, rows)
