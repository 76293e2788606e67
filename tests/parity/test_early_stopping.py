"""loop.early_stop against the callback that users of transformers and TRL know."""

import numpy as np
import pytest

from sera_jax import run as runs
from sera_jax.run import Checks, Validation

pytest.importorskip("torch", reason="parity with transformers' trainer needs torch: install the `parity` extra")
callbacks = pytest.importorskip("transformers.trainer_callback", reason="needs transformers' trainer")


def stops_at(losses: list[float], patience: int) -> int | None:
    """By EarlyStoppingCallback and the trainer's bookkeeping of the best metric, evaluation by evaluation."""
    callback = callbacks.EarlyStoppingCallback(early_stopping_patience=patience)
    state, control = callbacks.TrainerState(), callbacks.TrainerControl()

    class Arguments:
        metric_for_best_model, greater_is_better, load_best_model_at_end = "loss", False, True
        eval_strategy = "steps"

    for number, loss in enumerate(losses, 1):
        callback.on_evaluate(Arguments, state, control, {"eval_loss": loss})
        if state.best_metric is None or loss < state.best_metric:
            state.best_metric = loss
        if control.should_training_stop:
            return number
    return None


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_the_same_check_ends_the_iteration(patience):
    rng = np.random.default_rng(patience)
    for _ in range(100):
        losses = rng.integers(0, 5, 9).astype(float).tolist()
        checks, found = Checks(), None
        for number, loss in enumerate(losses, 1):
            checks = runs.checked(checks, number, {"validation/loss": loss}, Validation(1, dict, patience))
            if checks.stopped:
                found = number
                break
        assert found == stops_at(losses, patience), losses
