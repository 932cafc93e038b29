"""run_on_ray(): does work in lanes of Ray Train workers and reports what happens as it happens."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.dispatch.conductor import Rules
from orchestrator.dispatch.driver import Hooks, Outcome, RunState
from orchestrator.dispatch.ray.session import ray_session
from orchestrator.dispatch.signals import DeferredInterrupt
from orchestrator.dispatch.worker import DEFAULT_EXECUTOR
from orchestrator.errors import Interrupted
from orchestrator.plan.jobs import Job
from orchestrator.plan.ledger import Ledger
from orchestrator.spec.infrastructure import ClusterSpec


def run_on_ray(
    work: Sequence[Job],
    ledger: Ledger,
    cluster: ClusterSpec,
    hooks: Hooks,
    *,
    executor: str = DEFAULT_EXECUTOR,
    fail_fast: bool = False,
) -> Outcome:
    """Do the work in as many lanes as `cluster` says and return what became of it.

    Args:
        work: Jobs, parents before children; a parent that is not in the list is finished already.
        hooks: Called in this thread.
        executor: `module:function` that does one job.
        fail_fast: The first failed job ends the run.

    Raises:
        UsageError: no Ray at the address, or the cluster is too small for the lanes.
        StageRunError: no lane can run.
        Interrupted: KeyboardInterrupt, or `stop_asked` returned 2; no process of ours is left.
    """
    try:
        # Nothing below is torn apart by Ctrl-C: Ray is started, asked and ended in whole steps.
        with DeferredInterrupt() as interrupt, ray_session(cluster.address) as session:
            # Ray reads its environment when it is imported, which the session has set by now.
            from orchestrator.dispatch.ray.lanes import Lanes

            def stop_asked() -> int:
                interrupt.check()
                hooks.on_tick()
                return hooks.stop_asked()

            rules = Rules.of(cluster, fail_fast, hooks.replans)
            lanes = Lanes(RunState(work, hooks), ledger, cluster, executor, rules, session.folder)
            return lanes.run(stop_asked)
    except KeyboardInterrupt:
        raise Interrupted("stopped at once; interrupted work resumes from its last checkpoint") from None
