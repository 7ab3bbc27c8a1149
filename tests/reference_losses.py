"""All losses of a train step, and their derivatives, from logits in plain loops over tokens.

Written from the papers' formulas and the docstrings of the configuration, in float64 numpy: rows,
then sequences, then tokens, and no array of a row in which a shift or a mask could hide. Each
derivative stands beside its value, so that central differences can judge it.

In three places a value enters a loss as a constant: the weight of CISPO, the sequence ratio of
GSPO and GMPO, and the target of distillation. They are taken from `held`, logits that are not
varied.
"""

import math
from typing import NamedTuple

import numpy as np


class Loss(NamedTuple):
    value: float
    cotangent: np.ndarray  # [B, T, V], d value / d logits of this loss's head, at their positions
    log_ratio: np.ndarray  # [B, T], log pi - log pi_old, 0 where the loss has no token
    metrics: dict


class Token(NamedTuple):
    """A token that counts in a loss, as one head sees it."""

    row: int
    time: int
    source: int  # position whose logits are about it
    chosen: np.ndarray  # [V], 1 at the token itself
    log_probs: np.ndarray  # [V], of the whole vocabulary
    log_prob: float
    held: float  # the same from the logits that are not varied
    old: float
    advantage: float
    importance: float
    reference: float
    target: np.ndarray | None  # [V], the main head's held probabilities of the same token


def losses(logits, batch, config, held=None, mtp_loss=None):
    """The RL loss, then that of each MTP module; `mtp_loss` replaces the configured kind.

    Args:
      logits: [K+1, B, T, V], of every head, at the positions that predict.
      batch: the minibatch; nothing is read where it has no response token.
      config: the run's `TrainConfig`.
      held: like `logits`, the constants of differentiation; default the logits themselves.
      mtp_loss: "ce", "ce_rewarded", "policy" or a divergence.
    """
    batch = {name: np.asarray(value) for name, value in vars(batch).items()}
    held = logits if held is None else held
    objective, mtp = config.objective, config.mtp
    kind = mtp.loss if mtp_loss is None else mtp_loss
    found = []
    for depth in range(len(logits)):
        sequences = [
            [token_of(logits, held, batch, config, depth, row, time, source) for time, source in s]
            for row, s in counted_sequences(batch, depth)
        ]
        if depth == 0:
            found.append(rl(sequences, objective, logits.shape[1:], config))
        elif kind != "none":
            found.append(of_module(sequences, kind, objective, logits.shape[1:], config))
    return found


def counted_sequences(batch, depth):
    """[(row, [(token's column, its source's column)])] of sequences with a token that counts.

    The head at depth k sees token t from position t - k - 1, if that is in t's own sequence.
    """
    found = []
    segments, response = batch["segment_ids"], batch["response_mask"]
    for row in range(len(segments)):
        for number in sorted(set(segments[row].tolist()) - {0}):
            columns = [t for t in range(segments.shape[1]) if segments[row, t] == number]
            pairs = [
                (t, columns[i - depth - 1])
                for i, t in enumerate(columns)
                if response[row, t] and i - depth - 1 >= 0
            ]
            if pairs:
                found.append((row, pairs))
    return found


def token_of(logits, held, batch, config, depth, row, time, source):
    temperature = config.rollout.temperature
    chosen = batch["tokens"][row, time]
    log_probs = log_softmax(logits[depth, row, source] / temperature)
    held_log_probs = log_softmax(held[depth, row, source] / temperature)
    old = main_old = float(batch["old_log_prob"][row, time])
    if depth and config.mtp.reference == "own":
        old = float(batch["old_mtp_log_prob"][depth - 1, row, time])
    importance = 1.0
    if config.objective.importance_cap is not None:
        # Of the policy that sampled, whichever head is trained on the sample.
        ratio = math.exp(main_old - float(batch["rollout_log_prob"][row, time]))
        importance = min(ratio, config.objective.importance_cap)
    target = None
    if depth:
        target = np.exp(log_softmax(held[0, row, time - 1] / temperature))
    return Token(
        row,
        time,
        source,
        np.eye(len(log_probs))[chosen],
        log_probs,
        log_probs[chosen],
        held_log_probs[chosen],
        old,
        float(batch["advantages"][row, time]),
        importance,
        float(batch["reference_log_prob"][row, time]),
        target,
    )


