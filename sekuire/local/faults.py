"""Faults on demand: what goes wrong between clients and the local platform, how often, and for how long."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time
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

from .._internal.logs import get_logger
from ..errors import ConfigurationError
from . import fault_terms
from .fault_terms import EXAMPLES, Span, Terms, is_int

__all__ = ["Fault", "Faults"]

logger = get_logger("sekuire.local")

#: What goes on for a while once it has happened.
_LASTING = ("stall_streams", "outage")
#: Seconds after which an outage that could not be ended, because somebody took the port, is ended again.
_RETRY = 0.5


class Network(Protocol):
    """What a running platform does for its faults; the first four return how many were struck, or nothing."""

    def cut_streams(self) -> int: ...

    def stall_streams(self, seconds: float) -> int: ...

    def resume_streams(self) -> None: ...

    def expire_tokens(self, installation_id: Optional[str]) -> int: ...

    def settle(self) -> None:
        """Be reachable, or not, as :attr:`Faults.is_down` says."""

    def call_later(self, delay: float, callback: Callable[[], None]) -> None: ...


class Fault:
    """One fault, as the methods of :class:`Faults` return it. As a context manager it ends with its block.

    ``str()`` gives it as text, as :meth:`Faults.add` and ``sekuire dev --fault`` take it.
    """

    def __init__(self, owner: Faults, kind: str, number: int, terms: Terms) -> None:
        self._owner = owner
        self._kind = kind
        self._number = number
        self._dice: Dict[str, random.Random] = {}
        #: For the rooms of the platform; what follows is guarded by the owner's lock.
        self.terms = terms
        self.happened = 0
        self.struck = 0
        #: Nothing more will come of it; and whether that was wished.
        self.over = False
        self.removed = False

    @property
    def kind(self) -> str:
        """The name of the method that made it."""
        return self._kind

    @property
    def injected(self) -> int:
        """How many requests, streams or tokens it has struck so far; for an outage, how often it has begun."""
        return self.struck

    def is_over(self) -> bool:
        """Whether nothing more will come of it: it happened ``times`` times, its time is over, or it was removed."""
        return self.over

    def remove(self) -> None:
        """End it: what it holds up goes on, an outage is over. Does nothing where it has ended.

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
        """Two numbers from 0 up to 1, from dice of this fault and ``name``: the n-th request of an endpoint always
        gets the same, whatever comes to the others meanwhile."""
        dice = self._dice.get(name)
        if dice is None:
            dice = self._dice[name] = random.Random(f"{self._owner.seed}/{self._number}/{name}")
        return dice.random(), dice.random()


class Plan(NamedTuple):
    """What becomes of one request."""

    #: How it ends, if not as it should.
    fate: Optional[Fault]
    #: The interim answers that come before its answer.
    interim: Tuple[Fault, ...]
    #: How long it is late, before or after the platform acts.
    delays: Tuple[Tuple[Fault, float], ...]
    #: From 0 up to 1: where a half answer is cut.
    where: float
    #: When it came.
    epoch: int

    def ends(self, when: str) -> Optional[Fault]:
        """Its fate, if that comes ``when``."""
        return self.fate if self.fate is not None and self.fate.terms.when == when else None


