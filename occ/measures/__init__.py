"""Measures: evidence about the gradients -> their Gram matrix.

A main gradient g and K auxiliary gradients m_1..m_K have one Gram matrix of shape [K+1, K+1]:

    row 0:       <g, g>, <g, m_1>, ..., <g, m_K>      (the first-order correlations c_k)
    rows 1..K:   <m_j, m_k>                           (the second-order perturbations v_k^2
                                                       on the diagonal)

    base.py        what a measure is; inner products
    exact.py       from gradients: all, some leaves, some rows, halves, preconditioned, sketched
    log_ratios.py  the paper's proxy, and the forms of its released code
    smoothing.py   moving averages of another measure
"""

from occ.measures.base import (
    Measure,
    Measurement,
    accumulation_dtype,
    gram_matrix,
    inner_product,
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
from occ.measures.smoothing import SmoothedState, smoothed

TREE_EVIDENCE = frozenset(["gradient_halves", "second_moment", "row_subset", "readout"])
"""Evidence that consists of pytrees like the parameters, or of tuples of them."""

KNOWN_EVIDENCE = TREE_EVIDENCE | frozenset(LOG_RATIO_EVIDENCE)
"""Every evidence name that a measure here reads, besides the gradients."""

__all__ = [
    "KNOWN_EVIDENCE",
    "LOG_RATIO_EVIDENCE",
    "LOG_RATIO_FORMS",
    "TREE_EVIDENCE",
    "Measure",
    "Measurement",
    "SmoothedState",
    "accumulation_dtype",
    "cross_fitted",
    "gradients",
    "gram_matrix",
    "inner_product",
    "layer",
    "log_ratios",
    "named",
    "preconditioned",
    "readout",
    "row_subset",
    "sketched",
    "smoothed",
]
