"""Estimators: how much a training example influenced a model's output.

Everything that needs gradients or curvature lives here. Nothing here knows of indexes, files
layouts of indexes, certificates or HTTP.

Conventions used in every module:

- One attributed layer maps inputs ``a`` (``[batch, token, in]``) to outputs; ``in`` counts the
  homogeneous coordinate (a constant 1) when the layer has a bias. Its gradient for one example is
  ``G = sum_t a_t d_t^T`` with shape ``[in, out]``, ``d`` being the gradient of the loss with
  respect to the layer's output.
- The training loss of an example is the sum over its tokens of the next-token negative
  log-likelihood, in nats.
- ``score(q, z) = -grad f(q)^T (H + damping)^-1 grad L(z)``; positive means that training on ``z``
  raised ``f(q)`` (a proponent). Scores rank examples within one question. Their unit is that of the
  damped quadratic model of the training loss; a score is no change of ``f(q)`` (docs/concepts.md).
"""
