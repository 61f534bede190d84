"""A trained linear router: logistic regression on the references, its penalty tuned on the same references."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from identifiers.form import Fitted, References, joined

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

PENALTIES = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0, 100.0, 1000.0)
"""Values of C, for rows that are scaled as a whole to unit variance."""

FOLDS = 5


def logistic(references: References, layers: Sequence[int], penalties: Sequence[float] = PENALTIES) -> Fitted:
    """Multinomial, on unit vectors of ``layers`` side by side; C by the log loss of a five-fold cross-validation.

    Centred and scaled by one number, which beats scaling each dimension. Float32 weights are what is stored.
    """
    rows = np.concatenate([joined(part, layers).numpy() for part in references.values()])
    owner = np.repeat(np.arange(len(references)), [len(part) for part in references.values()])
    mean, scale = rows.mean(0), rows.std(0).mean() or 1.0
    rows = (rows - mean) / scale
    chosen = penalties[0] if len(penalties) == 1 else penalties[int(_losses(rows, owner, penalties).argmin())]
    model = _model(chosen).fit(rows, owner)
    weights = torch.tensor(model.coef_ / scale, dtype=torch.float32)
    bias = torch.tensor(model.intercept_ - model.coef_ @ (mean / scale), dtype=torch.float32)
    if len(weights) == 1:  # two tasks have one row of weights between them
        weights, bias = torch.cat([-weights, weights]) / 2, torch.cat([-bias, bias]) / 2

    def scores(features: Tensor) -> Tensor:
        return -(joined(features, layers) @ weights.T + bias)

    return Fitted(scores, weights.nbytes + bias.nbytes, {"penalty": chosen})


def _model(penalty: float) -> LogisticRegression:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=penalty, max_iter=1000, tol=1e-3, warm_start=True)


def _losses(rows: np.ndarray, owner: np.ndarray, penalties: Sequence[float]) -> np.ndarray:
    """Log loss of the left-out folds for ascending ``penalties``, each fit starting from the one before."""
    from sklearn.metrics import log_loss
    from sklearn.model_selection import StratifiedKFold

    totals = np.zeros(len(penalties))
    for train, held in StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(rows, owner):
        model = _model(penalties[0])
        for i, penalty in enumerate(penalties):
            model.set_params(C=penalty).fit(rows[train], owner[train])
            totals[i] += len(held) * log_loss(owner[held], model.predict_proba(rows[held]), labels=model.classes_)
    return totals
