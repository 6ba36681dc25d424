"""Inject faults between clients and the local platform: which, how often, and for how long."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
from collections import Counter
from types import TracebackType
from typing import (
    Callable,
    Collection,
    Dict,
    List,
    NamedTuple,
    Optional,
    Protocol,
    Tuple,
    Type,
    Union,
)

from .._internal.checks import is_whole
from .._internal.clock import time
from .._internal.logs import get_logger
from ..errors import ConfigurationError
from . import fault_terms
from .fault_terms import EXAMPLES, Span, Terms

__all__ = ["Fault", "Faults"]

logger = get_logger("sekuire.local")

#: The kinds that last for a while.
_LASTING = ("stall_streams", "outage")
#: Seconds between two tries to end an outage while another program has the port.
_RETRY = 0.5


class Network(Protocol):
    """Let faults act on a running platform. Methods that return a number return how many things they hit."""

    def cut_streams(self) -> int: ...

    def stall_streams(self, seconds: float) -> int: ...

    def resume_streams(self) -> None: ...

    def expire_tokens(self, installation_id: Optional[str]) -> int: ...

    def settle(self) -> None:
        """Go off the network or come back, according to :attr:`Faults.is_down`."""

    def call_later(self, delay: float, callback: Callable[[], None]) -> None: ...


class Fault:
    """Control one fault that a method of :class:`Faults` returned. As a context manager it ends with its block. ::

        with platform.faults.error(503, on="complete") as fault:
            ...
        assert fault.injected > 0

    ``str()`` returns it as the text that :meth:`Faults.add` and ``sekuire dev --fault`` accept.
    """

    def __init__(self, owner: Faults, kind: str, number: int, terms: Terms) -> None:
        self._owner = owner
        self._kind = kind
        self._number = number
        self._generators: Dict[str, random.Random] = {}
        #: Used by the platform's other modules. The owner's lock guards the following attributes.
        self.terms = terms
        self.happened = 0
        self.count = 0
        #: Set once the fault injects nothing more; and whether remove() was the reason.
        self.over = False
        self.removed = False

    @property
    def kind(self) -> str:
        """The name of the method that made the fault."""
        return self._kind

    @property
    def injected(self) -> int:
        """The number of requests, streams or tokens that it has hit. For an outage, how often it has begun."""
        return self.count

    def is_over(self) -> bool:
        """Return True if it has ended: it happened ``times`` times, its time has passed, or it was removed."""
        return self.over

    def remove(self) -> None:
        """End the fault: delayed requests go on, and an outage ends. Does nothing if it has ended.

        :raises ConfigurationError: an outage cannot end, because another program has taken the port.
        """
        self._owner._remove([self])

    def __enter__(self) -> Fault:
        return self

    def __exit__(
        self,
        exc_type: Optional[Type[BaseException]],
        exc: Optional[BaseException],
        tb: Optional[TracebackType],
    ) -> None:
        self.remove()

    def __str__(self) -> str:
        return fault_terms.write(self._kind, self.terms)

    def __repr__(self) -> str:
        return f"<Fault {self}>"

    def draw(self, name: str) -> Tuple[float, float]:
        """Return two random numbers from 0 up to 1, from a generator for this fault and ``name``.

        The n-th request of an endpoint always gets the same numbers, whatever the other endpoints receive.
        """
        generator = self._generators.get(name)
        if generator is None:
            generator = self._generators[name] = random.Random(f"{self._owner.seed}/{self._number}/{name}")
        return generator.random(), generator.random()


class Plan(NamedTuple):
    """Hold the faults that hit one request."""

    #: The fault that ends the request, if one does.
    ending: Optional[Fault]
    #: The interim answers before its answer.
    interim: Tuple[Fault, ...]
    #: The delays, each before or after the platform acts.
    delays: Tuple[Tuple[Fault, float], ...]
    #: Where a half answer is cut, from 0 up to 1.
    where: float
    #: The epoch of the platform in which the request came.
    epoch: int

    def ends(self, when: str) -> Optional[Fault]:
        """Return the fault that ends the request, if it does so ``when``."""
        return self.ending if self.ending is not None and self.ending.terms.when == when else None


class Faults:
    """Inject faults between clients and one local platform. :attr:`LocalPlatform.faults` is one::

        platform.faults.error(503, rate=0.1, on="complete", retry_after=1)
        platform.faults.latency(0.05, 0.2)
        with platform.faults.outage():
            ...
        assert platform.faults.injected["error"] > 0

    ``seed`` makes random decisions repeatable. The n-th request of an endpoint meets the same faults in every run that
    defines the same faults in the same order.

    An error, page or reset comes before the platform has acted on the request. With ``when="after"`` the platform acts,
    and the fault replaces its answer. If several faults hit a request, it gets all delays and interim answers, and the
    first error, reset, half answer or page.

    Faults hit HTTP only. The methods of the platform itself, such as ``submit()`` and ``wait()``, are not affected.
    Every method may be called from any thread.

    Arguments that several methods have:

    - ``rate``: the share of requests that it hits, from 0 to 1; drawn for each request.
    - ``times``: the fault ends after it has happened so many times. None: never.
    - ``on``: the endpoints: ``"*"`` for all, a name or several, as in ``sekuire.wire.protocol.DEFAULT_ENDPOINTS``.
    - ``when``: ``"before"`` the platform acts on the request, or ``"after"`` it has acted.
    - ``every``: repeat the fault, instead of injecting it once now. The value is the seconds from the end of one to
      the next, or two numbers between which they are drawn. The repetition begins when the platform runs.

    All of them raise :class:`~sekuire.errors.ConfigurationError`, naming the argument that is wrong.

    :param seed: None draws one, which :attr:`seed` returns.
    """

    # Threads: `_changed` guards every attribute here and is held over nothing that waits, except its own wait().
    # Faults that happen at a moment run on the platform's watch thread.

    def __init__(self, seed: Optional[int] = 0) -> None:
        if seed is not None and not is_whole(seed):
            raise ConfigurationError("must be an integer, or None to draw one", "seed")
        self._seed = random.SystemRandom().randrange(1_000_000_000) if seed is None else seed
        self._changed = threading.Condition()
        self._numbers = itertools.count(1)
        self._injected: Counter[str] = Counter()
        #: Faults in the order in which they were made: those of requests, those that repeat, and the outages and stalls
        #: that last now.
        self._rules: Tuple[Fault, ...] = ()
        self._recurring: Tuple[Fault, ...] = ()
        self._lasting: Tuple[Fault, ...] = ()
        #: The platform while it runs; a new object at each start.
        self._network: Optional[Network] = None
        #: Grows each time that the platform stops or goes off the network.
        self._epoch = 0
        #: True if a request must ask for its plan. Read without the lock.
        self.active = False

    @property
    def seed(self) -> int:
        return self._seed

    # -- faults of requests -------------------------------------------------------------------------------------------

    def latency(
        self,
        low: float,
        high: Optional[float] = None,
        *,
        rate: float = 1.0,
        times: Optional[int] = None,
        on: Union[str, Collection[str]] = "*",
        when: str = "before",
    ) -> Fault:
        """Delay requests by ``low`` seconds, or by ``low`` to ``high``; with ``when="after"`` their answers."""
        lowest = fault_terms.check_seconds(low, "low")
        highest = lowest if high is None else fault_terms.check_seconds(high, "high", lowest)
        terms = Terms(seconds=(lowest, highest), rate=rate, times=times, on=on, when=when)
        return self._add_rule("latency", terms)

    def error(
        self,
        status: int = 503,
        *,
        rate: float = 1.0,
        times: Optional[int] = None,
        on: Union[str, Collection[str]] = "*",
        when: str = "before",
        retry_after: Optional[int] = None,
        code: Optional[str] = None,
    ) -> Fault:
        """Answer requests with an error.

        :param status: from 300 to 599.
        :param retry_after: seconds for the header ``Retry-After``; None sends none.
        :param code: the ``code`` in the body, by which clients tell errors apart; None: ``INJECTED``.
        """
        fault_terms.check_failure(status)
        terms = Terms(status=status, rate=rate, times=times, on=on, when=when, retry_after=retry_after, code=code)
        return self._add_rule("error", terms)

    def reset(
        self,
        *,
        rate: float = 1.0,
        times: Optional[int] = None,
        on: Union[str, Collection[str]] = "*",
        when: str = "before",
    ) -> Fault:
        """Reset connections (TCP RST) instead of answering.

        With ``when="after"`` the client cannot know that the platform has acted.
        """
        return self._add_rule("reset", Terms(rate=rate, times=times, on=on, when=when))

    def half_answer(
        self,
        *,
        rate: float = 1.0,
        times: Optional[int] = None,
        on: Union[str, Collection[str]] = "*",
    ) -> Fault:
        """Send the head and the first part of the answer, then close the connection. The platform has acted.

        A stream is cut in the middle of one of its first eight events.
        """
        terms = Terms(rate=rate, times=times, on=on, when="after")
        return self._add_rule("half_answer", terms)

    def page(
        self,
        status: int = 502,
        *,
        rate: float = 1.0,
        times: Optional[int] = None,
        on: Union[str, Collection[str]] = "*",
        when: str = "before",
        retry_after: Optional[int] = None,
    ) -> Fault:
        """Answer requests with an HTML page, as an ingress, a captive portal or a firewall does.

        A page is not an answer of the platform, whatever its status: clients must retry.

        :param status: from 200 to 599, without 204, 205 and 304, which have no body.
        :param retry_after: seconds for the header ``Retry-After``; None sends none.
        """
        fault_terms.check_page(status)
        terms = Terms(status=status, rate=rate, times=times, on=on, when=when, retry_after=retry_after)
        return self._add_rule("page", terms)

    def interim(
        self,
        status: int = 103,
        *,
        rate: float = 1.0,
        times: Optional[int] = None,
        on: Union[str, Collection[str]] = "*",
    ) -> Fault:
        """Send an interim answer before the real one: 103 Early Hints, 102 Processing, 100 Continue.

        It comes before the platform acts, together with other faults except a reset. HTTP/1.0 clients get none.
        """
        fault_terms.check_interim(status)
        return self._add_rule("interim", Terms(status=status, rate=rate, times=times, on=on))

    # -- faults that happen at a moment -------------------------------------------------------------------------------

    def cut_streams(self, *, every: Optional[Span] = None, times: Optional[int] = None) -> Fault:
        """Cut every open stream, without a proper end."""
        return self._add_event("cut_streams", Terms(every=every, times=times))

    def stall_streams(self, seconds: Span, *, every: Optional[Span] = None, times: Optional[int] = None) -> Fault:
        """Send nothing on the open streams for ``seconds``, not even comments. Then send what has accumulated.

        A stream that is opened during the stall works, so a client that gives up a silent stream is served.
        """
        terms = Terms(seconds=seconds, every=every, times=times)
        return self._add_event("stall_streams", terms)

    def expire_tokens(
        self, installation_id: Optional[str] = None, *, every: Optional[Span] = None, times: Optional[int] = None
    ) -> Fault:
        """Expire the valid runtime tokens, of one installation or of all: the next request gets 401."""
        terms = Terms(installation_id=installation_id, every=every, times=times)
        return self._add_event("expire_tokens", terms)

    def outage(
        self,
        seconds: Optional[Span] = None,
        *,
        status: Optional[int] = None,
        retry_after: Optional[int] = None,
        every: Optional[Span] = None,
        times: Optional[int] = None,
    ) -> Fault:
        """Make the platform unreachable: reset its connections, and refuse new ones.

        It lasts for ``seconds``, or until the fault is removed: ``with platform.faults.outage(): ...``.

        :param status: cut the streams and answer every request with this status instead, as a load balancer does that
            has lost its backend.
        """
        if every is not None and seconds is None:
            raise ConfigurationError("how long? An outage that repeats must end", "seconds")
        if status is not None:
            fault_terms.check_failure(status)
        if retry_after is not None and status is None:
            raise ConfigurationError("needs a status: refused connections have no answer to carry it", "retry_after")
        terms = Terms(seconds=seconds, status=status, retry_after=retry_after, every=every, times=times)
        return self._add_event("outage", terms)

    def add(self, text: str) -> Fault:
        """Add a fault from text, ``KIND:ARGUMENT,...``, where KIND is one of the methods here: ``error:503,rate=0.1``.

        Numbers may be ranges (``0.05-0.2``) where the method accepts two. Endpoints are joined by ``+``
        (``on=complete+heartbeat``). Faults that happen at a moment need ``every=``.

        :raises ConfigurationError: the text is wrong; the message says why, with an example.
        """
        if not isinstance(text, str):
            raise ConfigurationError("must be text such as " + EXAMPLES["error"], "fault")
        problem = ""
        example = EXAMPLES["error"]
        try:
            kind, arguments = fault_terms.read(text)
            example = EXAMPLES[kind]
            fault: Fault = getattr(self, kind)(**arguments)
            return fault
        except ConfigurationError as error:
            problem = str(error)
        raise ConfigurationError(f"{text!r}: {problem}; for example {example}", "fault")

    # -- watching and ending faults ---------------------------------------------------------------------------------

    @property
    def injected(self) -> Dict[str, int]:
        """The number of requests, streams or tokens that each kind of fault has hit. For outages, how often one began.

        Every kind is included, by the name of its method.
        """
        with self._changed:
            return {kind: self._injected[kind] for kind in EXAMPLES}

    @property
    def standing(self) -> List[Fault]:
        """The faults that have not ended, in the order in which they were made."""
        with self._changed:
            faults = {id(fault): fault for fault in (*self._rules, *self._recurring, *self._lasting)}
        return sorted(faults.values(), key=lambda fault: fault._number)

    def wait(self, kind: str, times: int = 1, timeout: Optional[float] = None) -> None:
        """Return once ``injected[kind]`` is ``times`` or more.

        :raises TimeoutError: that has not happened after ``timeout`` seconds.
        """
        if kind not in EXAMPLES:
            raise ConfigurationError(f"must be one of {', '.join(EXAMPLES)}", "kind")
        with self._changed:
            if self._changed.wait_for(lambda: self._injected[kind] >= times, timeout):
                return
            so_far = self._injected[kind]
        raise TimeoutError(f"{kind} was injected {so_far} and not {times} times within {timeout} s")

    def clear(self) -> None:
        """End all faults: delayed requests go on, and an outage ends. The counts stay.

        :raises ConfigurationError: an outage cannot end, because another program has taken the port.
        """
        self._remove(self.standing)

    def __repr__(self) -> str:
        return f"<Faults seed={self._seed}: {'; '.join(map(str, self.standing)) or 'none'}>"

    # -- used by the platform -----------------------------------------------------------------------------------------

    @property
    def is_down(self) -> bool:
        """True if connections are refused now."""
        return any(fault.kind == "outage" and fault.terms.status is None for fault in self._lasting)

    def attach(self, network: Network) -> None:
        """Connect the faults to a platform that has started. Faults that happen at a moment can happen now.

        :raises ConfigurationError: another platform has these faults.
        """
        with self._changed:
            taken = self._network is not None
            if not taken:
                self._network = network
            recurring = self._recurring
        if taken:
            raise ConfigurationError("another running platform has them; make Faults for each", "faults")
        for fault in recurring:
            self._later(network, fault)

    def detach(self) -> None:
        """Disconnect the platform, which stops. End outages and stalls, and drop delayed requests."""
        with self._changed:
            self._network = None
            self._epoch += 1
            for fault in self._lasting:
                self._end(fault)
            self._changed.notify_all()

    def plan(self, endpoint: str) -> Optional[Plan]:
        """Draw and count the faults of a request that has just come. Return None if none hits it."""
        with self._changed:
            ending = next((fault for fault in reversed(self._lasting) if fault.terms.status is not None), None)
            if ending is not None:
                return Plan(ending, (), (), 0.0, self._epoch)
            where = 0.0
            delays = []
            interim = []
            for fault in self._rules:
                if fault.terms.on is not None and endpoint not in fault.terms.on:
                    continue
                # Always drawn, so that the numbers of one fault do not depend on another.
                drawn, how = fault.draw(endpoint)
                if drawn >= fault.terms.rate:
                    continue
                if fault.terms.seconds is not None:
                    delays.append((fault, _between(fault.terms.seconds, how)))
                elif fault.kind == "interim":
                    interim.append(fault)
                elif ending is None:
                    ending, where = fault, how
            if ending is not None and ending.terms.when == "before":
                # The platform will not answer, so nothing can be late.
                delays = [(fault, seconds) for fault, seconds in delays if fault.terms.when == "before"]
            met = [fault for fault, _ in delays] + interim + ([] if ending is None else [ending])
            for fault in met:
                self._count(fault, 1)
                logger.debug("injected into a request of %s: %s", endpoint, fault)
            return Plan(ending, tuple(interim), tuple(delays), where, self._epoch) if met else None

    def delay(self, plan: Plan, when: str) -> bool:
        """Sleep as long as the plan says. Return False if the platform becomes unreachable before that ends."""
        began = time.monotonic()
        with self._changed:
            while plan.epoch == self._epoch:
                wanted = sum(
                    seconds for fault, seconds in plan.delays if fault.terms.when == when and not fault.removed
                )
                left = began + wanted - time.monotonic()
                if left <= 0:
                    return True
                self._changed.wait(left)
            return False

    # -- inside (each method that needs the lock says so) ------------------------------------------------------------

    def _add_rule(self, kind: str, terms: Terms) -> Fault:
        with self._changed:
            fault = Fault(self, kind, next(self._numbers), terms)
            self._rules = (*self._rules, fault)
            self._tidy()
        return fault

    def _add_event(self, kind: str, terms: Terms) -> Fault:
        if terms.times is not None and terms.every is None:
            raise ConfigurationError("needs every=: without it this happens once", "times")
        with self._changed:
            network = self._network
            fault = Fault(self, kind, next(self._numbers), terms)
            if terms.every is not None:
                self._recurring = (*self._recurring, fault)
        if terms.every is None:
            if network is None:
                raise ConfigurationError("the platform does not run: start it first, or give every=", kind)
            self._now(network, fault)
        elif network is not None:
            self._later(network, fault)
        return fault

    def _later(self, network: Network, fault: Fault, after: float = 0.0) -> None:
        assert fault.terms.every is not None
        with self._changed:
            pause = _between(fault.terms.every, fault.draw("every")[0])

        def again() -> None:
            with self._changed:
                gone = fault.over or self._network is not network
            if not gone:
                self._later(network, fault, self._now(network, fault))

        network.call_later(after + pause, again)

    def _now(self, network: Network, fault: Fault) -> float:
        """Inject the fault now, and return how many seconds it lasts."""
        kind = fault.kind
        with self._changed:
            lasts = 0.0 if fault.terms.seconds is None else _between(fault.terms.seconds, fault.draw("seconds")[0])
            if self._network is not network or fault.over:
                # The platform was stopped or the fault removed just now.
                return lasts
            if kind in _LASTING:
                self._lasting = (*self._lasting, fault)
                if self.is_down:
                    self._epoch += 1
                self._tidy()
        if kind == "cut_streams":
            hits = network.cut_streams()
        elif kind == "stall_streams":
            hits = network.stall_streams(lasts)
        elif kind == "expire_tokens":
            hits = network.expire_tokens(fault.terms.installation_id)
        elif fault.terms.status is None:
            hits = 1
            network.settle()
        else:
            hits = 1
            network.cut_streams()
        logger.debug("injected, hits %d: %s", hits, fault)
        with self._changed:
            if hits:
                self._count(fault, hits)
            if kind not in _LASTING and fault.terms.every is None:
                fault.over = True
        if kind in _LASTING and fault.terms.seconds is not None:
            network.call_later(lasts, lambda: self._finish(network, fault))
        return lasts

    def _finish(self, network: Network, fault: Fault) -> None:
        """End an outage or a stall whose time has passed. Watch thread."""
        with self._changed:
            if self._network is not network or fault not in self._lasting:
                return
            self._end(fault)
        if fault.kind == "outage":
            self._settle(network)

    def _settle(self, network: Network) -> None:
        problem: Optional[ConfigurationError] = None
        try:
            network.settle()
        except ConfigurationError as error:
            # The program that has the port may close it later.
            network.call_later(_RETRY, lambda: self._settle_quietly(network))
            problem = error
        if problem is not None:
            raise problem

    def _settle_quietly(self, network: Network) -> None:
        with contextlib.suppress(ConfigurationError):
            self._settle(network)

    def _remove(self, faults: Collection[Fault]) -> None:
        with self._changed:
            network = self._network
            ended = [fault for fault in faults if fault in self._lasting]
            for fault in faults:
                fault.removed = fault.over = True
            self._tidy()
        if network is not None:
            if any(fault.kind == "stall_streams" for fault in ended):
                network.resume_streams()
            if any(fault.kind == "outage" for fault in ended):
                self._settle(network)

    def _count(self, fault: Fault, hits: int) -> None:
        """Count a fault that has happened. Needs the lock."""
        fault.count += hits
        fault.happened += 1
        self._injected[fault.kind] += hits
        if fault.happened == fault.terms.times and fault not in self._lasting:
            fault.over = True
        self._tidy()

    def _end(self, fault: Fault) -> None:
        """End an outage or a stall. Needs the lock."""
        self._lasting = tuple(one for one in self._lasting if one is not fault)
        if fault.terms.every is None or fault.happened == fault.terms.times:
            fault.over = True
        self._tidy()

    def _tidy(self) -> None:
        """Forget the faults that have ended, and wake the waiters. Needs the lock."""
        self._rules, self._recurring, self._lasting = (
            tuple(fault for fault in faults if not fault.over)
            for faults in (self._rules, self._recurring, self._lasting)
        )
        self.active = bool(self._rules) or any(fault.terms.status is not None for fault in self._lasting)
        self._changed.notify_all()


def _between(span: Tuple[float, float], share: float) -> float:
    return span[0] + (span[1] - span[0]) * share
