r"""The decomposition of a joint step: what auxiliary gradients add to the main objective.

An objective J, to be increased, has the gradient g and the Hessian H. A step along it and along
auxiliary ascent directions m_1..m_K,

    theta + eta sum_i w_i d_i,        d = (g, m_1, .., m_K),  w = (1, lambda_1, .., lambda_K),

changes J by a quadratic function of the weights,

    improvement(w) = eta f'w + (eta^2 / 2) w'C w,

exactly, in expectation or as a guarantee. The assumption decides f and C alone:

    assumption                                        f_i             C_ij
    J is L-smooth (a lower bound)                     <g, d_i>        -L <d_i, d_j>
    .. in the norm of P^-1, steps along P d_i         <g, P d_i>      -L <d_i, P d_j>
    .. in the Euclidean norm, steps along P d_i       <g, P d_i>      -L <P d_i, P d_j>
    .. steps along sampled d^_i (an expectation)      <g, E d^_i>     -L E<d^_i, d^_j>
    the Taylor polynomial of second order             <g, d_i>        d_i'H d_j

Here that pair is a `StepModel`, and everything else is a function of it. What depends on lambda is
the auxiliary gradients' contribution (Delta_MTP): a term linear in lambda, which for the first row
is the paper's first-order correlation eta lambda (1 - L eta) <g, m>, and a quadratic one, its
second-order perturbation (L eta^2 lambda^2 / 2) ||m||^2.

Losses to be decreased: with J = -loss both gradients change sign, g = -grad loss_RL and
m = -grad loss_MTP. Gram matrices, lambda and every gain (a gain in J is a fall of the loss) stay as
they are; H is the Hessian of J, so minus that of the loss. Functions that take the objective
itself want `lambda params: -loss(params)` and ascent directions.

The inner products are over the parameters that both losses reach.

    model.py         the models: rows of the table
    contribution.py  what the auxiliary gradients contribute, and the best coefficients
    ceiling.py       the main gradient alone, and the most that any coefficient can add
    sampling.py      gradients of a minibatch
    worth.py         what an auxiliary gradient is worth where the step's length is free
    checks.py        predicted and realised changes of a real objective

Reference: Wang et al., Joint Training of Multi-Token Prediction in Reinforcement Learning via
Optimal Coefficient Calibration, arXiv 2605.28184, for the first row and its optimum.
"""

from occ.theory.ceiling import (
    Ceiling,
    ceiling,
    ceiling_share,
    main_improvement,
    optimal_step_size,
)
from occ.theory.checks import StepCheck, check_step, joint_step, local_smoothness
from occ.theory.contribution import (
    Contribution,
    coefficient_scale,
    contribution,
    optimal_coefficients,
    optimal_contribution,
)
from occ.theory.model import (
    Objective,
    StepModel,
    hvp,
    lower_bound,
    preconditioned_lower_bound,
    second_order,
)
from occ.theory.sampling import (
    SampledGram,
    at_batch_size,
    sampled_gram,
    sampled_lower_bound,
)
from occ.theory.worth import (
    Worth,
    by_group,
    centred,
    critical_batch,
    equivalent_batch,
    relative_gain,
    scaled,
    worth,
)

__all__ = [
    "Ceiling",
    "Contribution",
    "Objective",
    "SampledGram",
    "StepCheck",
    "StepModel",
    "Worth",
    "at_batch_size",
    "by_group",
    "ceiling",
    "ceiling_share",
    "centred",
    "check_step",
    "coefficient_scale",
    "contribution",
    "critical_batch",
    "equivalent_batch",
    "hvp",
    "joint_step",
    "local_smoothness",
    "lower_bound",
    "main_improvement",
    "optimal_coefficients",
    "optimal_contribution",
    "optimal_step_size",
    "preconditioned_lower_bound",
    "relative_gain",
    "sampled_gram",
    "sampled_lower_bound",
    "scaled",
    "second_order",
    "worth",
]
