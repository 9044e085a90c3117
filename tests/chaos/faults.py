"""What breaks. Each fault begins, lasts, and ends; afterwards nothing of it is left but what it did."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import psutil

from tests.chaos.stack import KINDS, ChaosStack, Kind

VICTIMS = (
    *("dataset_svc", "job_svc", "trainer_svc", "torchrun", "training"),
    *("inference_svc", "gateway", "authz", "s3", "postgresql"),
)
# Those that the tests run themselves, and have to start again.
_OWN = ("s3", "postgresql")
_AWAY_SECONDS = 1.0
_DEATH_SECONDS = 30
_CLOCK_JUMP_SECONDS = 600.0
DEFAULT_LASTING_SECONDS = 20.0


@dataclass(frozen=True)
class Fault:
    """Something that breaks.

    Attributes:
        name: for people.
        kinds: the stacks that have what it breaks.
        begin: breaks it.
        end: mends what doesn't mend itself.
        lasts_long: whether it lasts as long as was asked for; the others end after a second.
        victim: the process that must be there; empty where there is none.
    """

    name: str
    kinds: tuple[Kind, ...]
    begin: Callable[[ChaosStack], None]
    end: Callable[[ChaosStack], None]
    lasts_long: bool = False
    victim: str = ""

    def seconds(self, lasting_seconds: float) -> float:
        """How long it lasts."""
        return lasting_seconds if self.lasts_long else _AWAY_SECONDS


def _signal(stack: ChaosStack, victim: str, number: signal.Signals) -> None:
    for process in stack.processes(victim):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _ask_to_end(stack: ChaosStack, victim: str) -> None:
    if victim == "postgresql":
        # The postmaster alone, and by the signal that doesn't wait for clients to leave.
        for process in stack.processes(victim)[:1]:
            process.send_signal(signal.SIGINT)
    else:
        _signal(stack, victim, signal.SIGTERM)


def _start_again(stack: ChaosStack, victim: str) -> None:
    psutil.wait_procs(stack.processes(victim), _DEATH_SECONDS)
    if victim == "s3":
        stack.s3.start()
    elif stack.postgresql:
        stack.postgresql.start()


def _nothing(_stack: ChaosStack) -> None:
    pass


def _kill_all(stack: ChaosStack) -> None:
    stack.up.process.kill()
    for victim in _OWN:
        _signal(stack, victim, signal.SIGKILL)


def _start_all(stack: ChaosStack) -> None:
    stack.wait_until_dead()
    for victim in _OWN:
        _start_again(stack, victim)
    stack.start()


def _faults_of(victim: str) -> list[Fault]:
    kinds: tuple[Kind, ...] = ("postgresql",) if victim == "postgresql" else KINDS
    end = partial(_start_again, victim=victim) if victim in _OWN else _nothing
    return [
        Fault(
            f"kill -9 {victim}",
            kinds,
            partial(_signal, victim=victim, number=signal.SIGKILL),
            end,
            victim=victim,
        ),
        Fault(
            f"stop {victim}",
            kinds,
            partial(_signal, victim=victim, number=signal.SIGSTOP),
            partial(_signal, victim=victim, number=signal.SIGCONT),
            lasts_long=True,
            victim=victim,
        ),
        Fault(
            f"restart {victim}",
            kinds,
            partial(_ask_to_end, victim=victim),
            end,
            victim=victim,
        ),
    ]


def _disk_fault(name: str, what: str) -> Fault:
    return Fault(
        f"{what} full",
        ("sqlite",),
        lambda stack: stack.disks[name].fill(),
        lambda stack: stack.disks[name].free(),
        lasts_long=True,
    )


def _proxy_fault(name: str, mode: str) -> Fault:
    return Fault(
        name,
        KINDS,
        lambda stack: stack.proxy.set_mode(mode),  # type: ignore[arg-type]  # one of the modes
        lambda stack: stack.proxy.set_mode("pass"),
        lasts_long=True,
    )


def _clock_fault(name: str, seconds: float) -> Fault:
    return Fault(
        name,
        ("sqlite, clock set",),
        lambda stack: stack.set_clock(seconds),
        lambda stack: stack.set_clock(0),
        lasts_long=True,
    )


FAULTS: dict[str, Fault] = {
    fault.name: fault
    for fault in (
        *(fault for victim in VICTIMS for fault in _faults_of(victim)),
        Fault("kill -9 of all", KINDS, _kill_all, _start_all),
        _proxy_fault("S3 answers 503", "refuse"),
        _proxy_fault("S3 hangs", "hang"),
        _disk_fault("work", "trainer's disk"),
        _disk_fault("db", "database's disk"),
        _disk_fault("tmp", "temporary disk"),
        _disk_fault("s3", "store's disk"),
        _clock_fault("clock jumps ahead, then back", _CLOCK_JUMP_SECONDS),
        _clock_fault("clock jumps back, then ahead", -_CLOCK_JUMP_SECONDS),
    )
}


def is_possible(fault: Fault, stack: ChaosStack) -> bool:
    """Whether a stack has what a fault breaks."""
    if stack.kind not in fault.kinds:
        return False
    return bool(stack.disks) if fault.name.endswith("full") else True
