"""The objectives written a second time, token by token in plain Python: slow, and independent."""

import math

import numpy as np


def sequences(segment_ids):
    """[(row, columns)] of every sequence."""
    found = []
    for row, ids in enumerate(np.asarray(segment_ids)):
        for number in sorted(set(ids.tolist()) - {0}):
            found.append((row, [t for t, i in enumerate(ids) if i == number]))
    return found


def group_advantages(rewards, valid, method, epsilon=1e-6, ddof=1):
    prompts, group = rewards.shape
    out = np.zeros(rewards.shape)

    def std(values):
        mean = sum(values) / max(len(values), 1)
        return math.sqrt(sum((v - mean) ** 2 for v in values) / max(len(values) - ddof, 1))

    everything = [rewards[p, g] for p in range(prompts) for g in range(group) if valid[p, g]]
    centred = {}
    for p in range(prompts):
        members = [g for g in range(group) if valid[p, g]]
        values = [rewards[p, g] for g in members]
        for g in members:
            r = rewards[p, g]
            if method == "reinforce++":
                mean = sum(everything) / len(everything)
                out[p, g] = (r - mean) / (std(everything) + epsilon)
                continue
            if method == "reinforce++-baseline":
                centred[p, g] = r - sum(values) / len(values)
            if len(members) < 2:
                continue
            if method == "grpo":
                out[p, g] = (r - sum(values) / len(values)) / (std(values) + epsilon)
            elif method == "dr_grpo":
                out[p, g] = r - sum(values) / len(values)
            elif method == "rloo":
                others = [rewards[p, h] for h in members if h != g]
                out[p, g] = r - sum(others) / len(others)
    if method == "reinforce++-baseline":
        spread = std(list(centred.values())) + epsilon
        for (p, g), value in centred.items():
            if sum(valid[p]) >= 2:
                out[p, g] = value / spread
    return out


def policy_loss(log_prob, old, advantages, mask, segment_ids, config):
    """Value of every token's loss."""
    loss = np.zeros(log_prob.shape)
    for row, columns in sequences(segment_ids):
        counted = [t for t in columns if mask[row, t]]
        for t in counted:
            log_ratio = log_prob[row, t] - old[row, t]
            if config.kind == "gspo":
                total = sum(log_prob[row, s] - old[row, s] for s in counted)
                log_ratio = total / len(counted)
            if config.log_ratio_clamp is not None:
                log_ratio = min(max(log_ratio, -config.log_ratio_clamp), config.log_ratio_clamp)
            ratio, a = math.exp(log_ratio), advantages[row, t]
            clipped = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
            if config.kind == "reinforce":
                value = -a * log_prob[row, t]
            elif config.kind == "cispo":
                value = -clipped * a * log_prob[row, t]
            else:
                value = -min(ratio * a, clipped * a)
                if config.dual_clip is not None and a < 0:
                    value = min(value, -config.dual_clip * a)
            loss[row, t] = value
    return loss


def aggregate(values, mask, segment_ids, mode, constant_length=None):
    per_sequence = []
    for row, columns in sequences(segment_ids):
        counted = [values[row, t] for t in columns if mask[row, t]]
        if counted:
            per_sequence.append(counted)
    if not per_sequence:
        return 0.0
    total, number = sum(map(sum, per_sequence)), len(per_sequence)
    if mode == "token-mean":
        return total / sum(map(len, per_sequence))
    if mode == "seq-mean-token-sum":
        return total / number
    if mode == "seq-mean-token-mean":
        return sum(sum(c) / len(c) for c in per_sequence) / number
    return total / (number * constant_length)


def token_log_prob(logits, tokens, segment_ids, depth):
    """(log-probs, predictable) of every token by the head at this depth."""
    batch, time = tokens.shape
    out, can = np.zeros((batch, time)), np.zeros((batch, time), bool)
    for b in range(batch):
        for t in range(time):
            source = t - depth - 1
            if source < 0 or segment_ids[b, t] == 0 or segment_ids[b, source] != segment_ids[b, t]:
                continue
            scores = [float(x) for x in logits[b, source]]
            top = max(scores)
            normaliser = top + math.log(sum(math.exp(s - top) for s in scores))
            out[b, t], can[b, t] = scores[tokens[b, t]] - normaliser, True
    return out, can
