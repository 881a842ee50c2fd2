"""What the losses of single responses must do beside their formulas."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import losses
from dpo_jax.losses import Needs
from dpo_jax.structs import BadInput, Scored

f32 = partial(np.asarray, dtype=np.float32)
BETA = 0.3
LOGP = f32([[-24.5], [-31.0], [-3.25], [-8.0]])
REF = f32([[-26.0], [-30.25], [-3.0], [-8.0]])
LABEL = f32([1, 0, 0, 1])
BATCH = Scored(LOGP, ref_logp_BK=REF, label_B=LABEL)
LOSSES = [
    partial(losses.kto, beta=BETA),
    partial(losses.apo_zero_unpaired, beta=BETA),
    partial(losses.bco, beta=BETA),
    partial(losses.npo, beta=BETA),
]
each_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.func.__name__)


def close(actual, expected, tolerance=1e-6):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=tolerance, atol=tolerance)


def slope(loss, scored):
    return jax.grad(lambda s: jnp.sum(loss(s)), allow_int=True)(scored)


@each_loss
def test_what_stands_beside_the_response_is_not_read(loss):
    def beside(x):
        return np.concatenate([x, np.full_like(x, np.nan)], axis=1)

    partnered = replace(BATCH, logp_BK=beside(LOGP), ref_logp_BK=beside(REF))
    np.testing.assert_array_equal(loss(partnered), loss(BATCH))
    np.testing.assert_array_equal(slope(loss, partnered).logp_BK[:, 1], np.zeros(4))
    assert losses.needs(loss).responses == 1


@each_loss
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_a_batch_may_hold_one_class_only(loss, label):
    alone = replace(BATCH, label_B=np.full(4, label, np.float32), kl=jnp.float32(0.5))
    assert np.all(np.isfinite(loss(alone)))
    pushed = np.asarray(slope(loss, alone).logp_BK)
    assert np.all(pushed < 0) if label and loss.func is not losses.npo else np.all(pushed > 0)


@pytest.mark.parametrize("loss", LOSSES[:3], ids=lambda loss: loss.func.__name__)
def test_a_label_is_desirable_above_a_half(loss):
    soft = replace(BATCH, label_B=f32([0.51, 0.5, 0.0, 1.0]))
    np.testing.assert_array_equal(loss(soft), loss(BATCH))
    words = replace(BATCH, label_B=np.array([True, False, False, True]))
    np.testing.assert_array_equal(loss(words), loss(BATCH))
    with pytest.raises(BadInput, match=rf"losses\.{loss.func.__name__} needs Scored\.label_B"):
        loss(replace(BATCH, label_B=None))


def test_the_anchor_of_kto_is_never_negative_and_carries_no_gradient():
    kto = LOSSES[0]
    np.testing.assert_array_equal(kto(replace(BATCH, kl=jnp.float32(-3.0))), kto(BATCH))
    with_kl = replace(BATCH, kl=jnp.float32(2.0))
    assert slope(kto, with_kl).kl == 0
    shifted = replace(BATCH, logp_BK=LOGP - 2)
    close(kto(with_kl), kto(shifted))
    np.testing.assert_array_equal(
        losses.apo_zero_unpaired(BATCH, beta=BETA), losses.kto(BATCH, beta=BETA)
    )


def test_the_shift_of_bco_is_a_prior_of_the_classifier():
    bco = LOSSES[2]
    with_delta = replace(BATCH, delta=jnp.float32(0.75))
    assert slope(bco, with_delta).delta == 0
    close(bco(with_delta), bco(replace(BATCH, logp_BK=LOGP - np.float32(0.75) / BETA)))


@pytest.mark.parametrize(("desirable", "undesirable"), [(4 / 3, 1.0), (1.0, 0.0), (0.0, 2.0)])
def test_classes_are_weighted(desirable, undesirable):
    value = losses.kto(BATCH, beta=BETA, desirable=desirable, undesirable=undesirable)
    weight_B = np.where(LABEL == 1, desirable, undesirable)
    close(value, weight_B * LOSSES[0](BATCH))


def test_kto_compares_with_the_partners_of_the_step():
    kto = losses.needs(LOSSES[0])
    assert (kto.partner, kto.memory, kto.fields) == (True, False, ("label_B",))
    (mean,) = kto.statistics
    assert (mean.field, mean.keep) == ("kl", None)
    partnered = replace(
        BATCH,
        logp_BK=np.concatenate([LOGP, LOGP[::-1]], axis=1),
        ref_logp_BK=np.concatenate([REF, REF[::-1] + 1], axis=1),
    )
    close(mean.value(partnered), (LOGP - REF)[::-1, 0] - 1)


def test_bco_remembers_the_mean_reward():
    needs = losses.needs(LOSSES[2])
    assert (needs.partner, needs.memory) == (False, True)
    (mean,) = needs.statistics
    assert (mean.field, mean.keep) == ("delta", 1.0)
    close(mean.value(BATCH), BETA * (LOGP - REF)[:, 0])
    losses.needs(losses.bco)  # before beta is known


def test_the_others_need_no_statistics():
    assert losses.needs(LOSSES[1]) == Needs(responses=1, fields=("label_B",))
    assert losses.needs(LOSSES[3]) == Needs(responses=1)


def test_npo_is_gradient_ascent_that_fades():
    a = f32([[40.0], [0.0], [-40.0]])
    scored = Scored(a, ref_logp_BK=np.zeros_like(a))
    chance = 1 / (1 + np.exp(-BETA * a.astype(np.float64)))
    close(slope(LOSSES[3], scored).logp_BK, BETA * chance)
