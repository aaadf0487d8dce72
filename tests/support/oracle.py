"""PPO in plain Python floats, one loop per sum, written from the papers and not from ppo.py.

Everything is a list of rows of floats; `mask` is a list of rows of bools, true where the policy chose the token.
"""

import math


def chosen(mask_row):
    """The positions of a row that count, in order."""
    return [t for t, flag in enumerate(mask_row) if flag]


def token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """Ziegler et al. 2019, equation 2: the penalty is paid on each token, the score comes with the last."""
    rows = []
    for b, score in enumerate(scores):
        row = [0.0] * len(mask[b])
        for t in chosen(mask[b]):
            row[t] = -kl_coef * (logprobs[b][t] - ref_logprobs[b][t])
        row[chosen(mask[b])[-1]] += score
        rows.append(row)
    return rows


def advantages_and_returns(rewards, values, mask, gamma, lam):
    """Schulman et al. 2016, equation 16 as the sum it is: A_t = sum over l of (gamma lam)^l delta_(t+l)."""
    advantages, returns = [], []
    for b, mask_row in enumerate(mask):
        steps = chosen(mask_row)
        r, v = [rewards[b][t] for t in steps], [values[b][t] for t in steps]
        v.append(0.0)  # the episode ends after the last token
        deltas = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(steps))]
        row_a, row_r = [0.0] * len(mask_row), [0.0] * len(mask_row)
        for i, t in enumerate(steps):
            row_a[t] = math.fsum((gamma * lam) ** k * deltas[i + k] for k in range(len(steps) - i))
            row_r[t] = row_a[t] + v[i]
        advantages.append(row_a)
        returns.append(row_r)
    return advantages, returns


def tokens(mask):
    """Every (row, position) that counts."""
    return [(b, t) for b, mask_row in enumerate(mask) for t in chosen(mask_row)]


def clipped_surrogate_loss(logprobs, old_logprobs, advantages, mask, epsilon):
    """Schulman et al. 2017, equation 7, negated; the clip acts where the ratio has left in the advantage's favour."""
    terms, active = [], 0
    for b, t in tokens(mask):
        ratio, a = math.exp(logprobs[b][t] - old_logprobs[b][t]), advantages[b][t]
        terms.append(min(ratio * a, min(max(ratio, 1 - epsilon), 1 + epsilon) * a))
        active += (a > 0 and ratio > 1 + epsilon) or (a < 0 and ratio < 1 - epsilon)
    return -math.fsum(terms) / len(terms), active / len(terms)


def clipped_value_loss(values, old_values, returns, mask, epsilon):
    """0.5 max((v - R)^2, (v_clipped - R)^2), where v_clipped is at most epsilon from the rollout's value."""
    terms, active = [], 0
    for b, t in tokens(mask):
        v, old, target = values[b][t], old_values[b][t], returns[b][t]
        near = old + epsilon if v > old + epsilon else old - epsilon if v < old - epsilon else v
        terms.append(0.5 * max((v - target) ** 2, (near - target) ** 2))
        active += abs(near - target) > abs(v - target)
    return math.fsum(terms) / len(terms), active / len(terms)


def softmax(logits):
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    total = math.fsum(weights)
    return [w / total for w in weights]


def mean_entropy(logits, mask):
    """Mean over tokens of -sum p log p."""
    terms = [-math.fsum(p * math.log(p) for p in softmax(logits[b][t])) for b, t in tokens(mask)]
    return math.fsum(terms) / len(terms)


def kl_divergence(logits, other_logits):
    """Sum over the vocabulary of p log(p / q), of one pair of distributions."""
    return math.fsum(p * math.log(p / q) for p, q in zip(softmax(logits), softmax(other_logits), strict=True))


def standardized(x, mask):
    """Zero mean and unit population variance over what counts; the variance has 1e-8 added."""
    kept = [x[b][t] for b, t in tokens(mask)]
    mean = math.fsum(kept) / len(kept)
    variance = math.fsum((k - mean) ** 2 for k in kept) / len(kept)
    rows = [[0.0] * len(row) for row in x]
    for b, t in tokens(mask):
        rows[b][t] = (x[b][t] - mean) / math.sqrt(variance + 1e-8)
    return rows
