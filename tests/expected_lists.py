"""Rows of the losses of lists, of single responses, of rewards and of policy gradients."""

import numpy as np
from expected_row import ARRAYS, FAR, Row, cdpo, exp, ls, sigmoid

# Lists of up to 4 responses; what stands at a masked place may not matter.
ARRAYS |= {
    "list_logp_BK": np.array(
        [[-24.5, -37.0, -9.25, -3.5], [-3.25, -4.5, -1.0, 99.0], [-8.0, 5.0, 7.0, -6.0]]
    ),
    "list_ref_BK": np.array(
        [[-26.0, -35.5, -9.5, -3.0], [-3.0, -5.0, -3.5, 11.0], [-7.0, 1.0, 2.0, 3.0]]
    ),
    "list_mask_BK": np.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]], np.int32),
    "list_score_BKC": np.stack(
        [
            [[2.5, 1.0, 0.75, -0.5], [0.25, 1.75, -2.0, 9.0], [3.0, 5.0, 6.0, 7.0]],
            [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0], [8.0, 9.0, 10.0, 11.0]],
        ],
        axis=-1,
    ),
    "target_BK": np.array([[2.0, -1.0], [0.5, 0.25], [0.0, 3.0], [4.0, -3.5]]),
    "advantage": np.array([[1.5, -0.5, 2.0], [-1.0, 0.75, -2.5]]),
    "value": np.array([[0.5, 1.25, -2.0], [3.0, -0.25, 0.125]]),
    "old_value": np.array([[0.25, 0.5, -1.875], [3.25, 0.75, 0.25]]),
    "return_": np.array([[1.0, 0.0, -2.5], [2.5, -1.0, 0.375]]),
}
FAR |= {
    "list_logp_BK": np.array(
        [[-10.0, -810.0, -410.0, -10.0], [-810.0, -10.0, -10.0, -0.0], [-0.0, -0.0, -0.0, -0.0]]
    ),
    "list_ref_BK": np.array(
        [[-10.0, -10.0, -10.0, -10.0], [-10.0, -10.0, -810.0, -9.0], [-0.0, -800.0, -0.0, -0.0]]
    ),
    "list_mask_BK": np.array([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]], np.int32),
    "list_score_BKC": np.stack(
        [
            [[2.0, 2.0, -800.0, 30.0], [-800.0, 0.0, 800.0, 0.0], [800.0, 0.0, 3.0, 3.0]],
            [[800.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]],
        ],
        axis=-1,
    ),
    "target_BK": np.array([[-800.0, 0.0], [0.0, 800.0], [0.0, 0.0], [3.0, -800.0]]),
    "advantage": np.array([[1.0, 800.0, 0.0], [-1.0, -0.0, 800.0]]),
    "value": np.array([[800.0, 0.0, -800.0], [0.0, 3.0, 800.0]]),
    "old_value": np.array([[0.0, 800.0, -800.0], [0.0, 3.0, -800.0]]),
    "return_": np.array([[-800.0, 0.0, -800.0], [0.0, 3.0, 800.0]]),
}
LISTS = {"logp_BK": "list_logp_BK", "ref_logp_BK": "list_ref_BK"}
MASKED = {**LISTS, "mask_BK": "list_mask_BK"}
SCORES = {"score_BKC": "list_score_BKC"}
UNPAIRED = ("logp_BK", "ref_logp_BK", "label_B")


def each_list(value):
    """A formula over the whole batch from value(a_k, score_k, **numbers) of one list."""

    def formula(x, masked=True, **numbers):
        rows = []
        for b, there in enumerate(x.list_mask_BK != 0):
            there = there if masked else np.ones_like(there)
            a = (x.list_logp_BK - x.list_ref_BK)[b, there]
            rows.append(value(a, x.list_score_BKC[b, there, 0], **numbers))
        return np.array(rows)

    return formula


def unmasked(formula):
    return lambda x, **numbers: formula(x, masked=False, **numbers)


def softmax(x):
    return np.exp(x - np.logaddexp.reduce(x))


@each_list
def plackett_luce_dpo(a, score, beta):
    return sum(np.logaddexp.reduce(beta * a[k:]) - beta * a[k] for k in range(len(a)))


@each_list
def info_nca(a, score, beta, alpha):
    if not len(a):
        return 0.0
    return -np.sum(softmax(score / alpha) * (beta * a - np.logaddexp.reduce(beta * a)))


@each_list
def nca_list(a, score, beta, alpha):
    if not len(a):
        return 0.0
    return -np.sum(softmax(score / alpha) * ls(beta * a)) - np.mean(ls(-beta * a))


@each_list
def lipo(a, score, beta):
    gain = exp(score * np.log(2)) - 1
    rank = np.empty(len(a))
    rank[np.argsort(-beta * a, kind="stable")] = np.arange(1, len(a) + 1)
    value = 0.0
    for i in range(len(a)):
        for j in range(len(a)):
            if score[i] > score[j]:
                swap = abs(1 / np.log1p(rank[i]) - 1 / np.log1p(rank[j]))
                value -= abs(gain[i] - gain[j]) * swap * ls(beta * (a[i] - a[j]))
    return value


