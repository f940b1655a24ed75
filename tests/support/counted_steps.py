"""For a worker: how many of its steps went on as the ones before."""

from typing import Any

from vllm_kimi_linear.steady_steps import SteadyStep


class CountedSteps:
    """`--worker-extension-cls`: `count_steps` begins, `counted_steps` says."""

    steps: int

    def count_steps(self) -> None:
        self.steps = 0
        original = SteadyStep.next

        def counted(step: SteadyStep, runner: Any, output: Any) -> SteadyStep:
            self.steps += 1
            return original(step, runner, output)

        SteadyStep.next = counted  # type: ignore[method-assign, assignment]

    def counted_steps(self) -> int:
        return self.steps
