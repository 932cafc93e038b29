"""The mailbox between Ray Tune's trials and the driver: a trial posts its recipe and waits for the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio

# A trial's actor only waits, while lanes may hold every CPU and GPU. Tune refuses a trial that asks for nothing; this
# resource of one head node has every Ray cluster.
WAITING_RESOURCES = {"node:__internal_head__": 0.001}
PROPOSAL = ("number", "params", "values", "sampler_state")
"""Keys of a proposal: the fields of a trial that are known then."""
FAILED = "failed"
"""Key of an answer that tells why there are no objectives."""
EXCESS = "excess:"
"""Beginning of the keys of an answer that tell by how much a metric is beyond its constraint."""
RUNG = "rung:"
"""Beginning of the keys of an answer that tell what a trial had at the rungs up to the one where it was stopped."""
_STOPPED = {FAILED: "the search stopped"}


class Mailbox:
    """Recipes of waiting trials, and their answers. A Ray actor; a trial's call ends when it is answered."""

    def __init__(self) -> None:
        self._new: list[dict[str, Any]] = []
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._closed = False

    async def ask(self, proposal: dict[str, Any]) -> dict[str, Any]:
        """Post a proposal, and return the answer when it comes."""
        import asyncio  # late: a tenth of what loading an experiment takes, and only the actor needs it

        if self._closed:
            return dict(_STOPPED)
        self._waiting[proposal["number"]] = asyncio.get_running_loop().create_future()
        self._new.append(proposal)
        return await self._waiting[proposal["number"]]

    async def take(self) -> list[dict[str, Any]]:
        """Return the proposals posted since the last call."""
        new, self._new = self._new, []
        return new

    async def answer(self, number: int, answer: dict[str, Any]) -> None:
        """End a trial: with its objectives by name, or with `failed` and the reason."""
        self._waiting.pop(number).set_result(answer)

    async def close(self) -> None:
        """Answer whoever waits, or comes later, that the search stopped."""
        self._closed = True
        for waiting in self._waiting.values():
            waiting.set_result(dict(_STOPPED))
        self._waiting.clear()


def wait_for_answer(config: dict[str, Any]) -> None:
    """Wait, as the trainable of a trial, until the driver has answered it."""
    import ray
    from ray import tune

    proposal = {key: config[key] for key in PROPOSAL}
    tune.report(ray.get(config["mailbox"].ask.remote(proposal)))
