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


def group_advantages(
    rewards, valid, method, epsilon=1e-6, ddof=1, lengths=None, greedy=None, penalties=None
):
    """One advantage a sample; `penalties` [P, G, T] are taken from the rewards of its tokens."""
    prompts, group = rewards.shape
    out = np.zeros(rewards.shape)

    def std(values):
        mean = sum(values) / max(len(values), 1)
        return math.sqrt(sum((v - mean) ** 2 for v in values) / max(len(values) - ddof, 1))

    def reward(p, g):
        return rewards[p, g] - (0 if penalties is None else sum(penalties[p, g]))

    everything = [reward(p, g) for p in range(prompts) for g in range(group) if valid[p, g]]
    centred = {}
    for p in range(prompts):
        members = [g for g in range(group) if valid[p, g]]
        values = [reward(p, g) for g in members]
        for g in members:
            r = reward(p, g)
            if method == "reinforce++":
                mean = sum(everything) / len(everything)
                out[p, g] = (r - mean) / (std(everything) + epsilon)
                continue
            if method == "remax":
                out[p, g] = r - greedy[p]
                continue
            if method == "reinforce++-baseline":
                centred[p, g] = r - sum(values) / len(values)
            if len(members) < 2:
                continue
            if method == "grpo":
                out[p, g] = (r - sum(values) / len(values)) / (std(values) + epsilon)
            elif method == "grpo-batch-std":
                out[p, g] = (r - sum(values) / len(values)) / (std(everything) + epsilon)
            elif method == "dr_grpo":
                out[p, g] = r - sum(values) / len(values)
            elif method == "rloo":
                others = [reward(p, h) for h in members if h != g]
                out[p, g] = r - sum(others) / len(others)
            elif method == "opo":
                tokens = sum(lengths[p, h] for h in members)
                out[p, g] = r - sum(lengths[p, h] * reward(p, h) for h in members) / tokens
    if method == "reinforce++-baseline":
        spread = std(list(centred.values())) + epsilon
        for (p, g), value in centred.items():
            if sum(valid[p]) >= 2:
                out[p, g] = value / spread
    return out


def token_advantages(rewards, valid, lengths, penalties, method, gamma=1.0, epsilon=1e-6):
    """REINFORCE++ over tokens: [P, G, T], the tokens of each response in its first columns."""
    prompts, group = rewards.shape
    out = np.zeros(penalties.shape)
    for p in range(prompts):
        members = [g for g in range(group) if valid[p, g]]
        totals = {g: rewards[p, g] - sum(penalties[p, g, : lengths[p, g]]) for g in members}
        for g in members:
            for t in range(lengths[p, g]):
                if method == "reinforce++-baseline-tokens":
                    alone = len(members) < 2
                    out[p, g, t] = 0 if alone else totals[g] - sum(totals.values()) / len(totals)
                    continue
                for later in range(t, lengths[p, g]):
                    earned = rewards[p, g] if later == lengths[p, g] - 1 else 0
                    out[p, g, t] += gamma ** (later - t) * (earned - penalties[p, g, later])
    counted = [
        (p, g, t)
        for p in range(prompts)
        for g in range(group)
        for t in range(lengths[p, g])
        if valid[p, g]
    ]
    values = [out[i] for i in counted]
    mean = sum(values) / len(values)
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    for i in counted:
        out[i] = (out[i] - mean) / (std + epsilon)
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
            if config.kind == "gmpo":
                moves = []
                for s in counted:
                    move = log_prob[row, s] - old[row, s]
                    if advantages[row, s] > 0:
                        move = min(move, config.clip_high)
                    elif advantages[row, s] < 0:
                        move = max(move, -config.clip_low)
                    moves.append(move)
                log_ratio = sum(moves) / len(counted)
            if config.log_ratio_clamp is not None:
                log_ratio = min(max(log_ratio, -config.log_ratio_clamp), config.log_ratio_clamp)
            ratio, a = math.exp(log_ratio), advantages[row, t]
            clipped = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
            if config.kind == "reinforce":
                value = -a * log_prob[row, t]
            elif config.kind == "gmpo":
                value = -ratio * a
            elif config.kind == "sapo":
                tau = config.positive_temperature if a > 0 else config.negative_temperature
                value = -4 / tau / (1 + math.exp(-tau * (ratio - 1))) * a
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