def log_softmax(scores):
    top = max(scores)
    normaliser = top + math.log(sum(math.exp(s - top) for s in scores))
    return np.array([s - normaliser for s in scores])


# ---------------------------------------------------------------------------------------------
# One loss from its tokens
# ---------------------------------------------------------------------------------------------


def rl(sequences, objective, shape, config):
    """Policy loss + coefficient * KL(pi || reference) - coefficient * entropy."""
    value, cotangent = 0.0, np.zeros(shape)
    entropies, distances, clips = [], [], []
    for sequence in sequences:
        weight = weight_of(sequence, sequences, objective)
        for token in sequence:
            loss, slope, clip = policy(token, sequence, objective.policy)
            probability = np.exp(token.log_probs)
            entropy = -sum(p * lp for p, lp in zip(probability, token.log_probs, strict=True))
            distance, distance_slope = kl(token.log_prob - token.reference, objective.kl_estimator)
            beta = 0 if objective.kl_in_reward else objective.kl_coefficient
            value += weight * (
                token.importance * loss + beta * distance - objective.entropy_coefficient * entropy
            )
            on_log_prob = token.importance * slope + beta * distance_slope
            # d log p(chosen) / d logits = e - p;  d entropy / d logits = -p (log p + entropy)
            on_logits = on_log_prob * (token.chosen - probability)
            on_logits += objective.entropy_coefficient * probability * (token.log_probs + entropy)
            cotangent[token.row, token.source] += weight * on_logits / config.rollout.temperature
            entropies.append(entropy)
            change = token.log_prob - token.old
            distances.append(math.exp(change) - 1 - change)
            clips.append(clip)
    metrics = {
        "loss/rl": value,
        "policy/entropy": mean(entropies),
        "policy/kl_to_old": mean(distances),
        **clip_fractions("policy", clips),
    }
    return Loss(value, cotangent, log_ratios(sequences, shape), metrics)


def of_module(sequences, kind, objective, shape, config):
    """Cross-entropy, the main head's policy loss, or a divergence from the main head."""
    value, cotangent, clips = 0.0, np.zeros(shape), []
    for sequence in sequences:
        weight = weight_of(sequence, sequences, objective)
        for token in sequence:
            probability = np.exp(token.log_probs)
            if kind in ("ce", "ce_rewarded"):
                loss, on_logits = -token.log_prob, probability - token.chosen
                if kind == "ce_rewarded" and token.advantage <= 0:
                    loss, on_logits = 0.0, np.zeros(len(probability))
            elif kind == "distill":
                pairs = zip(token.target, token.log_probs, strict=True)
                loss = sum(q * (math.log(q) - lp) for q, lp in pairs)
                on_logits = probability - token.target
            elif kind == "total_variation":
                signs = np.sign(probability - token.target)
                loss = sum(abs(p - q) for p, q in zip(probability, token.target, strict=True)) / 2
                on_logits = probability * (signs - signs @ probability) / 2
            elif kind == "distill_top_k":
                target, k = token.target, config.mtp.distilled_tokens
                order = sorted(range(len(target)), key=lambda v: -target[v])
                best, others = order[:k], order[k:]
                rest, its = (sum(x[v] for v in others) for x in (target, probability))
                loss = rest * math.log(rest / its)
                loss += sum(target[v] * math.log(target[v] / probability[v]) for v in best)
                on_logits = (1 - rest) * probability
                on_logits[best] -= token.target[best]
                on_logits -= rest / its * (np.isin(range(len(order)), others) - its) * probability
            else:
                loss, slope, clip = policy(token, sequence, objective.policy)
                loss, slope = token.importance * loss, token.importance * slope
                on_logits = slope * (token.chosen - probability)
                clips.append(clip)
            value += weight * loss
            cotangent[token.row, token.source] += weight * on_logits / config.rollout.temperature
    tokens = [token for sequence in sequences for token in sequence]
    metrics = {
        "loss/mtp": value,
        "mtp/cross_entropy": mean([-token.log_prob for token in tokens]),
        "mtp/log_ratio": mean([token.log_prob - token.old for token in tokens]),
        **(clip_fractions("mtp", clips) if kind == "policy" else {}),
    }
    return Loss(value, cotangent, log_ratios(sequences, shape), metrics)


