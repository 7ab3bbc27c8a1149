"""Measures: evidence about the gradients -> their Gram matrix.

A main gradient g and K auxiliary gradients m_1..m_K have one Gram matrix of shape [K+1, K+1]:

    row 0:       <g, g>, <g, m_1>, ..., <g, m_K>      (the first-order correlations c_k)
    rows 1..K:   <m_j, m_k>                           (the second-order perturbations v_k^2
                                                       on the diagonal)

    base.py        what a measure is; inner products
    exact.py       from gradients: all, some leaves, some rows, halves, preconditioned, sketched
    log_ratios.py  the paper's proxy, and the forms of its released code
    past.py        present gradients against averages of past ones
    smoothing.py   moving averages of another measure

A new measure is one factory under `@register("name")`, every argument with a default, imported
here. Configurations and command lines then know it by that name; what it reads and when that exists
follows from its evidence. Evidence that no measure has read before is made where the gradients are
(`occ/training/gradient/placement.py`), and declared by `declare_evidence`.
"""

from occ.measures.base import (
    EVIDENCE,
    REGISTRY,
    Evidence,
    Measure,
    Measurement,
    accumulation_dtype,
    declare_evidence,
    gram_matrix,
    inner_product,
    register,
)
from occ.measures.exact import (
    cross_fitted,
    gradients,
    layer,
    named,
    preconditioned,
    readout,
    row_subset,
    sketched,
)
from occ.measures.log_ratios import LOG_RATIO_EVIDENCE, LOG_RATIO_FORMS, log_ratios
from occ.measures.past import PastState, past_gradients
from occ.measures.smoothing import SmoothedState, smoothed

by_name = REGISTRY.build

__all__ = [
    "EVIDENCE",
    "LOG_RATIO_EVIDENCE",
    "LOG_RATIO_FORMS",
    "REGISTRY",
    "Evidence",
    "Measure",
    "Measurement",
    "PastState",
    "SmoothedState",
    "accumulation_dtype",
    "by_name",
    "cross_fitted",
    "declare_evidence",
    "gradients",
    "gram_matrix",
    "inner_product",
    "layer",
    "log_ratios",
    "named",
    "past_gradients",
    "preconditioned",
    "readout",
    "register",
    "row_subset",
    "sketched",
    "smoothed",
]
