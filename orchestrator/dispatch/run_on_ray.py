"""run_on_ray(): does work in lanes of Ray Train workers and tells what happens as it happens."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from orchestrator.dispatch.account import Account
from orchestrator.dispatch.conductor import Conductor
from orchestrator.dispatch.deferred import DeferredInterrupt
from orchestrator.dispatch.execute import DEFAULT_EXECUTOR
from orchestrator.dispatch.feed import Feed, Planned
from orchestrator.dispatch.hang import end_processes
from orchestrator.dispatch.outcome import Outcome
from orchestrator.dispatch.placement import Nodes, room_for
from orchestrator.dispatch.ray_lane import LaneSetup, RayLane
from orchestrator.dispatch.ray_session import RaySession, ray_session
from orchestrator.dispatch.rules import Rules, new_driver
from orchestrator.dispatch.work_list import parallel_width
from orchestrator.errors import Interrupted, StageRunError
from orchestrator.plan.jobs import Job
from orchestrator.plan.ledger.process import this_process
from orchestrator.spec.infrastructure import ClusterSpec

if TYPE_CHECKING:
    from orchestrator.plan.ledger import Ledger

POLL_SECONDS = 0.1
ABORT_SECONDS = 10.0
LEAVE_SECONDS = 5.0


def run_on_ray(
    work: Sequence[Job],
    ledger: Ledger,
    cluster: ClusterSpec,
    on_event: Callable[[Mapping[str, Any]], None],
    should_stop: Callable[[], bool | int],
    *,
    executor: str = DEFAULT_EXECUTOR,
    fail_fast: bool = False,
    feed: Feed | None = None,
) -> Outcome:
    """Do the work in as many lanes as `cluster` says and return what became of it.

    Args:
        work: Jobs, parents before children; a parent that is not in the list is finished already.
        on_event: Called in this thread with `event` (started, finished, failed, retried, interrupted, skipped,
            damaged), `id`, `type`, `attempt`, and where there is one `lane`, `error`, `elsewhere` (another driver did
            it) and `state` (the damaged state, which the ledger has let go of).
        should_stop: Asked every 0.1 s. True: what runs writes a checkpoint and the lanes end. 2: stop at once.
        executor: `module:function` that does one job.
        fail_fast: The first failed job ends the run.
        feed: Where newer work comes from; without one the run ends when `work` is done.

    Raises:
        UsageError: no Ray at the address, or the cluster is too small for the lanes.
        StageRunError: no lane can run.
        Interrupted: KeyboardInterrupt, or `should_stop` said 2; no process of ours is left.
    """
    try:
        # Nothing below is torn apart by Ctrl-C: Ray is started, asked and ended in whole steps.
        with DeferredInterrupt() as interrupt, ray_session(cluster.address) as session:

            def stop_asked() -> int:
                interrupt.check()
                return int(should_stop())

            planned = Planned(work, feed)
            rules = Rules.of(cluster, fail_fast, plans_again=feed is not None)
            return _Run(planned, ledger, cluster, session, executor, rules).run(Account(on_event), stop_asked)
    except KeyboardInterrupt:
        raise Interrupted("stopped at once; what was under way goes on from its last checkpoint") from None


class _Run:
    """The lanes of one run and the conductor they work for."""

    def __init__(
        self,
        planned: Planned,
        ledger: Ledger,
        cluster: ClusterSpec,
        session: RaySession,
        executor: str,
        rules: Rules,
    ) -> None:
        import ray

        most = parallel_width(planned.jobs) if planned.closed else None
        room = room_for(cluster, _nodes(), _free, most)
        self._planned = planned
        self._session = session
        self._rules = rules
        self._conductor = _conductor(ledger.url, rules)
        self._url = ledger.url
        self._asked = False
        self._given_up: dict[str, str] = {}
        self._ray = ray
        setup = LaneSetup(cluster, self._conductor, ledger.url, ledger.storage / "ray", executor, room.use_gpu)
        self._lanes = [RayLane(f"lane-{number}", setup) for number in range(room.lanes)]

    def run(self, account: Account, should_stop: Callable[[], int]) -> Outcome:
        ray = self._ray
        try:
            for lane in self._lanes:
                lane.start()
            while self._turn(account, should_stop):
                time.sleep(POLL_SECONDS)
            return self._outcome(account)
        except ray.exceptions.RayActorError as error:
            raise StageRunError(f"the conductor died: {error}; run the same command to go on") from error
        finally:
            self._leave()

    def _turn(self, account: Account, should_stop: Callable[[], int]) -> bool:
        """Hear and pass on what is new; False once no lane is left."""
        news = self._get(self._conductor.poll.remote(account.epoch, account.seen), should_stop)
        if news["epoch"] != account.epoch:
            # It has just been started, for the first time or again, and knows nothing yet.
            account.epoch, account.seen = news["epoch"], 0
            self._send(account, should_stop)
            if self._asked:
                self._get(self._conductor.interrupt.remote(), should_stop)
        account.take(news["events"])
        self._given_up = news["given_up"]
        if news["hung"]:
            end_processes(news["hung"], self._url)
        if self._planned.look():
            self._send(account, should_stop)
        if should_stop() and not self._asked:
            self._asked = True
            self._get(self._conductor.interrupt.remote(), should_stop)
        return self._look_after_lanes(account, should_stop)

    def _look_after_lanes(self, account: Account, should_stop: Callable[[], int]) -> bool:
        for lane in self._lanes:
            if not lane.has_ended():
                continue
            has_begun = self._get(self._conductor.lane_ended.remote(lane.name), should_stop)
            is_done = self._planned.closed and not account.outcome(self._planned.jobs, False).left
            # Workers that never came up will not the next time.
            if has_begun and lane.may_start_again and not (self._asked or is_done):
                lane.start()
        return any(lane.thread is not None for lane in self._lanes)

    def _send(self, account: Account, should_stop: Callable[[], int]) -> None:
        jobs, closed = self._planned.jobs, self._planned.closed
        self._get(self._conductor.set_work.remote(jobs, closed, account.known()), should_stop)

    def _get(self, reference: Any, should_stop: Callable[[], int]) -> Any:
        """Return the answer of the conductor, however long it takes it to come back from the dead."""
        while True:
            done, _ = self._ray.wait([reference], timeout=POLL_SECONDS)
            if should_stop() > 1:
                raise KeyboardInterrupt
            if done:
                return self._ray.get(reference)

    def _outcome(self, account: Account) -> Outcome:
        account.take(self._ray.get(self._conductor.poll.remote(account.epoch, account.seen))["events"])
        outcome = account.outcome(self._planned.jobs, self._asked)
        given_up_on_purpose = self._asked or (self._rules.fail_fast and outcome.failed)
        if outcome.left and not given_up_on_purpose:
            reason = "; ".join(self._given_up.values()) or "Ray Train gave up"
            error = next((lane.error for lane in self._lanes if lane.error is not None), None)
            cause = f": {_last_line(error)}" if error is not None else ""
            raise StageRunError(f"{reason}{cause}\n    hint: Ray's logs are in {self._session.folder / 'logs'}")
        return outcome

    def _leave(self) -> None:
        """Return no lane, no lease and no actor stays."""
        alive = [lane for lane in self._lanes if lane.thread is not None and lane.thread.is_alive()]
        _abort(alive)
        with contextlib.suppress(Exception):
            self._ray.get(self._conductor.leave.remote(), timeout=LEAVE_SECONDS)
        with contextlib.suppress(Exception):
            self._ray.kill(self._conductor)
        for lane in alive:
            lane.clean()


def _conductor(url: str, rules: Rules) -> Any:
    """Return the actor; it stays near its driver, whose storage is at hand there, and is started again when it dies."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)(Conductor)
    return actor.remote(url, new_driver(), rules, asdict(this_process()))


def _nodes() -> Nodes:
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _free() -> Nodes:
    from orchestrator.dispatch.ray_compat import free_resources

    return free_resources()


def _abort(lanes: Sequence[RayLane]) -> None:
    """End Train runs whose controllers may be at any point, and the threads that wait for them."""
    from orchestrator.dispatch.ray_compat import kill_controllers

    deadline = time.monotonic() + ABORT_SECONDS
    threads = [lane.thread for lane in lanes if lane.thread is not None]
    while any(thread.is_alive() for thread in threads) and time.monotonic() < deadline:
        # Again and again: a controller may just be starting.
        with contextlib.suppress(Exception):
            kill_controllers()
        for thread in threads:
            thread.join(POLL_SECONDS)


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1].strip()}" if lines else type(error).__name__
