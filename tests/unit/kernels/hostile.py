"""Inputs at the edges of what the kernels take, by name: each changes a problem in place."""


def every_gate(z: float):
    def change(problem):
        problem.inputs.g.fill_(z)
        problem.params.dt_bias.zero_()
        problem.params.A_log.fill_(2.7725887)  # exp: 16

    return change


def one_gate(z: float):
    def change(problem):
        problem.inputs.g[problem.inputs.g.shape[0] // 2] = z

    return change


def every_beta(logit: float):
    return lambda problem: problem.inputs.beta.fill_(logit)


def zero_keys(problem):
    width = problem.inputs.g.shape[1]
    problem.inputs.qkv[:, width : 2 * width] = 0
    problem.state.conv[..., width : 2 * width] = 0


def zero_rows(problem):
    problem.inputs.qkv.zero_()
    problem.state.conv.nan_to_num_().zero_()


def large_rows(problem):
    problem.inputs.qkv.mul_(30000)


HOSTILE = {
    "all gates -87": every_gate(5.4375),
    "all gates -1e-6": every_gate(-16.6),
    "one gate -87 or less": one_gate(90.0),
    "one gate of minus infinity": one_gate(1e30),
    "beta 0": every_beta(-40.0),
    "beta 1": every_beta(40.0),
    "zero keys": zero_keys,
    "zero rows": zero_rows,
    "large rows": large_rows,
}