class Faults:
    """What goes wrong between clients and one local platform. :attr:`LocalPlatform.faults` is one::

        platform.faults.error(503, rate=0.1, on="complete", retry_after=1)
        platform.faults.latency(0.05, 0.2)
        with platform.faults.outage():
            ...
        assert platform.faults.injected["error"] > 0

    What is decided by chance comes from ``seed``: the n-th request of an endpoint meets the same faults in every run
    that defines the same ones in the same order. An error or a reset comes before the platform has seen the request,
    and then nothing was done; or, with ``when="after"``, in place of the answer, and then all was done. Of several
    faults that strike a request all delays and interim answers count, and the first error, reset, half answer or page.

    The Python face of the platform is not touched: ``submit()``, ``wait()`` and the rest work through every fault.

    Any thread may call anything. ``_changed`` guards everything here and is held over nothing that waits, but for
    itself. What happens at a moment runs on the platform's watch thread.

    Arguments that several methods have:

    - ``rate``: from 0 to 1, how many of the requests it strikes; each is drawn.
    - ``times``: it is over after it has happened so many times. None: never.
    - ``on``: the endpoints: ``"*"`` for all, a name or several, as in ``sekuire.wire.protocol.DEFAULT_ENDPOINTS``.
    - ``when``: ``"before"`` the platform has seen the request, or ``"after"`` it has acted on it.
    - ``every``: not now, but again and again: seconds from the end of one to the next, or two numbers between which
      they are drawn. It begins with the platform's start, or now where that runs.

    All of them raise :class:`~sekuire.errors.ConfigurationError`, naming the argument that is wrong.

    :param seed: None draws one; :attr:`seed` tells it.
    """

    def __init__(self, seed: Optional[int] = 0) -> None:
        if seed is not None and not is_int(seed):
            raise ConfigurationError("must be an integer, or None to have one drawn", "seed")
        self._seed = random.SystemRandom().randrange(1_000_000_000) if seed is None else seed
        self._changed = threading.Condition()
        self._numbers = itertools.count(1)
        self._injected: Counter[str] = Counter()
        #: In the order in which they were made: those of requests, those that happen again and again, and those that
        #: last: outages and stalls.
        self._rules: Tuple[Fault, ...] = ()
        self._recurring: Tuple[Fault, ...] = ()
        self._lasting: Tuple[Fault, ...] = ()
        #: The platform while it runs; another object each time.
        self._network: Optional[Network] = None
        #: Counts the times that the platform was started, stopped or could not be reached.
        self._epoch = 0
        #: Whether a request has to ask for its plan; read without the lock.
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
        return self._strike("latency", terms)

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
        return self._strike("error", terms)

    def reset(
        self,
        *,
        rate: float = 1.0,
        times: Optional[int] = None,
        on: Union[str, Collection[str]] = "*",
        when: str = "before",
    ) -> Fault:
        """Reset connections (TCP RST) instead of answering: after ``when="after"`` the client cannot know that the
        platform has acted."""
        return self._strike("reset", Terms(rate=rate, times=times, on=on, when=when))

    def half_answer(
        self,
        *,
        rate: float = 1.0,
        times: Optional[int] = None,
        on: Union[str, Collection[str]] = "*",
    ) -> Fault:
        """Send the head and a beginning of the answer, then close the connection. The platform has acted.

        A stream is cut in the middle of one of its first eight events.
        """
        terms = Terms(rate=rate, times=times, on=on, when="after")
        return self._strike("half_answer", terms)

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

        No page is a verdict of the platform, whatever its status says: clients must retry.

        :param status: from 200 to 599, without 204, 205 and 304, which have no body.
        :param retry_after: seconds for the header ``Retry-After``; None sends none.
        """
        fault_terms.check_page(status)
        terms = Terms(status=status, rate=rate, times=times, on=on, when=when, retry_after=retry_after)
        return self._strike("page", terms)

    def interim(
        self,
        status: int = 103,
        *,
        rate: float = 1.0,
        times: Optional[int] = None,
        on: Union[str, Collection[str]] = "*",
    ) -> Fault:
        """Send an interim answer before the real one: 103 Early Hints, 102 Processing, 100 Continue.

        It comes before the platform acts, and with every other fault but a reset. Clients of HTTP/1.0 get none.
        """
        fault_terms.check_interim(status)
        return self._strike("interim", Terms(status=status, rate=rate, times=times, on=on))

    # -- faults that happen at a moment -------------------------------------------------------------------------------

    def cut_streams(self, *, every: Optional[Span] = None, times: Optional[int] = None) -> Fault:
        """Cut every stream that is open, without a proper end."""
        return self._happen("cut_streams", Terms(every=every, times=times))

    def stall_streams(self, seconds: Span, *, every: Optional[Span] = None, times: Optional[int] = None) -> Fault:
        """Send nothing on the streams that are open, no comment either, for ``seconds``; then what has come up.

        A stream opened meanwhile works: a client that gives up a silent one is served.
        """
        terms = Terms(seconds=seconds, every=every, times=times)
        return self._happen("stall_streams", terms)

    def expire_tokens(
        self, installation_id: Optional[str] = None, *, every: Optional[Span] = None, times: Optional[int] = None
    ) -> Fault:
        """End the runtime tokens that are valid now, of one installation or of all: the next request gets 401."""
        terms = Terms(installation_id=installation_id, every=every, times=times)
        return self._happen("expire_tokens", terms)

    def outage(
        self,
        seconds: Optional[Span] = None,
        *,
        status: Optional[int] = None,
        retry_after: Optional[int] = None,
        every: Optional[Span] = None,
        times: Optional[int] = None,
    ) -> Fault:
        """Be out of reach from now on: connections are reset, and new ones refused.

        It lasts for ``seconds``, or until the fault is removed: ``with platform.faults.outage(): ...``.

        :param status: the streams are cut, and every request is answered with this status, as by a load balancer
            that has lost its backend.
        """
        if every is not None and seconds is None:
            raise ConfigurationError("how long? An outage that comes again must end", "seconds")
        if status is not None:
            fault_terms.check_failure(status)
        if retry_after is not None and status is None:
            raise ConfigurationError("needs a status: refused connections have no answer to carry it", "retry_after")
        terms = Terms(seconds=seconds, status=status, retry_after=retry_after, every=every, times=times)
        return self._happen("outage", terms)

    def add(self, text: str) -> Fault:
        """A fault as text, ``KIND:ARGUMENT,...``, where KIND is one of the methods here: ``error:503,rate=0.1``.

        Numbers may be ranges (``0.05-0.2``) where the method takes two, endpoints are joined by ``+``
        (``on=complete+heartbeat``), and faults that happen at a moment need ``every=``.

        :raises ConfigurationError: it cannot be understood; the text says why, with an example.
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

    # -- looking at them, and the end ---------------------------------------------------------------------------------

    @property
    def injected(self) -> Dict[str, int]:
        """How many requests, streams or tokens each kind of fault has struck; for outages, how often one began.

        Every kind is there, by the name of its method.
        """
        with self._changed:
            return {kind: self._injected[kind] for kind in EXAMPLES}

    @property
    def standing(self) -> List[Fault]:
        """The faults that are not over, in the order in which they were made."""
        with self._changed:
            faults = {id(fault): fault for fault in (*self._rules, *self._recurring, *self._lasting)}
        return sorted(faults.values(), key=lambda fault: fault._number)

    def wait(self, kind: str, times: int = 1, timeout: Optional[float] = None) -> None:
        """Return once ``injected[kind]`` is ``times`` or more.

        :raises TimeoutError: it is not after ``timeout`` seconds.
        """
        if kind not in EXAMPLES:
            raise ConfigurationError(f"must be one of {', '.join(EXAMPLES)}", "kind")
        with self._changed:
            if self._changed.wait_for(lambda: self._injected[kind] >= times, timeout):
                return
            so_far = self._injected[kind]
        raise TimeoutError(f"{kind} was injected {so_far} and not {times} times within {timeout} s")

    def clear(self) -> None:
        """End all of them: what is held up goes on, an outage is over. The counts stay.

        :raises ConfigurationError: an outage cannot end, because another program has taken the port.
        """
        self._remove(self.standing)

    def __repr__(self) -> str:
        return f"<Faults seed={self._seed}: {'; '.join(map(str, self.standing)) or 'none'}>"

    # -- used by the platform -----------------------------------------------------------------------------------------

    @property
    def is_down(self) -> bool:
        """Whether connections are refused now."""
        return any(fault.kind == "outage" and fault.terms.status is None for fault in self._lasting)

    def attach(self, network: Network) -> None:
        """The platform runs from now on: what happens at a moment can happen.

        :raises ConfigurationError: another platform has these faults.
        """
        with self._changed:
            taken = self._network is not None
            if not taken:
                self._network = network
            recurring = self._recurring
        if taken:
            raise ConfigurationError("they are those of another platform that runs; make Faults for each", "faults")
        for fault in recurring:
            self._later(network, fault)

    def detach(self) -> None:
        """The platform stops: with it ends what lasts, and delayed requests are lost."""
        with self._changed:
            self._network = None
            self._epoch += 1
            for fault in self._lasting:
                self._end(fault)
            self._changed.notify_all()

    def plan(self, endpoint: str) -> Optional[Plan]:
        """What becomes of a request that has just come, counted as injected; None: nothing."""
        with self._changed:
            fate = next((fault for fault in reversed(self._lasting) if fault.terms.status is not None), None)
            if fate is not None:
                return Plan(fate, (), (), 0.0, self._epoch)
            where = 0.0
            delays = []
            interim = []
            for fault in self._rules:
                if fault.terms.on is not None and endpoint not in fault.terms.on:
                    continue
                # Always drawn, so that the luck of one fault does not depend on another.
                luck, how = fault.draw(endpoint)
                if luck >= fault.terms.rate:
                    continue
                if fault.terms.seconds is not None:
                    delays.append((fault, _between(fault.terms.seconds, how)))
                elif fault.kind == "interim":
                    interim.append(fault)
                elif fate is None:
                    fate, where = fault, how
            if fate is not None and fate.terms.when == "before":
                # There will be no answer of the platform's to be late.
                delays = [(fault, seconds) for fault, seconds in delays if fault.terms.when == "before"]
            met = [fault for fault, _ in delays] + interim + ([] if fate is None else [fate])
            for fault in met:
                self._count(fault, 1)
                logger.debug("injected into a request of %s: %s", endpoint, fault)
            return Plan(fate, tuple(interim), tuple(delays), where, self._epoch) if met else None

    def delay(self, plan: Plan, when: str) -> bool:
        """Sleep as long as the plan says; false if the platform has got out of reach meanwhile."""
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

    # -- inside: what is done under the lock says so ------------------------------------------------------------------

    def _strike(self, kind: str, terms: Terms) -> Fault:
        with self._changed:
            fault = Fault(self, kind, next(self._numbers), terms)
            self._rules = (*self._rules, fault)
            self._tidy()
        return fault

    def _happen(self, kind: str, terms: Terms) -> Fault:
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
        """Let it happen; the seconds it lasts."""
        kind = fault.kind
        with self._changed:
            lasts = 0.0 if fault.terms.seconds is None else _between(fault.terms.seconds, fault.draw("seconds")[0])
            if self._network is not network or fault.over:
                # Stopped or removed in this very moment.
                return lasts
            if kind in _LASTING:
                self._lasting = (*self._lasting, fault)
                if self.is_down:
                    self._epoch += 1
                self._tidy()
        if kind == "cut_streams":
            struck = network.cut_streams()
        elif kind == "stall_streams":
            struck = network.stall_streams(lasts)
        elif kind == "expire_tokens":
            struck = network.expire_tokens(fault.terms.installation_id)
        elif fault.terms.status is None:
            struck = 1
            network.settle()
        else:
            struck = 1
            network.cut_streams()
        logger.debug("injected, striking %d: %s", struck, fault)
        with self._changed:
            if struck:
                self._count(fault, struck)
            if kind not in _LASTING and fault.terms.every is None:
                fault.over = True
        if kind in _LASTING and fault.terms.seconds is not None:
            network.call_later(lasts, lambda: self._finish(network, fault))
        return lasts

    def _finish(self, network: Network, fault: Fault) -> None:
        """The time of an outage or a stall is over; on the watch thread."""
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
            # Who has the port may give it back.
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

    def _count(self, fault: Fault, struck: int) -> None:
        """Needs the lock."""
        fault.struck += struck
        fault.happened += 1
        self._injected[fault.kind] += struck
        if fault.happened == fault.terms.times and fault not in self._lasting:
            fault.over = True
        self._tidy()

    def _end(self, fault: Fault) -> None:
        """An outage or a stall is over. Needs the lock."""
        self._lasting = tuple(one for one in self._lasting if one is not fault)
        if fault.terms.every is None or fault.happened == fault.terms.times:
            fault.over = True
        self._tidy()

    def _tidy(self) -> None:
        """Forget what is over, and tell who waits. Needs the lock."""
        self._rules, self._recurring, self._lasting = (
            tuple(fault for fault in faults if not fault.over)
            for faults in (self._rules, self._recurring, self._lasting)
        )
        self.active = bool(self._rules) or any(fault.terms.status is not None for fault in self._lasting)
        self._changed.notify_all()


def _between(span: Tuple[float, float], luck: float) -> float:
    return span[0] + (span[1] - span[0]) * luck