def weight_of(sequence, sequences, objective):
    """What each token of a sequence counts for in the whole loss."""
    return {
        "token-mean": 1 / sum(map(len, sequences)),
        "seq-mean-token-sum": 1 / len(sequences),
        "seq-mean-token-mean": 1 / len(sequences) / len(sequence),
        "constant-length": 1 / len(sequences) / (objective.constant_length or math.nan),
    }[objective.aggregation]


def policy(token, sequence, config):
    """(loss, its slope in the token's log-prob, which clip it met: "high", "low", "dual", None)."""
    a, slope = token.advantage, 1.0
    log_ratio = token.log_prob - token.old
    if config.kind == "gspo":
        # sg(mean log-ratio of the sequence) + log pi - sg(log pi), GSPO-token of the paper.
        log_ratio = mean([t.held - t.old for t in sequence]) + token.log_prob - token.held
    if config.kind == "gmpo":
        return geometric_mean(token, sequence, config)
    if config.log_ratio_clamp is not None and abs(log_ratio) > config.log_ratio_clamp:
        log_ratio, slope = math.copysign(config.log_ratio_clamp, log_ratio), 0.0
    ratio = math.exp(log_ratio)
    low, high = 1 - config.clip_low, 1 + config.clip_high
    clip = "high" if ratio > high else "low" if ratio < low else None
    if config.kind == "reinforce":
        return -a * token.log_prob, -a, None
    if config.kind == "cispo":
        change = token.held - token.old
        if config.log_ratio_clamp is not None:
            change = min(max(change, -config.log_ratio_clamp), config.log_ratio_clamp)
        constant = min(max(math.exp(change), low), high)
        return -constant * a * token.log_prob, -constant * a, clip
    if config.kind == "sapo":
        tau = config.positive_temperature if a > 0 else config.negative_temperature
        gate = 1 / (1 + math.exp(-tau * (ratio - 1)))
        return -4 / tau * gate * a, -4 * gate * (1 - gate) * ratio * a * slope, None
    if a > 0:  # nothing is gained by raising a good token further
        return (-high * a, 0.0, "high") if ratio > high else (-ratio * a, -ratio * a * slope, None)
    if ratio < low:  # nor by lowering a bad one
        return -low * a, 0.0, "low" if a < 0 else None
    if config.dual_clip is not None and a < 0 and ratio > config.dual_clip:
        return -config.dual_clip * a, 0.0, "dual"
    return -ratio * a, -ratio * a * slope, None


def geometric_mean(token, sequence, config):
    """As `policy`: the exponential of the sequence's mean of clipped log-ratios."""

    def clipped(log_ratio, a):
        if a > 0 and log_ratio > config.clip_high:
            return config.clip_high, "high"
        if a < 0 and log_ratio < -config.clip_low:
            return -config.clip_low, "low"
        return log_ratio, None

    held = mean([clipped(t.held - t.old, t.advantage)[0] for t in sequence])
    now, clip = clipped(token.log_prob - token.old, token.advantage)
    ratio = math.exp(held + now - clipped(token.held - token.old, token.advantage)[0])
    value = -ratio * token.advantage
    return value, 0.0 if clip else value, clip


def kl(difference, estimator):
    """(estimate of KL(pi || reference) from d = log pi - log reference, its slope in log pi)."""
    d = difference
    return {
        "k1": (d, 1.0),
        "k2": (d * d / 2, d),
        "k3": (math.exp(-d) - 1 + d, 1 - math.exp(-d)),
        "abs": (abs(d), math.copysign(1.0, d)),
    }[estimator]


def log_ratios(sequences, shape):
    found = np.zeros(shape[:2])
    for sequence in sequences:
        for token in sequence:
            found[token.row, token.time] = token.log_prob - token.old
    return found


def clip_fractions(name, clips):
    return {
        f"{name}/clip_{side}": mean([float(clip == side) for clip in clips])
        for side in ("high", "low", "dual")
    }


def mean(values):
    return sum(values) / max(len(values), 1)