def by_label(desirable, undesirable):
    """One formula for responses with a label above 1/2, one for the others."""
    return lambda x, **numbers: np.where(
        x.label_B > 0.5, desirable(x, **numbers), undesirable(x, **numbers)
    )


def anchor(x):
    return np.maximum(x.sg.kl, 0)


def kto(x, beta, desirable=1.0, undesirable=1.0, k=0.0):
    good = desirable * (1 - sigmoid(beta * (x.a - k)))
    return np.where(x.label_B > 0.5, good, undesirable * (1 - sigmoid(beta * (k - x.a))))


def clipped(x, low=0.2, high=0.2, dual=np.inf):
    ratio, A = exp(x.logp - x.sg.ref_logp), x.sg.advantage
    loss = np.maximum(-A * ratio, -A * np.clip(ratio, 1 - low, 1 + high))
    return np.where(A < 0, np.minimum(loss, dual * abs(A)), loss) if dual < np.inf else loss


SURROGATE = ("logp", "ref_logp", "advantage")
ROWS = (
    Row("plackett_luce_dpo", unmasked(plackett_luce_dpo), {"beta": 0.3}, takes=LISTS),
    Row("plackett_luce_dpo", plackett_luce_dpo, {"beta": 0.3}, takes=MASKED),
    Row("plackett_luce_dpo", lambda x, beta: cdpo(beta * (x.a - x.b)), {"beta": 0.3}),
    Row("info_nca", unmasked(info_nca), {"beta": 0.3, "alpha": 0.5}, takes={**LISTS, **SCORES}),
    Row("info_nca", info_nca, {"beta": 0.3, "alpha": 2.0}, takes={**MASKED, **SCORES}),
    Row("nca_list", unmasked(nca_list), {"beta": 0.3, "alpha": 0.5}, takes={**LISTS, **SCORES}),
    Row("nca_list", nca_list, {"beta": 0.3, "alpha": 2.0}, takes={**MASKED, **SCORES}),
    Row("lipo", unmasked(lipo), {"beta": 0.3}, takes={**LISTS, **SCORES}),
    Row("lipo", lipo, {"beta": 0.3}, takes={**MASKED, **SCORES}),
    Row("kto", kto, {"beta": 0.3}, takes=UNPAIRED),
    Row(
        "kto",
        lambda x, **numbers: kto(x, **numbers, k=anchor(x)),
        {"beta": 0.3, "desirable": 1.25, "undesirable": 0.75},
        takes=(*UNPAIRED, "kl"),
    ),
    Row(
        "kto",  # a negative estimate counts as 0
        kto,
        {"beta": 0.3},
        takes={**{name: name for name in UNPAIRED}, "kl": "delta"},
    ),
    Row(
        "apo_zero_unpaired",
        by_label(lambda x, beta: 1 - sigmoid(beta * x.a), lambda x, beta: sigmoid(beta * x.a)),
        {"beta": 0.3},
        takes=UNPAIRED,
    ),
    Row(
        "bco",
        by_label(lambda x, beta: -ls(beta * x.a), lambda x, beta: -ls(-beta * x.a)),
        {"beta": 0.3},
        takes=UNPAIRED,
    ),
    Row(
        "bco",
        by_label(
            lambda x, beta: -ls(beta * x.a - x.sg.delta),
            lambda x, beta: -ls(-(beta * x.a - x.sg.delta)),
        ),
        {"beta": 0.3},
        takes=(*UNPAIRED, "delta"),
    ),
    Row("npo", lambda x, beta: -ls(-beta * x.a), {"beta": 0.3}),
    Row(
        "wpo_weight",
        lambda x: np.exp(np.sum(x.aligned_BK, axis=1)),
        takes=("logp_BK", "aligned_BK"),
    ),
    Row("centering", lambda x: np.sum(x.score_BK, axis=1) ** 2, takes=("score_BK",)),
    Row(
        "regression",
        lambda x: np.sum((x.score_BK - x.target_BK) ** 2, axis=1),
        takes=("score_BK", "target_BK"),
    ),
    Row("reinforce", lambda x: -x.sg.advantage * x.logp, takes=("logp", "advantage")),
    Row("clipped_surrogate", clipped, takes=SURROGATE),
    Row("clipped_surrogate", clipped, {"low": 0.1, "high": 1.5}, takes=SURROGATE),
    Row("clipped_surrogate", clipped, {"dual": 1.5}, takes=SURROGATE),
    Row(
        "clipped_value",
        lambda x, clip: (
            np.maximum(
                (x.value - x.sg.return_) ** 2,
                (np.clip(x.value, x.sg.old_value - clip, x.sg.old_value + clip) - x.sg.return_)
                ** 2,
            )
            / 2
        ),
        {"clip": 0.375},
        takes=("value", "old_value", "return_"),
    ),
)
