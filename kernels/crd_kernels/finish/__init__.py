"""From per-sample sums to statistics, losses and gradient coefficients: B scalars, one kernel."""
