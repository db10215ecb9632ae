"""The row pass as one Triton kernel: two reads of a row of logits and one write of its gradient.

The formula of a rule is the function ``kernel`` in its file of `dpsm_hf.rules.formulas`, with which this kernel is
compiled. One program scores one row. The first read keeps a running maximum and rescales ``u`` and ``Q`` (defined in
`dpsm_hf.rules.rows`) when it changes, ``Q`` by the square of the factor; the second read recomputes ``p`` and
overwrites each logit with its gradient. Score smoothing needs the normalizer to know its tail, and reads the row once
more in between.

Imported by `dpsm_hf.head.kernels` where Triton is installed.
"""

# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def _log1p(x):
    # Kahan's correction: accurate for small x, where 1 + x loses the digits of x
    w = 1.0 + x
    return tl.where(w == 1.0, x, tl.log(w) * x / tl.where(w == 1.0, 1.0, w - 1.0))


@triton.jit
def _tanh(x):
    # (1 - e) / (1 + e) cancels near 0; there the Taylor series is accurate
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    square = x * x
    near = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    return tl.where(tl.abs(x) < 0.1, near, tl.where(x < 0, -far, far))


@triton.jit
def _post(raw, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    z = raw.to(tl.float32) * scale
    if HAS_SOFTCAP:
        z = softcap * _tanh(z / softcap)
    return z


@triton.jit
def row_kernel(
    logits, labels, values, statistics, alpha, weight, top_entropy,
    stride, vocab_size, scale, softcap, epsilon, z_loss, entropy_weight, exponent, parameters,
    RULE: tl.constexpr,  # the Triton function of the rule, or None
    SMOOTHING: tl.constexpr,  # 0 none, 1 of the label, 2 of the score
    HAS_Z_LOSS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ROW_WEIGHT: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,  # the statistic is wanted
    HAS_VARENTROPY: tl.constexpr,
    HAS_BONUS: tl.constexpr,  # the entropy is part of the loss
    HAS_POWER: tl.constexpr,  # the exponent is not 2
    HAS_TOP: tl.constexpr,  # the rule reads top_entropy
    HAS_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Score row ``program_id(0)``: statistics always, its value if there is a rule, its gradient if asked for."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row)
    lanes = tl.arange(0, BLOCK)
    z_label = _post(tl.load(logits + label), scale, softcap, HAS_SOFTCAP)

    # each lane keeps its own sums, reduced once at the end; only the maximum is reduced in every round
    m = tl.maximum(z_label, -3.4028234e38)
    u_lanes = tl.zeros([BLOCK], tl.float32)
    q_lanes = tl.zeros([BLOCK], tl.float32)
    z_lanes = tl.zeros([BLOCK], tl.float32)
    entropy_lanes = tl.zeros([BLOCK], tl.float32)
    power_lanes = tl.zeros([BLOCK], tl.float32)
    square_lanes = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab_size, BLOCK):
        columns = start + lanes
        inside = columns < vocab_size
        z = _post(tl.load(logits + columns, mask=inside, other=0.0), scale, softcap, HAS_SOFTCAP)
        others = inside & (columns != label)
        z = tl.where(others, z, float("-inf"))
        new_m = tl.maximum(m, tl.max(z, 0))
        moved = tl.exp(m - new_m)
        shifted = z - new_m
        e = tl.exp(shifted)
        if HAS_VARENTROPY:
            # of the squares about the new maximum; the first step down from -3.4e38 has no square in float32
            step = tl.where(moved > 0, m - new_m, 0.0)
            square_lanes = moved * (square_lanes + step * (2.0 * entropy_lanes + step * u_lanes))
            square_lanes += tl.where(e > 0, e * shifted * shifted, e)
        if HAS_ENTROPY or HAS_BONUS:
            # a masked logit is -inf with e = 0, and 0 * -inf would be NaN
            entropy_lanes = moved * (entropy_lanes + (m - new_m) * u_lanes) + tl.where(e > 0, e * shifted, e)
        u_lanes = moved * u_lanes + e
        q_lanes = moved * moved * q_lanes + e * e
        if HAS_POWER:
            power_lanes = tl.exp(exponent * (m - new_m)) * power_lanes + tl.exp(exponent * shifted)
        if SMOOTHING == 1:
            z_lanes += tl.where(others, z, 0.0)
        m = new_m

    e_label = tl.exp(z_label - m)
    u = tl.sum(u_lanes, 0)
    total = u + e_label
    p = e_label / total
    q = u / total
    r = tl.sum(q_lanes, 0) / (total * total)
    correct = z_label >= m
    log_total = tl.where(correct, _log1p(u), tl.log(total))
    nll = log_total - (z_label - m)
    norm = tl.sqrt(p * p + r)

    COLUMNS: tl.constexpr = 7 if HAS_VARENTROPY else 6 if HAS_ENTROPY else 5
    statistics += row * COLUMNS
    tl.store(statistics, nll)
    tl.store(statistics + 1, q * q + r)
    tl.store(statistics + 2, r / (norm * (norm + p)))
    tl.store(statistics + 3, 1.0 / total)
    tl.store(statistics + 4, correct.to(tl.float32))
    entropy = 0.0
    if HAS_ENTROPY or HAS_BONUS:
        own = tl.where(e_label > 0, e_label * (z_label - m), 0.0)
        mean = (tl.sum(entropy_lanes, 0) + own) / total
        entropy = log_total - mean
        if HAS_VARENTROPY:
            own = tl.where(e_label > 0, e_label * (z_label - m) * (z_label - m), 0.0)
            tl.store(statistics + 6, tl.maximum((tl.sum(square_lanes, 0) + own) / total - mean * mean, 0.0))
    if HAS_ENTROPY:
        tl.store(statistics + 5, entropy)

    if RULE is not None:
        size = vocab_size.to(tl.float32)
        log_sum = m + log_total
        share = epsilon / size
        power = r
        if HAS_POWER:
            power = tl.sum(power_lanes, 0) * tl.exp(-exponent * log_total)
        top = 0.0
        if HAS_TOP:
            top = tl.load(top_entropy + row)
        value, a, b, d, tail_weight, target = RULE(
            1.0, p, q, r, nll, log_sum, norm, (tl.sum(z_lanes, 0) + z_label) / size, power, top, size, epsilon,
            share, parameters, tl.load(alpha), SMOOTHING,
        )  # fmt: skip
        if SMOOTHING == 2:
            count_lanes = tl.zeros([BLOCK], tl.float32)
            log_lanes = tl.zeros([BLOCK], tl.float32)
            for start in range(0, vocab_size, BLOCK):
                columns = start + lanes
                inside = columns < vocab_size
                z = _post(tl.load(logits + columns, mask=inside, other=0.0), scale, softcap, HAS_SOFTCAP)
                log_p = z - log_sum
                tail = inside & (tl.exp(log_p) < share)
                count_lanes += tail.to(tl.float32)
                log_lanes += tl.where(tail, log_p, 0.0)
            unit = tail_weight * share
            count = tl.sum(count_lanes, 0)
            value -= unit * tl.sum(log_lanes, 0)
            a += unit * count
            target += unit * (count * p - (tl.exp(-nll) < share).to(tl.float32))
        if HAS_Z_LOSS:
            slope = 2.0 * z_loss * log_sum
            value += z_loss * log_sum * log_sum
            a += slope
            target += slope * p
        if HAS_BONUS:
            value -= entropy_weight * entropy
            a += entropy_weight * entropy
            target += entropy_weight * p * (entropy - nll)
        tl.store(values + row, value)

        if HAS_GRADIENT:
            factor = tl.load(weight + row) if HAS_ROW_WEIGHT else tl.load(weight)
            factor *= scale
            for start in range(0, vocab_size, BLOCK):
                columns = start + lanes
                inside = columns < vocab_size
                z = _post(tl.load(logits + columns, mask=inside, other=0.0), scale, softcap, HAS_SOFTCAP)
                p_row = tl.exp(z - m) / total
                if HAS_POWER:
                    gradient = p_row * (a + b * tl.exp((exponent - 1.0) * (z - log_sum))) + d
                else:
                    gradient = p_row * (a + b * p_row) + d
                if HAS_BONUS:
                    gradient += tl.where(p_row > 0, entropy_weight * p_row * (z - log_sum), 0.0)
                if SMOOTHING == 2:
                    gradient += tl.where(tl.exp(z - log_sum) < share, -unit, 0.0)
                # computed in float32 and stored once: adding to a stored low-precision number would lose digits
                gradient = tl.where(columns == label, target, gradient) * factor
                if HAS_SOFTCAP:
                    t = z / softcap
                    gradient *= 1.0 - t * t
                tl.store(logits + columns, gradient.to(logits.dtype.element_ty), mask=inside)
