"""Names of the samplers, known without importing torch; `flow.SAMPLERS` holds the functions."""

SAMPLERS_WITH_LOG_PROB = frozenset({"flow-sde", "cps", "dance-sde"})


def sampler_names() -> list[str]:
    """All sampler names."""
    return sorted({"ode", *SAMPLERS_WITH_LOG_PROB})
